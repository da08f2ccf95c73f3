"""V and M with their optimizers: what the agent and the learner of video share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from longdream.agent.config.schema import Config
from longdream.agent.core.actor import NotFinite, build_model
from longdream.agent.core.compile import compile_clips
from longdream.agent.core.cuda_graphs import GraphedUpdate
from longdream.agent.core.device import HostCopy, resolve_device, set_precision
from longdream.agent.core.optimizer import Optimizer
from longdream.agent.run.metrics import Timed
from longdream.envs.contract import EnvSpec, UserError
from longdream.worldmodel.types import Batch, Loss

MAX_SKIPPED = 10
"""Updates in a row that may be skipped because a loss or gradient is not finite."""

Metrics = dict[str, Tensor]
Finite = Tensor | bool
"""Whether loss and gradient were finite: on CUDA a scalar on the device."""


class Learner(Timed):
    """Builds V and M, steps their optimizers, counts updates. Derived classes say what an update is.

    Raises:
        UserError: the configuration does not fit together or does not fit the observations and actions.
    """

    COUNTERS: ClassVar[tuple[str, ...]] = ("updates", "skipped", "skipped_in_a_row")

    def __init__(self, config: Config, spec: EnvSpec):
        self.config = config
        self.spec = spec
        self.device = torch.device(resolve_device(config.device))
        set_precision(config.precision, self.device)
        self.model = build_model(config, spec).to(self.device)
        learn = config.learn
        of_model = (self.model.dynamics, cast(nn.Module, self.model.objective), self.model.reward_continue)
        self.optimizers: dict[str, Optimizer] = {}
        if self.model.trains_encoder:
            if learn.warmup:
                raise UserError(
                    f"learn.warmup = {learn.warmup}: with forcing.objective = {config.forcing.objective} V learns "
                    f"through M and has no updates of its own; set it to 0 (learn.warmup_model delays C)"
                )
            of_model = (self.model.encoder, *of_model)
        else:
            self.optimizers["encoder"] = Optimizer(self.model.encoder.parameters(), learn.encoder_rate, learn.agc)
        parameters = (p for part in of_model for p in part.parameters())
        self.optimizers["model"] = Optimizer(parameters, learn.model_rate, learn.agc)
        if config.compiled and self.device.type == "cuda":
            compile_clips(self.model)
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.finite: Finite = True
        """Of the last update. An update that was not finite is skipped."""
        self.seconds: dict[str, float] = dict.fromkeys(("encoder", "model"), 0.0)
        """Spent in updates of each part; on CUDA by the host, which does not wait for the device."""
        self._pending: list[HostCopy] = []
        self._runners: dict[Any, Callable[[dict], tuple[Metrics, Finite]]] = {}

    # -- updates ------------------------------------------------------------------------------------------------------

    @property
    def cuda_graphs(self) -> bool:
        """Whether updates are captured as CUDA graphs and replayed."""
        return self.config.cuda_graphs and self.device.type == "cuda"

    def apply(
        self, update: Callable[[Batch, Any], tuple[Metrics, Finite]], stage: Any, batch: Batch, rate_scale: float
    ) -> Metrics:
        """Call `update(batch, stage)`, as a CUDA graph where the configuration says so, and count it.

        Args:
            stage: what is updated. One stage follows another, and only the latest one's graph is kept, since a graph
                holds the memory of a whole update.
            rate_scale: factor on the learning rates.

        Returns:
            its metrics, scalar tensors, which the next update may overwrite.

        Raises:
            NotFinite: after MAX_SKIPPED updates in a row whose loss or gradient was not finite.
        """
        for optimizer in self.optimizers.values():
            optimizer.scale_rate(rate_scale)
        if stage not in self._runners:

            def run(fields: dict) -> tuple[Metrics, Finite]:
                return update(Batch(**fields), stage)

            self._runners = {stage: GraphedUpdate(run) if self.cuda_graphs else run}
        metrics, finite = self._runners[stage](batch.fields())
        self._count(finite)
        return metrics

    def step(self, part: str, loss: Loss, metrics: Metrics) -> Tensor:
        """Step the optimizer of one part and add to `metrics`; whether loss and gradient were finite."""
        finite = self.backward(part, loss, metrics)
        self.optimizers[part].apply(finite)
        return finite

    def backward(self, part: str, loss: Loss, metrics: Metrics) -> Tensor:
        """As `step`, up to the gradient: the weights are only read."""
        finite, norm = self.optimizers[part].backward(loss.value)
        for key, value in loss.metrics.items():
            metrics[f"{part}/{key}"] = value
        metrics[f"{part}/grad_norm"] = norm
        return finite

    def encoder_rows(self, batch: Batch) -> dict[str, Tensor]:
        """The observations of the batch as one flat set of rows, `learn.encoder_rows` of them drawn at random."""
        flat = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        total = batch.reward.numel()
        wanted = self.config.learn.encoder_rows
        if total <= wanted:
            return flat
        index = torch.randperm(total, device=self.device)[:wanted]
        return {key: value[index] for key, value in flat.items()}

    def settle(self) -> None:
        """Wait until it is known of every update whether it was finite.

        Raises:
            NotFinite: as `apply`.
        """
        while self._pending:
            self._count_skipped(bool(self._pending.pop(0).read()))

    def _count(self, finite: Finite) -> None:
        """Count an update. On CUDA its flag is read while the next update runs, so that the host never waits for what
        it has just launched."""
        self.updates += 1
        self.finite = finite
        if isinstance(finite, Tensor) and finite.is_cuda:
            self._pending.append(HostCopy(finite))
            if len(self._pending) > 1:
                self._count_skipped(bool(self._pending.pop(0).read()))
        else:
            self._count_skipped(bool(finite))

    def _count_skipped(self, finite: bool) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise NotFinite(
                f"loss or gradient was not finite in {MAX_SKIPPED} updates in a row: look at the rewards and "
                f"observations that it learns from, or lower the learning rates"
            )

    # -- saving -------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """All modules with weights."""
        return {"model": self.model}

    def state_dict(self) -> dict[str, Any]:
        """All that learning depends on: weights, optimizers, counters."""
        self.settle()
        return {
            "weights": {name: module.state_dict() for name, module in self.modules().items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "counters": {name: getattr(self, name) for name in self.COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any], weights_only: bool = False) -> None:
        """Load what `state_dict` returned; `weights_only` to act and dream without learning on."""
        for name, module in self.modules().items():
            module.load_state_dict(state["weights"][name])
        if weights_only:
            return
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name in self.COUNTERS:
            setattr(self, name, state["counters"][name])
