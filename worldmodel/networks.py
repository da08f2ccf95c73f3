"""Multi-layer perceptrons with gated hidden layers, parts that training alone needs, and the symmetric logarithm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class GatedLayer(nn.Module):
    """A hidden layer of products, norm(W x) * silu(V x) (a gated linear unit; Shazeer 2020, arXiv 2002.05202).

    What is remembered often matters only in combination with what is seen ("is this the door of that colour?"). A
    product expresses such a combination in one layer.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.value_and_gate = nn.Linear(inputs, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.value_and_gate(x).chunk(2, -1)
        return self.norm(value) * F.silu(gate)


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|) (Hafner et al. 2023, arXiv 2301.04104, eq. 9)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 2, zero: bool = False) -> nn.Sequential:
    """`layers` gated hidden layers and a linear output layer, which `zero` initialises to zero."""
    modules: list[nn.Module] = [GatedLayer(inputs if i == 0 else hidden, hidden) for i in range(layers)]
    out = nn.Linear(hidden, outputs)
    if zero:
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
    return nn.Sequential(*modules, out)


def mark_training_only(owner: nn.Module, part: str, stand_in: str | None = None) -> None:
    """Mark a part of a module that acting and dreaming do without.

    An exported agent lacks it (`owner.training_only` names such parts). Where weights without it are loaded, it takes
    those of the part `stand_in`, or keeps its own.
    """
    owner.training_only = (*getattr(owner, "training_only", ()), part)  # type: ignore[assignment]
    owner.register_load_state_dict_pre_hook(partial(_fill_in, part=part, stand_in=stand_in))


def _fill_in(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any, part: str, stand_in: str | None) -> None:
    for key, value in getattr(owner, part).state_dict().items():
        other = state.get(f"{prefix}{stand_in}.{key}", value) if stand_in else value
        state.setdefault(f"{prefix}{part}.{key}", other)
