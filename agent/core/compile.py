"""torch.compile where it saves time: M over clips, and the steps of dreams that are captured as CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.model import WorldModel


def compile_clips(dynamics: Dynamics) -> None:
    """Compile M for clips (`Dynamics.forward`): each layer, and the code before and after the layers.

    Single frames are not compiled. Layers that differ only in their weights share compiled code."""
    torch._dynamo.config.recompile_limit = 64  # block sides x clip lengths x with and without gradient
    for layer in dynamics.stack:
        layer.compile(dynamic=False)
    for name in ("before_layers", "after_layers"):
        setattr(dynamics, name, torch.compile(getattr(dynamics, name), dynamic=False))


class CompiledDreams:
    """A `Dreamer`: a world model whose dreamt steps are compiled. This fuses the hundreds of small kernels of a step
    into few. Another batch size is compiled again."""

    def __init__(self, model: WorldModel, backend: str = "inductor"):
        self.model = model
        self._advance = torch.compile(self._one_kind, dynamic=False, fullgraph=True, backend=backend)

    @property
    def reward_continue(self) -> Any:
        return self.model.reward_continue

    def dream_step(
        self, feat: Tensor, state: State, action: Tensor, temperature: float = 1.0, steps: int | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """See `WorldModel.dream_step`."""
        self.model.dreamt += len(action)
        inputs = (feat.contiguous(), state.map(Tensor.contiguous), action.contiguous())
        return self._advance(*inputs, temperature, steps or self.model.steps)

    def _one_kind(
        self, feat: Tensor, state: State, action: Tensor, temperature: float, steps: int
    ) -> tuple[Tensor, Tensor, State]:
        """A step whose outputs have the memory layout of its inputs, so that all steps share compiled code."""
        z, feat, state = self.model.advance(feat, state, action, temperature, steps)
        return z, feat.contiguous(), state.map(Tensor.contiguous)
