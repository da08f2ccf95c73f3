"""The agent: V, M and C composed into something that acts, is surprised, and learns."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: the fused operations that torch's own optimisers and clip_grad_norm_ are made of

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from agent.config import Config
from agent.graphs import Graphed
from controller.actor_critic import ActorCritic
from controller.evolution import Evolution
from controller.planner import Planner
from controller.tree import Tree
from controller.types import Controller, Improving, Planning, Replaying
from envs.contract import EnvSpec, Row, UserError
from worldmodel.dream import Clip, Dream, Starts, imagine
from worldmodel.dynamics import State
from worldmodel.model import Surprise, WorldModel, start_weight
from worldmodel.types import Batch, Loss

PATIENCE = 10
"""Updates in a row that may be skipped because a loss or gradient is not finite."""

Upto = Literal["encoder", "model", "controller"]
COUNTERS = ("updates", "skipped", "skipped_in_a_row", "dream_steps")


class NotFinite(RuntimeError):
    """Loss or gradient of some part was not finite too many times in a row."""


class Carry(NamedTuple):
    """What acting carries from row to row for n streams: the last feature `(n, F)`, M's state, the last action `(n,
    A)`."""

    feat: Tensor
    state: State
    action: Tensor


class Agent:
    """Builds V, M and C for an environment, acts with them, and updates them from replayed clips.

    Raises:
        UserError: the configuration does not fit together or does not fit the environment.
    """

    def __init__(self, config: Config, spec: EnvSpec):
        self.config, self.spec = config, spec
        self.device = torch.device(resolve_device(config.device))
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("highest" if config.exact else "high")
        try:
            self.model = WorldModel(
                spec.obs, spec.action.size, config.encoder, config.worldmodel, config.forcing, config.heads
            ).to(self.device)
            kind = controller_class(config.controller.kind)
            controller: Any = kind(config.controller, self.model.feature_size, spec.action.parts, spec.action.size)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.controller: Controller = controller.to(self.device)
        if config.controller.replay_value and not isinstance(self.controller, Replaying):
            kind = config.controller.kind
            raise UserError(f"{kind} learns from dreams alone: set controller.replay_value to 0")
        learn = config.learn
        objective = cast(nn.Module, self.model.objective)
        model_parts = (self.model.dynamics, objective, self.model.consequence)
        self.parts = {
            "encoder": Part(self.model.encoder.parameters(), learn.encoder_rate, learn.clip),
            "model": Part((p for m in model_parts for p in m.parameters()), learn.model_rate, learn.clip),
        }
        if any(p.requires_grad for p in controller.parameters()):
            self.parts["controller"] = Part(controller.parameters(), learn.actor_critic_rate, learn.clip)
        on_cuda, parts = self.device.type == "cuda", (self.controller, self.model.objective)
        self.capturable = on_cuda and all(getattr(part, "capturable", False) for part in parts)
        # a dream is thousands of small kernels, and launching them takes longer than running them
        self._dreams = Graphed(self._dream) if self.capturable else self._dream
        self._follow = Graphed(self.model.follow) if self.capturable else self.model.follow
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.dream_steps = 0
        """Steps dreamt for C to learn from; those of plans are not among them."""
        self.seconds: dict[str, float] = dict.fromkeys(("encoder", "model", "controller"), 0.0)

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
        learn, metrics = self.config.learn, {}
        for part in self.parts.values():
            part.set_pace(pace)
        weight = self._start_weight(batch)
        if learn.curiosity:
            batch.reward = batch.reward + learn.curiosity * batch.surprise
        ok = self._learn("encoder", metrics, lambda: self.model.encoder.loss(self._some_rows(batch)))
        if upto != "encoder":
            seen: list[tuple[Starts, Clip]] = []

            def model_loss() -> Loss:
                loss, starts, clip = self._model_loss(batch, weight)
                seen.append((starts, clip))
                return loss

            ok &= self._learn("model", metrics, model_loss)
            if upto == "controller":
                ok &= self._learn_to_act(metrics, *seen[0])
        self._count(ok)
        return metrics

    def _start_weight(self, batch: Batch) -> Tensor | None:
        config = self.config.controller
        return start_weight(batch, config.decisive, config.horizon) if config.decisive else None

    def _model_loss(self, batch: Batch, weight: Tensor | None) -> tuple[Loss, Starts, Clip]:
        config = self.config.controller
        return self.model.loss(batch, config.starts, weight, config.horizon, self._follow)

    def _count(self, ok: bool) -> None:
        self.updates += 1
        self.skipped += not ok
        self.skipped_in_a_row = 0 if ok else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= PATIENCE:
            raise NotFinite(
                f"loss or gradient was not finite in {PATIENCE} updates in a row: look at the rewards and observations "
                f"of the environment, or lower the learning rates"
            )

    def update_controller(self, rows: dict, pace: float = 1.0) -> dict[str, Tensor]:
        """One update of C alone, in dreams from replayed rows; V and M stay as they are. As `update` otherwise."""
        batch, metrics = Batch.of(rows, self.device), {}
        if part := self.parts.get("controller"):
            part.set_pace(pace)
        with torch.no_grad():
            _, starts, clip = self._model_loss(batch, self._start_weight(batch))
        self._count(self._learn_to_act(metrics, starts, clip))
        return metrics

    def _learn_to_act(self, metrics: dict[str, Tensor], starts: Starts, clip: Clip) -> bool:
        """An update of C in dreams from `starts`, in its own way or by gradient; whether all was finite."""
        ok, dreamt = True, 0
        if isinstance(self.controller, Improving):
            began, before = time.perf_counter(), self.model.dreamt
            found = self.controller.improve(self.model, starts)
            dreamt = self.model.dreamt - before
            metrics.update({f"controller/{key}": value for key, value in found.items()})
            self.seconds["controller"] += time.perf_counter() - began
        elif "controller" in self.parts:
            ok = self._learn("controller", metrics, lambda: self._controller_loss(starts, clip))
            dreamt = len(starts.weight) * self.config.controller.horizon  # a replayed graph counts nothing
        self.controller.after_update()
        self.dream_steps += dreamt
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
        return imagine(self.model, starts, policy, config.horizon, config.temperature)

    def _learn(self, part: str, metrics: dict[str, Tensor], loss: Callable[[], Loss]) -> bool:
        """Step one part's optimiser; whether its loss and gradient were finite (if not, its weights stay as they
        are)."""
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

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that learning goes on from: weights, optimisers, counters."""
        return {
            "weights": {"model": self.model.state_dict(), "controller": self._controller_module().state_dict()},
            "optimisers": {name: part.optimiser.state_dict() for name, part in self.parts.items()},
            "counters": {name: getattr(self, name) for name in COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any], weights_only: bool = False) -> None:
        """Take over what `state_dict` gave; `weights_only` to act and dream without learning on."""
        self.model.load_state_dict(state["weights"]["model"])
        self._controller_module().load_state_dict(state["weights"]["controller"])
        if weights_only:
            return
        for name, part in self.parts.items():
            part.optimiser.load_state_dict(state["optimisers"][name])
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])

    def _controller_module(self) -> nn.Module:
        assert isinstance(self.controller, nn.Module)
        return self.controller


class Part:
    """An optimiser that bounds each weight's gradient by the weight's own size (adaptive gradient clipping, Brock et
    al. 2021, arXiv 2102.06171, as in DreamerV3) and refuses steps that are not finite."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, clip: float):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.95), weight_decay=1e-3)
        self.rate, self.clip = rate, clip

    def set_pace(self, pace: float) -> None:
        """Learn at `pace` times the learning rate."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * pace

    def step(self, loss: Tensor) -> tuple[bool, Tensor]:
        """Whether loss and gradient were finite, and the gradient's norm. If not, weights and moments stay as they
        are."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        pairs = [(p, p.grad) for p in self.parameters if p.grad is not None]
        grads = [g for _, g in pairs]
        sizes = torch._foreach_norm(grads)
        norm = torch.stack(sizes).norm()
        ok = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if ok:
            bounds = torch._foreach_clamp_min(torch._foreach_norm([p.detach() for p, _ in pairs]), 1e-3)
            torch._foreach_mul_(bounds, self.clip)
            factors = torch._foreach_div(bounds, torch._foreach_clamp_min(sizes, 1e-8))
            torch._foreach_mul_(grads, torch._foreach_clamp_max(factors, 1.0))
            self.optimiser.step()
        return ok, norm


def resolve_device(name: str) -> str:
    """`auto` to cuda where there is one, else cpu.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UserError("device cuda: torch finds no CUDA device here; use --device auto or --device cpu")
    return ("cuda" if found else "cpu") if name == "auto" else name


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
    if name in CONTROLLERS:
        return CONTROLLERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"controller.kind = {name}: use {', '.join(CONTROLLERS)} or package.module:Class")
    try:
        found = getattr(import_module(module), attribute)
        if any(base.__module__ == "stable_baselines3.common.base_class" for base in getattr(found, "__mro__", ())):
            from controller.sb3 import StableBaselines  # imported here: it takes a second

            return partial(StableBaselines, algorithm=found)
        return found
    except (ImportError, AttributeError) as error:
        raise ValueError(f"controller.kind = {name}: {error}") from None


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
