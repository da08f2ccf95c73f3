"""A mixer that remembers by a state-space scan over blocks of tokens (Po et al. 2025, arXiv 2505.20171)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.kernels.gated_norm import gated_norm, gated_norm_reference, to_tubes
from longdream.worldmodel.kernels.scan import ScanInputs, ScanOutput, scan, scan_query_step, scan_step

SCAN_CHUNK = 64
"""Tokens per chunk of the parallel scan, whose cost is quadratic within a chunk; at least one frame of a block."""


class Projected(NamedTuple):
    """Tokens h `(B, T, N, W)`, the scan's inputs that are made of them, and the gate `(B, T, N, W)` of its output."""

    inputs: ScanInputs
    gate: Tensor
    h: Tensor


class ScanMixer(nn.Module):
    """The block-wise scan: the token grid is cut into square blocks, and each is scanned through time with a state of
    its own. A `Mixer`."""

    local = True
    grows = False

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        if grid % block:
            raise ValueError(f"worldmodel.blocks: a block side of {block} does not divide the token grid of {grid}")
        width = config.width
        self.num_heads = config.num_heads
        self.state_size = config.state_size
        self.chunk = max(1, SCAN_CHUNK // block**2)
        self.chunk_frames = config.chunk_frames
        self.block = block
        self.side = grid // block
        self.tied_condition_keys = config.tied_condition_keys
        # gate, x, b, c, decay rate, write gate
        self.split = [width, width, self.state_size, self.state_size, self.num_heads, self.num_heads]
        self.inp = nn.Linear(width, sum(self.split))
        self.skip = nn.Parameter(torch.ones(self.num_heads, 1))
        self.norm = nn.LayerNorm(width, bias=False)
        self.out = nn.Linear(width, width)
        # Memory has to be there at initialisation. Time constants are spaced logarithmically from 4 to 1000 frames
        # across heads and hardly depend on the input at first. With Mamba-2's initialisation, which is short for most
        # heads, a cue was forgotten before any gradient could teach M to keep it.
        tau = torch.logspace(math.log10(4), math.log10(1000), self.num_heads)
        self.rate = nn.Parameter(torch.log(torch.expm1(1 / tau)))
        with torch.no_grad():
            self.inp.weight[-2 * self.num_heads :].mul_(0.1)
            self.inp.bias[-2 * self.num_heads :].zero_()
            if config.tied_condition_keys:
                for part in (self.inp.weight, self.inp.bias):
                    _, _, b, c, _, _ = part.split(self.split)
                    c.copy_(b)

    def initial(self, batch: int, device: torch.device | str) -> Tensor:
        """An empty state `(B, G, H, S, P)`, for G = side * side blocks."""
        head = self.norm.normalized_shape[0] // self.num_heads
        return torch.zeros(batch, self.side**2, self.num_heads, self.state_size, head, device=device)

    def forward(
        self, h: Tensor, first: Tensor, state: Tensor, query_h: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """See `Mixer`."""
        blocks = self.side**2
        clean = self._project(h)
        query = None if query_h is None else self._project(query_h)
        first = first.repeat_interleave(blocks, 0)
        at = None if at is None else at.repeat_interleave(blocks, 0)
        out = self._scan(clean, query, first, state.flatten(0, 1), at)
        states_at = h.new_zeros(0)
        if out.states_at is not None:
            states_at = out.states_at.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(0, 1)
        y = self.out(gated_norm(out.y, clean.gate, self.norm.weight, self.side))
        query_y = None
        if out.query_y is not None and query is not None:
            query_y = self.out(gated_norm(out.query_y, query.gate, self.norm.weight, self.side))
        return y, query_y, out.state.unflatten(0, (-1, blocks)), states_at

    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer`."""
        frame = self._project(h)
        y, state = self._scan_step(frame, state.flatten(0, 1))
        return self._frame_out(y, frame), state.unflatten(0, (-1, self.side**2))

    def peek(self, h: Tensor, state: Tensor) -> Tensor:
        """See `Mixer`."""
        frame = self._project(h)
        return self._frame_out(self._scan_peek(frame, state.flatten(0, 1)), frame)

    def _scan(
        self, clean: Projected, query: Projected | None, first: Tensor, state: Tensor, at: Tensor | None
    ) -> ScanOutput:
        """The scan of a clip; see `scan`."""
        queries = None if query is None else query.inputs
        return scan(clean.inputs, first, state, self.chunk, queries, at, self.chunk_frames, self.skip)

    def _scan_step(self, frame: Projected, state: Tensor) -> tuple[Tensor, Tensor]:
        return scan_step(frame.inputs, state)

    def _scan_peek(self, frame: Projected, state: Tensor) -> Tensor:
        return scan_query_step(frame.inputs, state)

    def _project(self, h: Tensor) -> Projected:
        """What the scan needs of tokens `(B, T, N, W)`."""
        gate, x, b, c, rate, write = self.inp(h).split(self.split, -1)
        exact = torch.promote_types(h.dtype, torch.float32)  # decays multiply over thousands of frames
        # rates are per frame: in a block of n tokens, each token decays the state n times less
        a = -F.softplus(rate.to(exact) + self.rate) / self.block**2
        x = x.unflatten(-1, (self.num_heads, -1)) * torch.sigmoid(write)[..., None]
        b, c = (v.to(exact) for v in (b, c))
        if self.tied_condition_keys:
            b, c = (F.relu(v).square() for v in (b, c))
        # squared keys may be so small that the norm's epsilon matters: it is the same in every precision
        eps = torch.finfo(torch.float32).eps
        b, c = ((F.rms_norm(v, (self.state_size,), eps=eps) * self.state_size**-0.5).to(x.dtype) for v in (b, c))
        return Projected(ScanInputs(*(to_tubes(v, self.side) for v in (x, b, c, a))), gate, h)

    def _frame_out(self, y: Tensor, frame: Projected) -> Tensor:
        """The output `(B, 1, N, W)` of a frame, of which the scan gave y, without D x."""
        y = y + self.skip * frame.inputs.x
        return self.out(gated_norm_reference(y, frame.gate, self.norm.weight, self.side))
