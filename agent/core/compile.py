"""torch.compile, where it pays: M over clips, and the steps of dreams that are recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longdream.worldmodel.dynamics import Dynamics, State
from longdream.worldmodel.model import WorldModel


def compile_clips(dynamics: Dynamics) -> None:
    """Have M compiled for clips (`Dynamics.forward`), layer by layer, and what comes before and behind them; single
    frames are not. Layers that differ in their weights alone share what is compiled."""
    torch._dynamo.config.recompile_limit = 64  # block sides, times lengths of clips, times with and without gradient
    for layer in dynamics.stack:
        layer.compile(dynamic=False)
    for name in ("enter", "leave"):
        setattr(dynamics, name, torch.compile(getattr(dynamics, name), dynamic=False))


class CompiledDreams:
    """A world model whose dreamt steps are compiled, a `Dreamer`: for dreams of one size, since another is compiled
    anew. Each step is hundreds of small kernels, few of which are left."""

    def __init__(self, model: WorldModel, backend: str = "inductor"):
        self.model = model
        self._advance = torch.compile(self._one_kind, dynamic=False, fullgraph=True, backend=backend)

    @property
    def consequence(self) -> Any:
        return self.model.consequence

    def dream_step(
        self, feat: Tensor, state: State, action: Tensor, temperature: float = 1.0, steps: int | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """See `WorldModel.dream_step`."""
        self.model.dreamt += len(action)
        feat, action, state = feat.contiguous(), action.contiguous(), state.map(Tensor.contiguous)
        return self._advance(feat, state, action, temperature, steps or self.model.steps)

    def _one_kind(
        self, feat: Tensor, state: State, action: Tensor, temperature: float, steps: int
    ) -> tuple[Tensor, Tensor, State]:
        """What comes out lies in memory as what went in: what is compiled for one step is for all."""
        z, feat, state = self.model.advance(feat, state, action, temperature, steps)
        return z, feat.contiguous(), state.map(Tensor.contiguous)
