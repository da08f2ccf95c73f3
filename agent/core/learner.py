"""V and M in training: built for what is seen and done, each stepped by its own loss and optimiser."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: the fused operations that torch's own optimisers and clip_grad_norm_ are made of

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from longdream.agent.config.schema import Config
from longdream.agent.core.compile import compile_clips
from longdream.agent.core.cuda_graphs import GraphedUpdate
from longdream.envs.contract import EnvSpec, UserError
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.types import Batch, Loss

PATIENCE = 10
"""Updates in a row that may be skipped because a loss or gradient is not finite."""


class NotFinite(RuntimeError):
    """Loss or gradient of some part was not finite too many times in a row."""


class Learner:
    """Builds V and M and keeps their optimisers; what is learned from, and C, are matters of those derived from it.

    Raises:
        UserError: the configuration does not fit together or does not fit what is seen and done.
    """

    COUNTERS: ClassVar[tuple[str, ...]] = ("updates", "skipped", "skipped_in_a_row")

    def __init__(self, config: Config, spec: EnvSpec):
        self.config, self.spec = config, spec
        self.device = torch.device(resolve_device(config.device))
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("highest" if config.exact else "high")
        try:
            self.model = WorldModel(
                spec.obs, spec.action.size, config.encoder, config.worldmodel, config.forcing, config.heads
            ).to(self.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        learn = config.learn
        model_parts = (self.model.dynamics, cast(nn.Module, self.model.objective), self.model.consequence)
        self.parts = {
            "encoder": Part(self.model.encoder.parameters(), learn.encoder_rate, learn.clip),
            "model": Part((p for m in model_parts for p in m.parameters()), learn.model_rate, learn.clip),
        }
        if config.compiled and self.device.type == "cuda":
            compile_clips(self.model.dynamics)
            self.parts["model"].compile()
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.taken: Tensor | bool = True
        """Whether the last update was: where a loss or gradient was not finite, it is skipped."""
        self._unread: list[_OnItsWay] = []
        self._updates: dict[Any, Callable[[dict], Any]] = {}
        self.seconds: dict[str, float] = dict.fromkeys(("encoder", "model"), 0.0)
        """Of each part's updates; on CUDA the host's, which does not wait for the device's."""

    @property
    def recorded(self) -> bool:
        """Whether updates are recorded and replayed."""
        return self.config.recorded and self.device.type == "cuda"

    def recording(self, update: Callable[[dict], tuple[dict[str, Tensor], Any]]) -> Callable[[dict], Any]:
        """An update from a batch's fields, or what records and replays it: what it returns holds until the next."""
        return GraphedUpdate(update) if self.recorded else update

    def _make(
        self, kind: Any, update: Callable[[Batch], tuple[dict[str, Tensor], Any]], batch: Batch, pace: float
    ) -> dict[str, Tensor]:
        """Make an update, one of a kind, at `pace` times the learning rates, and count it; its metrics as scalar
        tensors. `update` says these and whether all was finite."""
        if kind not in self._updates:  # one kind follows another, and a recording holds memory as long as it is there
            self._updates = {kind: self.recording(lambda fields: update(Batch(**fields)))}
        for part in self.parts.values():
            part.set_pace(pace)
        metrics, ok = self._updates[kind](batch.fields())
        self._count(ok)
        return metrics

    def half_precision(self) -> torch.autocast:
        """Within, matrix products on CUDA are of bfloat16, if they may be and do not have to be `exact`."""
        on = self.config.bfloat16 and not self.config.exact and self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16, enabled=on)

    def _learn_to_see(self, metrics: dict[str, Tensor], batch: Batch) -> Tensor:
        """An update of V; whether all was finite."""
        return self._learn("encoder", metrics, lambda: self.model.encoder.loss(self._some_rows(batch)))

    def _learn(self, part: str, metrics: dict[str, Tensor], loss: Callable[[], Loss]) -> Tensor:
        """Step one part's optimiser; whether its loss and gradient were finite (if not, its weights stay as they
        are), a scalar on the device."""
        began = time.perf_counter()
        value, found = loss()
        ok, norm = self.parts[part].step(value)
        metrics.update({f"{part}/{k}": v for k, v in found.items()}, **{f"{part}/grad_norm": norm})
        self.seconds[part] += time.perf_counter() - began
        return ok

    def _some_rows(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's observations as one flat set of rows, `encoder_rows` of them drawn at random."""
        flat = {k: v.flatten(0, 1) for k, v in batch.obs.items()}
        total, wanted = batch.reward.numel(), self.config.learn.encoder_rows
        if total <= wanted:
            return flat
        index = torch.randperm(total, device=self.device)[:wanted]
        return {k: v[index] for k, v in flat.items()}

    def _count(self, ok: Tensor | bool) -> None:
        """Count an update. On CUDA whether it was taken is read when the next one is under way: the host never waits
        for what it has just launched."""
        self.updates += 1
        self.taken = ok
        if isinstance(ok, Tensor) and ok.is_cuda:
            self._unread.append(_OnItsWay(ok))
            if len(self._unread) > 1:
                self._read(self._unread.pop(0).read())
        else:
            self._read(bool(ok))

    def settle(self) -> None:
        """Wait for what is not known yet of updates that were made.

        Raises:
            NotFinite: as `update`.
        """
        while self._unread:
            self._read(self._unread.pop(0).read())

    def _read(self, ok: bool) -> None:
        self.skipped += not ok
        self.skipped_in_a_row = 0 if ok else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= PATIENCE:
            raise NotFinite(
                f"loss or gradient was not finite in {PATIENCE} updates in a row: look at the rewards and observations "
                f"that it learns from, or lower the learning rates"
            )

    # -- saving -------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """All that has weights."""
        return {"model": self.model}

    def state_dict(self) -> dict[str, Any]:
        """All that learning goes on from: weights, optimisers, counters."""
        self.settle()
        return {
            "weights": {name: module.state_dict() for name, module in self.modules().items()},
            "optimisers": {name: part.state_dict() for name, part in self.parts.items()},
            "counters": {name: getattr(self, name) for name in self.COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any], weights_only: bool = False) -> None:
        """Take over what `state_dict` gave; `weights_only` to act and dream without learning on."""
        for name, module in self.modules().items():
            module.load_state_dict(state["weights"][name])
        if weights_only:
            return
        for name, part in self.parts.items():
            part.load_state_dict(state["optimisers"][name])
        for name in self.COUNTERS:
            setattr(self, name, state["counters"][name])


class Part:
    """An optimiser that bounds each weight's gradient by the weight's own size (adaptive gradient clipping, Brock et
    al. 2021, arXiv 2102.06171, as in DreamerV3) and refuses steps that are not finite."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, clip: float):
        self.parameters = [p for p in parameters if p.requires_grad]
        # fused: one kernel, which is told by tensors whether to step and at what rate, so that the host need not know
        self.fused = all(p.is_cuda for p in self.parameters)
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            self._rate(rate),
            betas=(0.9, 0.95),
            weight_decay=1e-3,
            fused=self.fused,
            capturable=self.fused,
        )
        self.rate, self.clip = rate, clip
        self.bound: Callable[[list[Tensor], list[Tensor], float], Tensor] = bound

    def compile(self) -> None:
        """Have the bounding of gradients compiled, which is a small kernel for each weight otherwise."""
        self.bound = torch.compile(bound, dynamic=False, fullgraph=True)

    def _rate(self, rate: float) -> Any:
        return torch.tensor(rate, device=self.parameters[0].device) if self.fused else rate

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's, the same whatever device it is on."""
        state = self.optimiser.state_dict()
        return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as an optimiser did, on whatever device that was."""
        here = {"fused": self.fused, "capturable": self.fused}
        groups = [{**group, **here, "lr": self._rate(float(group["lr"]))} for group in state["param_groups"]]
        self.optimiser.load_state_dict({**state, "param_groups": groups})
        for weight, moments in self.optimiser.state.items():
            for key, value in moments.items():
                if value.shape == weight.shape:  # the fused kernel wants them laid out as the weight (channels last)
                    moments[key] = torch.empty_like(weight, requires_grad=False).copy_(value)

    def set_pace(self, pace: float) -> None:
        """Learn at `pace` times the learning rate."""
        for group in self.optimiser.param_groups:
            if self.fused:
                group["lr"].fill_(self.rate * pace)
            else:
                group["lr"] = self.rate * pace

    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Whether loss and gradient were finite, and the gradient's norm, scalars on the device. If not, weights and
        moments stay as they are."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        pairs = [(p, p.grad) for p in self.parameters if p.grad is not None]
        norm = self.bound([p.detach() for p, _ in pairs], [g for _, g in pairs], self.clip)
        ok = torch.isfinite(norm) & torch.isfinite(loss.detach())
        if self.fused:
            setattr(self.optimiser, "found_inf", (~ok).float())  # noqa: B010  (what a GradScaler tells it)
            self.optimiser.step()
        elif ok:
            self.optimiser.step()
        return ok, norm


def bound(weights: list[Tensor], grads: list[Tensor], clip: float) -> Tensor:
    """Make each gradient at most `clip` times as large as its weight; returns the norm of all of them before."""
    sizes = torch._foreach_norm(grads)
    bounds = torch._foreach_clamp_min(torch._foreach_norm(weights), 1e-3)
    torch._foreach_mul_(bounds, clip)
    factors = torch._foreach_div(bounds, torch._foreach_clamp_min(sizes, 1e-8))
    torch._foreach_mul_(grads, torch._foreach_clamp_max(factors, 1.0))
    return torch.stack(sizes).norm()


class _OnItsWay:
    """A boolean scalar on its way from a CUDA device: reading it waits for what was launched before, and no more."""

    def __init__(self, value: Tensor):
        self._copy, self._there = value.to("cpu", non_blocking=True), torch.cuda.Event()
        self._there.record()

    def read(self) -> bool:
        self._there.synchronize()
        return bool(self._copy)


def resolve_device(name: str) -> str:
    """`auto` to cuda where there is one, else cpu.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UserError("device cuda: torch finds no CUDA device here; use --device auto or --device cpu")
    return ("cuda" if found else "cpu") if name == "auto" else name


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from `seed`, on the CPU and on this device; outside, its streams go on as if nothing had been
    drawn. These generators alone are seeded: torch.manual_seed, which looks for all there may be, would be felt in
    every step of an environment."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
