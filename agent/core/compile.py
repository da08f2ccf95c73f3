"""torch.compile where it saves time: M over clips, and the steps of dreams that are captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longdream.worldmodel.dynamics import State
from longdream.worldmodel.model import WorldModel


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by torch.compile, for inputs of fixed shapes."""
    return torch.compile(function, dynamic=False)


def compile_clips(model: WorldModel) -> None:
    """Compile what V and M compute over clips: each layer of M, the code before and after the layers, the losses, and
    V where it learns through M.

    Single frames are not compiled. Layers that differ only in their weights share compiled code."""
    torch._dynamo.config.recompile_limit = 64  # block sides x clip lengths x with and without gradient
    for layer in model.dynamics.stack:
        layer.compile(dynamic=False)
    _replace(model.dynamics, "before_layers", "after_layers")
    _replace(model.reward_continue, "loss")
    if model.trains_encoder:
        _replace(model.encoder, "posterior", "reconstruction")
        _replace(model.objective, "losses")


def _replace(part: Any, *names: str) -> None:
    """Replace methods of an object by compiled ones."""
    for name in names:
        setattr(part, name, compiled(getattr(part, name)))


class CompiledDreams:
    """A `Dreamer`: a world model whose dreamt steps are compiled. This fuses the hundreds of small kernels of a step
    into few. Another batch size is compiled again."""

    def __init__(self, model: WorldModel, backend: str = "inductor"):
        self.model = model
        self._advance = torch.compile(self._one_kind, dynamic=False, fullgraph=True, backend=backend)
        self._expect = torch.compile(model.reward_continue.expect, dynamic=False, backend=backend)

    @property
    def reward_continue(self) -> Any:
        return self

    def expect(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """See `RewardContinueHead.expect`."""
        return self._expect(feat, action)

    def dream_step(
        self, feat: Tensor, state: State, action: Tensor, temperature: float | Tensor = 1.0, steps: int | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """See `WorldModel.dream_step`."""
        self.model.dreamt += len(action)
        inputs = (feat.contiguous(), state.map(Tensor.contiguous), action.contiguous())
        return self._advance(*inputs, temperature, steps or self.model.steps)

    def _one_kind(
        self, feat: Tensor, state: State, action: Tensor, temperature: float | Tensor, steps: int
    ) -> tuple[Tensor, Tensor, State]:
        """A step whose outputs have the memory layout of its inputs, so that all steps share compiled code."""
        z, feat, state = self.model.advance(feat, state, action, temperature, steps)
        return z, feat.contiguous(), state.map(Tensor.contiguous)
