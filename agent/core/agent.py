"""The agent: V, M and C composed into something that acts, is surprised, and learns."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from longdream.agent.config.schema import Config
from longdream.agent.core.compile import CompiledDreams
from longdream.agent.core.cuda_graphs import Graphed
from longdream.agent.core.learner import Learner, NotFinite, Part
from longdream.controller.actor_critic import ActorCritic
from longdream.controller.evolution import Evolution
from longdream.controller.planner import Planner
from longdream.controller.tree import Tree
from longdream.controller.types import Controller, Improving, Planning, Replaying
from longdream.envs.contract import EnvSpec, Row, UserError
from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts, follow, imagine
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.model import Surprise, start_weight
from longdream.worldmodel.types import Batch, Loss, named

Upto = Literal["encoder", "model", "controller"]


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
        try:
            kind = controller_class(config.controller.kind)
            controller: Any = kind(config.controller, self.model.feature_size, spec.action.parts, spec.action.size)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.controller: Controller = controller.to(self.device)
        if config.controller.replay_value and not isinstance(self.controller, Replaying):
            kind = config.controller.kind
            raise UserError(f"{kind} learns from dreams alone: set controller.replay_value to 0")
        learn = config.learn
        if any(p.requires_grad for p in controller.parameters()):
            self.parts["controller"] = Part(controller.parameters(), learn.actor_critic_rate, learn.clip)
        on_cuda, parts = self.device.type == "cuda", (self.controller, self.model.objective)
        self.capturable = on_cuda and all(getattr(part, "capturable", False) for part in parts)
        # a dream is thousands of small kernels, and launching them takes longer than running them
        alone = self.capturable and not self.recorded  # a recorded update has them in it
        swift = config.compiled and self.recorded and config.worldmodel.mixer != "causal"  # whose state grows
        self._dreamer: Dreamer = CompiledDreams(self.model) if swift else self.model
        self._dreams = Graphed(self._dream) if alone else self._dream
        along = partial(follow, self._dreamer)
        self._follow = Graphed(along) if alone else along
        if self.recorded and (not self.capturable or isinstance(self.controller, Improving)):
            raise UserError(
                f"recorded = true: {config.controller.kind} or {config.forcing.objective} does not allow for it; set "
                f"it to false"
            )
        self.dream_steps = 0
        """Steps dreamt for C to learn from; those of plans are not among them."""
        self.seconds["controller"] = 0.0

    # -- acting -------------------------------------------------------------------------------------------------------

    def initial(self, n: int) -> Carry:
        """The carry of n streams that have seen nothing."""
        zeros = torch.zeros(n, max(self.model.feature_size, self.spec.action.size), device=self.device)
        return Carry(
            zeros[:, : self.model.feature_size], self.model.dynamics.initial(n), zeros[:, : self.spec.action.size]
        )

    @torch.no_grad()
    def observe(self, carry: Carry, row: Row | Any, measure: bool = True) -> tuple[Carry, Surprise | None]:
        """Take in a row of n streams, of arrays or of tensors: the carry after it and, if `measure`, how it
        surprised."""
        obs = {k: torch.as_tensor(v).to(self.device) for k, v in row.obs.items()}
        reward, terminated, first = (
            torch.as_tensor(v).to(self.device) for v in (row.reward, row.terminated, row.is_first)
        )
        z = self.model.encoder(obs)
        surprise = None
        if measure:
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
        """What C does in reality, `(n, A)` on the device: it looks ahead in M if it is one that does."""
        if isinstance(self.controller, Planning):
            return self.controller.plan(self.model, carry.feat, carry.state, greedy)
        return self.controller.act(carry.feat, greedy)

    def acted(self, carry: Carry, action: np.ndarray) -> Carry:
        """The carry once `action` `(n, A)` is the one that was taken."""
        return carry._replace(action=torch.from_numpy(action).to(self.device))

    # -- learning -----------------------------------------------------------------------------------------------------

    def update(self, rows: dict, upto: Upto = "controller", pace: float = 1.0) -> dict[str, Tensor]:
        """One update of V, M and C from replayed rows, at `pace` times the learning rates, or of those of them up to
        `upto`; returns metrics as scalar tensors.

        Raises:
            NotFinite: after PATIENCE updates in a row whose loss or gradient was not finite.
        """
        batch = Batch.of(rows, self.device)
        metrics = self._make(upto, partial(self._update, upto=upto), batch, pace)
        if upto == "controller":
            self._count_dreams(batch)
        return metrics

    def _update(self, batch: Batch, upto: Upto) -> tuple[dict[str, Tensor], Tensor | bool]:
        learn, metrics = self.config.learn, {}
        weight = self._start_weight(batch)
        if learn.curiosity:
            batch.reward = batch.reward + learn.curiosity * batch.surprise
        ok = self._learn_to_see(metrics, batch)
        if upto != "encoder":
            seen: list[tuple[Starts, Clip]] = []

            def model_loss() -> Loss:
                loss, starts, clip = self._model_loss(batch, weight)
                seen.append((starts, clip))
                return loss

            ok = ok & self._learn("model", metrics, model_loss)
            if upto == "controller":
                ok = ok & self._learn_to_act(metrics, *seen[0])
        return metrics, ok

    def _count_dreams(self, batch: Batch) -> None:
        """Count those that C has learned from by gradient; the others count theirs themselves."""
        if not isinstance(self.controller, Improving) and "controller" in self.parts:
            config = self.config.controller
            self.dream_steps += len(batch.reward) * config.starts * config.horizon

    def _start_weight(self, batch: Batch) -> Tensor | None:
        config = self.config.controller
        return start_weight(batch, config.decisive, config.horizon) if config.decisive else None

    def _model_loss(self, batch: Batch, weight: Tensor | None) -> tuple[Loss, Starts, Clip]:
        config = self.config.controller
        with self.half_precision():
            return self.model.loss(batch, config.starts, weight, config.horizon, self._follow_as_dreamt)

    def _follow_as_dreamt(self, starts: Starts, action: Tensor) -> Tensor:
        """As precisely as C's own dreams are."""
        with torch.autocast(self.device.type, enabled=False):
            return self._follow(starts, action)

    def update_controller(self, rows: dict, pace: float = 1.0) -> dict[str, Tensor]:
        """One update of C alone, in dreams from replayed rows; V and M stay as they are. As `update` otherwise."""
        batch = Batch.of(rows, self.device)
        metrics = self._make("C alone", self._update_controller, batch, pace)
        self._count_dreams(batch)
        return metrics

    def _update_controller(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | bool]:
        metrics: dict[str, Tensor] = {}
        with torch.no_grad():
            _, starts, clip = self._model_loss(batch, self._start_weight(batch))
        return metrics, self._learn_to_act(metrics, starts, clip)

    def _learn_to_act(self, metrics: dict[str, Tensor], starts: Starts, clip: Clip) -> Tensor | bool:
        """An update of C in dreams from `starts`, in its own way or by gradient; whether all was finite."""
        ok: Tensor | bool = True
        if isinstance(self.controller, Improving):
            began, before = time.perf_counter(), self.model.dreamt
            found = self.controller.improve(self.model, starts)
            self.dream_steps += self.model.dreamt - before
            metrics.update({f"controller/{key}": value for key, value in found.items()})
            self.seconds["controller"] += time.perf_counter() - began
        elif "controller" in self.parts:
            ok = self._learn("controller", metrics, lambda: self._controller_loss(starts, clip))
        self.controller.after_update()
        return ok

    def _controller_loss(self, starts: Starts, clip: Clip) -> Loss:
        value, metrics = self.controller.loss(self._dreams(starts))
        if share := self.config.controller.replay_value:
            found = cast(Replaying, self.controller).replay_loss(clip)
            value, metrics = value + share * found.value, {**metrics, **found.metrics}
        return Loss(value, metrics)

    def _dream(self, starts: Starts) -> Dream:
        config = self.config.controller
        policy: Callable[[Tensor], Tensor] = lambda feat: self.controller.act(feat, greedy=False)  # noqa: E731
        return imagine(self._dreamer, starts, policy, config.horizon, config.temperature)

    # -- saving -------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), "controller": self._controller_module()}

    def _controller_module(self) -> nn.Module:
        assert isinstance(self.controller, nn.Module)
        return self.controller


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
    found = named("controller.kind", name, CONTROLLERS)
    if any(base.__module__ == "stable_baselines3.common.base_class" for base in getattr(found, "__mro__", ())):
        from longdream.controller.sb3 import StableBaselines  # imported here: it takes a second

        return partial(StableBaselines, algorithm=found)
    return found
