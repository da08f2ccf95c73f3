"""Multi-layer perceptrons with gated hidden layers."""

from __future__ import annotations

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


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 2, zero: bool = False) -> nn.Sequential:
    """`layers` gated hidden layers and a linear output layer, which `zero` initialises to zero."""
    modules: list[nn.Module] = [GatedLayer(inputs if i == 0 else hidden, hidden) for i in range(layers)]
    out = nn.Linear(hidden, outputs)
    if zero:
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
    return nn.Sequential(*modules, out)
