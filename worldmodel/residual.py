"""The residual stream through a layer of M: each part takes in the stream's modulated norm (AdaLN; Peebles and Xie
2022, arXiv 2212.09748), and what it gives is gated and added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from worldmodel import norm_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None


class Residual:
    """A stream `(B, T, N, W)` on its way through a layer. What a part gave waits until the next part takes in, since
    both are one pass over the stream where kernels for CUDA do it (norm_triton.py): with `clip`, where M sees clips.

    Args:
        u: the stream. mods: `(B, T, 1, 9, W)`, scale, shift and gate of each of a layer's three parts.
    """

    def __init__(self, u: Tensor, mods: Tensor, clip: bool = False):
        self.u, self.mods = u, mods.unbind(-2)
        self.fused = clip and kernels is not None and kernels.fit(u)
        self.waiting: tuple[Tensor, Tensor] | None = None

    def into(self, part: int) -> Tensor:
        """What a part takes in."""
        scale, shift, _ = self.mods[3 * part : 3 * part + 3]
        if self.fused:
            assert kernels is not None
            y, gate = self.waiting or (None, None)
            self.u, h = kernels.join(self.u, y, gate, scale, shift, _precision(self.u))
            self.waiting = None
            return h
        u = self.end()
        return torch.addcmul(shift, F.layer_norm(u, u.shape[-1:]), scale)

    def give(self, part: int, y: Tensor) -> None:
        """What a part gave."""
        self.waiting = y, self.mods[3 * part + 2]

    def end(self) -> Tensor:
        """The stream with all that was given."""
        if self.waiting is not None:
            self.u, self.waiting = torch.addcmul(self.u, *self.waiting), None
        return self.u


def _precision(u: Tensor) -> torch.dtype:
    """Of the matrix products to come."""
    kind = u.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else u.dtype
