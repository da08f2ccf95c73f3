"""The residual stream through the layers of M: each part takes in the stream's modulated norm (AdaLN; Peebles and Xie
2022, arXiv 2212.09748), and what it gives is gated and added."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from longdream.worldmodel.kernels import adaln_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None


class Given(NamedTuple):
    """What a part gave and the stream does not have yet: y `(B, T, N, W)`; where the condition has its gate; and the
    layer's offset to it `(W,)`."""

    y: Tensor
    gate: int
    offset: Tensor


class Flow(NamedTuple):
    """A stream `(B, T, N, W)` between two parts."""

    u: Tensor
    given: Given | None = None

    def end(self, cond: Tensor) -> Tensor:
        """The stream with all that was given; cond `(B, T, 1, 9, W)`."""
        if self.given is None:
            return self.u
        y, gate, offset = self.given
        return torch.addcmul(self.u, y, cond[..., gate, :] + offset)


class Residual:
    """A stream on its way through a layer. Where kernels for CUDA carry clips (norm_triton.py), what a part gave waits
    until the next part takes in, be it the next layer's: the two are one pass over the stream.

    Args:
        flow: the stream. cond: `(B, T, 1, 9, W)`, scale, shift and gate of each of a layer's three parts, to which the
            layer adds its offset `(9, W)`. clip: M sees a clip, not a frame.
    """

    def __init__(self, flow: Flow, cond: Tensor, offset: Tensor, clip: bool = False):
        self.flow, self.cond, self.offset = flow, cond, offset
        self.fused = clip and fused(flow.u)
        self.mods: tuple[Tensor, ...] = () if self.fused else (cond + offset).unbind(-2)

    def into(self, part: int) -> Tensor:
        """What a part takes in."""
        at = 3 * part
        u, given = self.flow
        if not self.fused:
            return torch.addcmul(self.mods[at + 1], F.layer_norm(u, u.shape[-1:]), self.mods[at])
        assert kernels is not None
        y, gate, opened = (None, at, self.offset[at]) if given is None else given
        offset = torch.cat([opened[None], self.offset[at : at + 2]])
        u, h = kernels.join(u, y, self.cond[..., gate, :], self.cond[..., at : at + 2, :], offset, product_dtype(u))
        self.flow = Flow(u)
        return h

    def give(self, part: int, y: Tensor) -> None:
        """What a part gave."""
        gate = 3 * part + 2
        if self.fused:
            self.flow = Flow(self.flow.u, Given(y, gate, self.offset[gate]))
        else:
            self.flow = Flow(torch.addcmul(self.flow.u, y, self.mods[gate]))


def fused(u: Tensor) -> bool:
    """Whether kernels carry a stream like u through clips."""
    return kernels is not None and kernels.fit(u)


def product_dtype(u: Tensor) -> torch.dtype:
    """In which matrix products take their operands where u comes in."""
    kind = u.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else u.dtype
