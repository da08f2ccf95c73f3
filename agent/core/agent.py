"""The agent: V, M and C composed into something that acts, measures surprise, and learns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from longdream.agent.config.schema import Config
from longdream.agent.core.compile import CompiledDreams
from longdream.agent.core.cuda_graphs import Graphed
from longdream.agent.core.learner import Finite, Learner, Metrics, NotFinite
from longdream.agent.core.optimizer import Optimizer
from longdream.controller.actor_critic import ActorCritic
from longdream.controller.evolution import Evolution
from longdream.controller.planner import Planner
from longdream.controller.tree import Tree
from longdream.controller.types import Controller, Improving, Planning, Replaying
from longdream.envs.contract import EnvSpec, Row, UserError
from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts, follow, imagine
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.model import Surprise, start_weight
from longdream.worldmodel.types import Batch, Loss, class_by_name

Stage = Literal["encoder", "model", "controller"]
"""What an update updates: V; V and M; or V, M and C."""


class Carry(NamedTuple):
    """What acting carries from row to row for n streams: the last feature `(n, F)`, M's state, the last action `(n,
    A)`."""

    feat: Tensor
    state: State
    action: Tensor


class Agent(Learner):
    """Builds V, M and C for an environment, acts with them, and updates them from replayed clips.

    Raises:
        UserError: the configuration does not fit together or does not fit the environment.
    """

    COUNTERS = (*Learner.COUNTERS, "dream_steps")

    def __init__(self, config: Config, spec: EnvSpec):
        super().__init__(config, spec)
        settings = config.controller
        if settings.kind == "actor_critic" and settings.kwargs:
            raise UserError(f"controller.kwargs.{next(iter(settings.kwargs))}: actor_critic has no settings of its own")
        try:
            kind = controller_class(settings.kind)
            controller: Any = kind(settings, self.model.feature_size, spec.action.parts, spec.action.size)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.controller: Controller = controller.to(self.device)
        if settings.replay_value and not isinstance(self.controller, Replaying):
            raise UserError(f"{settings.kind} learns from dreams alone: set controller.replay_value to 0")
        if any(p.requires_grad for p in controller.parameters()):
            learn = config.learn
            self.optimizers["controller"] = Optimizer(controller.parameters(), learn.actor_critic_rate, learn.agc)
        self.seconds["controller"] = 0.0
        self.dream_steps = 0
        """Steps dreamt for C to learn from; those of plans are not among them."""
        parts = (self.controller, self.model.objective)
        self.capturable = self.device.type == "cuda" and all(getattr(part, "capturable", False) for part in parts)
        if self.cuda_graphs and (not self.capturable or isinstance(self.controller, Improving)):
            raise UserError(
                f"cuda_graphs = true: an update with {settings.kind} and {config.forcing.objective} cannot be captured;"
                f" set it to false"
            )
        self._wrap_dreams()

    def _wrap_dreams(self) -> None:
        """Dreams are thousands of small kernels, and launching them takes longer than running them: capture each dream
        as a CUDA graph, unless whole updates are captured, and compile its steps."""
        compiled = self.config.compiled and self.cuda_graphs and not self.model.dynamics.grows
        self._dreamer: Dreamer = CompiledDreams(self.model) if compiled else self.model
        self._dreams: Callable[[Starts], Dream] = self._dream
        self._follow: Callable[[Starts, Tensor], Tensor] = partial(follow, self._dreamer)
        if self.capturable and not self.cuda_graphs:
            self._dreams = Graphed(self._dreams)
            self._follow = Graphed(self._follow)

    # -- acting -------------------------------------------------------------------------------------------------------

    def initial(self, n: int) -> Carry:
        """The carry of n streams that have seen nothing."""
        feat = torch.zeros(n, self.model.feature_size, device=self.device)
        action = torch.zeros(n, self.spec.action.size, device=self.device)
        return Carry(feat, self.model.dynamics.initial(n), action)

    @torch.no_grad()
    def observe(self, carry: Carry, row: Row | Any, measure: bool = True) -> tuple[Carry, Surprise | None]:
        """Take in a row of n streams, of arrays or of tensors: the carry after it and, if `measure`, its surprise."""
        obs = {key: torch.as_tensor(value).to(self.device) for key, value in row.obs.items()}
        first = torch.as_tensor(row.is_first).to(self.device)
        z = self.model.encoder(obs)
        surprise = None
        if measure:
            reward = torch.as_tensor(row.reward).to(self.device)
            terminated = torch.as_tensor(row.terminated).to(self.device)
            surprise = self.model.surprise(carry.feat, carry.state, carry.action, z, reward, terminated, first)
        feat, state = self.model.commit(carry.state, z, carry.action, first)
        return Carry(feat, state, carry.action), surprise

    @torch.no_grad()
    def act(self, carry: Carry, greedy: bool) -> np.ndarray:
        """Encoded actions `(n, A)` float32 at the last observed rows, boxes clipped to [-1, 1].

        Raises:
            NotFinite: the controller gave an action that is not finite.
        """
        action = self.choose(carry, greedy).clamp(-1, 1).float().cpu().numpy()
        if not np.isfinite(action).all():
            raise NotFinite("the controller returned an action that is not finite")
        return action

    @torch.no_grad()
    def choose(self, carry: Carry, greedy: bool) -> Tensor:
        """C's actions in the real environment, `(n, A)` on the device. A controller that plans looks ahead in M."""
        if isinstance(self.controller, Planning):
            return self.controller.plan(self.model, carry.feat, carry.state, greedy)
        return self.controller.act(carry.feat, greedy)

    def acted(self, carry: Carry, action: np.ndarray) -> Carry:
        """The carry once `action` `(n, A)` is the one that was taken."""
        return carry._replace(action=torch.from_numpy(action).to(self.device))

    # -- learning -----------------------------------------------------------------------------------------------------

    def update(self, rows: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> Metrics:
        """One update of V, M and C, or of those up to `stage`, from replayed rows; metrics as scalar tensors.

        Args:
            rate_scale: factor on the learning rates.

        Raises:
            NotFinite: after some updates in a row whose loss or gradient was not finite.
        """
        batch = Batch.of(rows, self.device)
        metrics = self.apply(self._update, stage, batch, rate_scale)
        if stage == "controller":
            self._count_dreams(batch)
        return metrics

    def _update(self, batch: Batch, stage: Stage) -> tuple[Metrics, Finite]:
        """V reconstructs, M predicts the next frames, C learns in M's dreams: each by its loss, or V and M by one."""
        metrics: Metrics = {}
        finite: Finite = True
        weight = self._start_weight(batch)
        if self.config.learn.curiosity:
            batch.reward = batch.reward + self.config.learn.curiosity * batch.surprise

        if not self.model.trains_encoder:
            with self.timed("encoder"):
                loss = self.model.encoder.loss(self.encoder_rows(batch))
                finite = self.step("encoder", loss, metrics)
        if stage == "encoder":
            return metrics, finite

        with self.timed("model"):
            loss, starts, clip = self._model_loss(batch, weight)
            finite = finite & self.step("model", loss, metrics)
        if stage == "model":
            return metrics, finite

        with self.timed("controller"):
            finite = finite & self._improve_controller(starts, clip, metrics)
        return metrics, finite

    def update_controller(self, rows: dict, rate_scale: float = 1.0) -> Metrics:
        """One update of C alone, in dreams from replayed rows; V and M are unchanged. As `update` otherwise."""
        batch = Batch.of(rows, self.device)
        metrics = self.apply(self._update_controller, "controller alone", batch, rate_scale)
        self._count_dreams(batch)
        return metrics

    def _update_controller(self, batch: Batch, stage: str) -> tuple[Metrics, Finite]:
        metrics: Metrics = {}
        with torch.no_grad():
            _, starts, clip = self._model_loss(batch, self._start_weight(batch))
        with self.timed("controller"):
            finite = self._improve_controller(starts, clip, metrics)
        return metrics, finite

    def _improve_controller(self, starts: Starts, clip: Clip, metrics: Metrics) -> Finite:
        """An update of C in dreams from `starts`: in a way of its own, by gradient, or none."""
        finite: Finite = True
        if isinstance(self.controller, Improving):
            before = self.model.dreamt
            for key, value in self.controller.improve(self.model, starts).items():
                metrics[f"controller/{key}"] = value
            self.dream_steps += self.model.dreamt - before
        elif "controller" in self.optimizers:
            finite = self.step("controller", self._controller_loss(starts, clip), metrics)
        self.controller.after_update()
        return finite

    def _model_loss(self, batch: Batch, weight: Tensor | None) -> tuple[Loss, Starts, Clip]:
        settings = self.config.controller

        def follow(starts: Starts, action: Tensor) -> Tensor:
            """Dreams under given actions, in the precision of C's own dreams."""
            with torch.autocast(self.device.type, enabled=False):
                return self._follow(starts, action)

        with self.autocast():
            rows = self.config.learn.encoder_rows
            return self.model.loss(batch, settings.imagination_starts, weight, settings.horizon, follow, rows)

    def _controller_loss(self, starts: Starts, clip: Clip) -> Loss:
        loss = self.controller.loss(self._dreams(starts))
        if weight := self.config.controller.replay_value:
            real = cast(Replaying, self.controller).replay_loss(clip)
            loss = Loss(loss.value + weight * real.value, {**loss.metrics, **real.metrics})
        return loss

    def _dream(self, starts: Starts) -> Dream:
        def policy(feat: Tensor) -> Tensor:
            return self.controller.act(feat, greedy=False)

        return imagine(self._dreamer, starts, policy, self.config.controller.horizon)

    def _start_weight(self, batch: Batch) -> Tensor | None:
        """How likely each row of the batch is to start a dream, `(B, T)`; None: all alike."""
        settings = self.config.controller
        if not settings.reward_start_fraction:
            return None
        return start_weight(batch, settings.reward_start_fraction, settings.horizon)

    def _count_dreams(self, batch: Batch) -> None:
        """Count the dreamt steps that C has learned from by gradient; other controllers count theirs themselves."""
        if not isinstance(self.controller, Improving) and "controller" in self.optimizers:
            settings = self.config.controller
            self.dream_steps += len(batch.reward) * settings.imagination_starts * settings.horizon

    # -- saving -------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        assert isinstance(self.controller, nn.Module)
        return {**super().modules(), "controller": self.controller}


CONTROLLERS: dict[str, type[nn.Module]] = {
    "actor_critic": ActorCritic,
    "planner": Planner,
    "tree": Tree,
    "evolution": Evolution,
}


def controller_class(name: str) -> Callable[..., nn.Module]:
    """The class behind `controller.kind`: a known word or a dotted path `package.module:Class`.

    Raises:
        ValueError: neither.
    """
    kind = class_by_name("controller.kind", name, CONTROLLERS)
    if any(base.__module__ == "stable_baselines3.common.base_class" for base in getattr(kind, "__mro__", ())):
        from longdream.controller.sb3 import StableBaselines  # imported here: it takes a second

        return partial(StableBaselines, algorithm=kind)
    return kind
