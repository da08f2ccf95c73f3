"""The residual stream through the layers of M, modulated by AdaLN (Peebles and Xie 2022, arXiv 2212.09748).

A layer has three branches: mixer, attention, MLP. The input of a branch is the stream's norm, scaled and shifted by the
condition; its output is gated by the condition and added to the stream. On CUDA one kernel per branch adds the previous
branch's output and norms the sum (adaln_triton.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from longdream.worldmodel.kernels import adaln_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None


class Pending(NamedTuple):
    """A branch's output that is not added to the stream yet.

    y: `(B, T, N, W)`. gate: index of its gate in the condition. offset: `(W,)`, the layer's offset to the gate.
    """

    y: Tensor
    gate: int
    offset: Tensor


class ResidualStream(NamedTuple):
    """The residual stream u `(B, T, N, W)` between two branches, and what is still to be added to it."""

    u: Tensor
    pending: Pending | None = None

    def total(self, cond: Tensor) -> Tensor:
        """The stream with the pending output added; cond `(B, T, 1, 9, W)`."""
        if self.pending is None:
            return self.u
        y, gate, offset = self.pending
        return torch.addcmul(self.u, y, cond[..., gate, :] + offset)


class AdaLN:
    """The residual stream within one layer.

    Where the kernels compute clips, a branch's output stays pending until the next branch, possibly of the next layer,
    takes its input. Adding the one and norming for the other is then a single pass over the stream.

    Args:
        stream: at the layer's input.
        cond: `(B, T, 1, 9, W)`, scale, shift and gate of each of the layer's three branches.
        offset: `(9, W)`, the layer's own offset to the condition.
        clip: whether the stream is of a clip rather than of a single frame; frames do not go through the kernels.
    """

    def __init__(self, stream: ResidualStream, cond: Tensor, offset: Tensor, clip: bool = False):
        self.stream = stream
        self.cond = cond
        self.offset = offset
        self.fused = clip and kernels_fit(stream.u)
        self.modulation: tuple[Tensor, ...] = () if self.fused else (cond + offset).unbind(-2)

    def branch_input(self, branch: int) -> Tensor:
        """The modulated norm of the stream, input of branch 0, 1 or 2: `(B, T, N, W)`."""
        first = 3 * branch  # index of the branch's scale; its shift and gate follow
        u, pending = self.stream
        if not self.fused:
            scale = self.modulation[first]
            shift = self.modulation[first + 1]
            return torch.addcmul(shift, F.layer_norm(u, u.shape[-1:]), scale)
        assert kernels is not None
        y, gate, gate_offset = (None, first, self.offset[first]) if pending is None else pending
        offset = torch.cat([gate_offset[None], self.offset[first : first + 2]])
        scale_and_shift = self.cond[..., first : first + 2, :]
        u, h = kernels.adaln(u, y, self.cond[..., gate, :], scale_and_shift, offset, matmul_dtype(u))
        self.stream = ResidualStream(u)
        return h

    def add(self, branch: int, y: Tensor) -> None:
        """Add the branch's output y `(B, T, N, W)` to the stream."""
        gate = 3 * branch + 2
        if self.fused:
            self.stream = ResidualStream(self.stream.u, Pending(y, gate, self.offset[gate]))
        else:
            self.stream = ResidualStream(torch.addcmul(self.stream.u, y, self.modulation[gate]))


def clip_stream(u: Tensor) -> ResidualStream:
    """The residual stream of a clip before the first layer. Kernels take it in the precision of matrix products."""
    return ResidualStream(u.to(matmul_dtype(u)) if kernels_fit(u) else u)


def kernels_fit(u: Tensor) -> bool:
    """Whether the kernels compute clips whose stream is like u."""
    return kernels is not None and kernels.fit(u)


def matmul_dtype(u: Tensor) -> torch.dtype:
    """The dtype in which matrix products take operands like u: autocast's, where it is on."""
    device = u.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else u.dtype
