"""The agent: V, M and C composed into something that acts, measures surprise, and learns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from longdream.agent.config.schema import Config
from longdream.agent.core.actor import Actor, build_controller
from longdream.agent.core.compile import CompiledDreams, compiled
from longdream.agent.core.cuda_graphs import Graphed
from longdream.agent.core.device import autocast, free_bytes
from longdream.agent.core.learner import Finite, Learner, Metrics
from longdream.agent.core.optimizer import Optimizer
from longdream.controller.types import Improving, Replaying
from longdream.envs.contract import EnvSpec, UserError
from longdream.worldmodel import ranks
from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts, dream_bytes, imagine
from longdream.worldmodel.types import Batch, Loss

Stage = Literal["encoder", "model", "controller"]
"""What an update updates: V; V and M; or V, M and C."""


class Agent(Learner, Actor):
    """Builds V, M and C for an environment, acts with them, and updates them from replayed clips.

    Raises:
        UserError: the configuration does not fit together or does not fit the environment.
    """

    COUNTERS = (*Learner.COUNTERS, "dream_steps")

    def __init__(self, config: Config, spec: EnvSpec):
        super().__init__(config, spec)
        settings = config.controller
        controller = build_controller(config, spec, self.model.feature_size)
        self.controller = controller.to(self.device)
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
        if self.cuda_graphs:
            self.beside = torch.cuda.Stream(self.device)
        self._wrap_dreams()

    def check_memory(self) -> None:
        """Raise UserError for dreams to learn from that cannot all be there at once; who only acts has none."""
        settings = self.config.controller
        carry = self.initial(1)
        clips = self.config.replay.batch
        each = clips * dream_bytes(carry.state, carry.feat, settings.horizon)
        free = free_bytes(self.device)
        if settings.imagination_starts * each > free:
            raise UserError(
                f"controller.imagination_starts = {settings.imagination_starts:,}: {clips} times as many dreams of "
                f"{settings.horizon} steps need {settings.imagination_starts * each / 2**30:,.0f} GiB, and "
                f"{self.device} has {free / 2**30:,.0f} GiB free: set it to at most {max(1, free // each):,}, or lower "
                f"controller.horizon"
            )

    def _wrap_dreams(self) -> None:
        """Dreams are thousands of small kernels, and launching them takes longer than running them: capture each dream
        as a CUDA graph, unless whole updates are captured, and compile its steps and C's losses."""
        self._dreamer: Dreamer = self.model
        self._policy: Callable[[Tensor, bool], Tensor] = self.controller.act
        self._losses: Callable[[Dream, Clip], Loss] = self._controller_losses
        if self.config.compiled and self.cuda_graphs:
            self._policy = compiled(self._policy)
            self._losses = compiled(self._losses)
            if not self.model.dynamics.grows:
                self._dreamer = CompiledDreams(self.model)
        self._dreams: Callable[[Starts], Dream] = self._dream
        if self.capturable and not self.cuda_graphs:
            self._dreams = Graphed(self._dreams)

    # -- learning -----------------------------------------------------------------------------------------------------

    def update(self, rows: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> Metrics:
        """One update of V, M and C, or of those up to `stage`, from replayed rows; metrics as scalar tensors.

        Args:
            rate_scale: factor on the learning rates.

        Raises:
            NotFinite: after some updates in a row whose loss or gradient was not finite.
        """
        batch = Batch.of(rows, self.device)
        with self._compiling(stage == "controller"):
            metrics = self.apply(self._update, stage, batch, rate_scale)
        if stage == "controller":
            self._count_dreams(batch)
        return metrics

    def _compiling(self, wanted: bool) -> AbstractContextManager[Any]:
        """Within, compiled functions run as they are unless `wanted`: the few updates of warm-up would be over before
        the compiler is, and learning begins without it."""
        if wanted or not self.config.compiled or self.device.type != "cuda":
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _update(self, batch: Batch, stage: Stage) -> tuple[Metrics, Finite]:
        """V reconstructs, M predicts the next frames, C learns in M's dreams: each by its loss, or V and M by one."""
        metrics: Metrics = {}
        finite: Finite = True
        if self.config.learn.curiosity:
            batch.reward = batch.reward + self.config.learn.curiosity * batch.surprise

        if not self.model.trains_encoder:
            with self.timed("encoder"):
                loss = self.model.encoder.loss(self.encoder_rows(batch))
                finite = self.step("encoder", loss, metrics)
        if stage == "encoder":
            return metrics, finite

        with self.timed("model"):
            loss, starts, clip = self._model_loss(batch)
        if stage == "controller" and self.cuda_graphs:
            with self.timed("controller"), self._branch():
                finite = finite & self._improve_controller(starts, clip, metrics)
        with self.timed("model"):
            finite_model = self.backward("model", loss, metrics)
            if stage == "controller" and self.cuda_graphs:
                self._join()  # C has dreamt: now M's weights may change
            self.optimizers["model"].apply(finite_model)
        if stage == "controller" and not self.cuda_graphs:  # C dreams in what M has just learned
            with self.timed("controller"):
                finite = finite & self._improve_controller(starts, clip, metrics)
        return metrics, finite & finite_model

    def _branch(self) -> AbstractContextManager[Any]:
        """Within, on CUDA, what is captured runs beside what comes after it: C dreams in steps of many small kernels,
        which leave most of the device to M's backward pass."""
        self.beside.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.beside)

    def _join(self) -> None:
        """Wait for the branch. What it reads must live until here, since the allocator does not know of it."""
        torch.cuda.current_stream().wait_stream(self.beside)

    def update_controller(self, rows: dict, rate_scale: float = 1.0) -> Metrics:
        """One update of C alone, in dreams from replayed rows; V and M are unchanged. As `update` otherwise."""
        batch = Batch.of(rows, self.device)
        metrics = self.apply(self._update_controller, "controller alone", batch, rate_scale)
        self._count_dreams(batch)
        return metrics

    def _update_controller(self, batch: Batch, stage: str) -> tuple[Metrics, Finite]:
        metrics: Metrics = {}
        with torch.no_grad():
            _, starts, clip = self._model_loss(batch)
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
            with autocast(self.config.precision, self.device):
                loss = self._losses(self._dreams(starts), clip)
            finite = self.step("controller", loss, metrics)
        self.controller.after_update()
        return finite

    def _model_loss(self, batch: Batch) -> tuple[Loss, Starts, Clip]:
        with autocast(self.config.precision, self.device):
            starts = self.config.controller.imagination_starts
            return self.model.loss(batch, starts, self.config.learn.encoder_rows)

    def _controller_losses(self, dream: Dream, clip: Clip) -> Loss:
        """C's loss in dreams and, if it is to learn from real clips too, on those."""
        loss = self.controller.loss(dream)
        if weight := self.config.controller.replay_value:
            real = cast(Replaying, self.controller).replay_loss(clip)
            loss = Loss(loss.value + weight * real.value, {**loss.metrics, **real.metrics})
        return loss

    def _dream(self, starts: Starts) -> Dream:
        if torch.is_autocast_enabled(self.device.type):  # a dream is short, and bound by the bytes of its state
            mixers = tuple(state.to(torch.bfloat16) for state in starts.state.mixers)
            starts = starts._replace(state=starts.state._replace(mixers=mixers))
        return imagine(self._dreamer, starts, lambda feat: self._policy(feat, False), self.config.controller.horizon)

    def _count_dreams(self, batch: Batch) -> None:
        """Count the dreamt steps, of all ranks, that C has learned from by gradient; others count theirs themselves."""
        if not isinstance(self.controller, Improving) and "controller" in self.optimizers:
            settings = self.config.controller
            self.dream_steps += ranks.count() * len(batch.reward) * settings.imagination_starts * settings.horizon

    # -- saving -------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        assert isinstance(self.controller, nn.Module)
        return {**super().modules(), "controller": self.controller}
