"""A scan whose keys turn by angles that tokens say and that add up over time: memory that can count its own motion.

Each token says an angle for every pair of key channels. Read and write keys are turned by the sum of all angles so far,
so what is read from the past depends on the sum of the angles in between. Where an action turns or moves the agent by
the same amount each time, what was written elsewhere can be read relative to where the agent is now. These are rotary
embeddings (Su et al. 2021, arXiv 2104.09864) whose angles depend on the input, or complex-valued states, as in Mamba-3
(Lahoti et al. 2026, arXiv 2603.15569).

The state is kept as seen from now: a step turns it back by the step's angles. So it is one tensor, as that of any other
scan, and no sum of angles has to be carried along.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.kernels.gated_norm import to_tubes
from longdream.worldmodel.kernels.scan import ScanOutput, scan_step, turned, turned_back
from longdream.worldmodel.mixers.ssm import Projected, ScanMixer

SLOWEST, FASTEST = 0.01, 2.0
"""Scales of the angles, spaced logarithmically over the pairs of channels: some hardly turn, and remember as in any
scan; others turn by a large part of a circle per frame."""


SUM = 32
"""Tokens whose angles are summed as one part."""


class RotaryScanMixer(ScanMixer):
    """A `ScanMixer` whose keys turn by the angles that the tokens say."""

    scales: Tensor

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__(config, grid, block)
        pairs = config.state_size // 2
        self.angle = nn.Linear(config.width, pairs, bias=False)
        scales = torch.logspace(torch.tensor(SLOWEST).log10(), torch.tensor(FASTEST).log10(), pairs)
        self.register_buffer("scales", scales, persistent=False)

    def _scan(
        self, clean: Projected, query: Projected | None, first: Tensor, state: Tensor, at: Tensor | None
    ) -> ScanOutput:
        angle = self._sums(self._angles(clean.h))
        if query is not None:
            query = _turned_keys(query, self._query_sums(angle, self._angles(query.h)))
        out = super()._scan(_turned_keys(clean, angle), query, first, state, at)
        after = angle[:, :, -1]
        states_at = out.states_at
        if states_at is not None and at is not None:
            rows = torch.arange(len(after), device=after.device)[:, None]
            states_at = turned_back(states_at, after[rows, at].detach())
        return out._replace(state=turned_back(out.state, after[:, -1]), states_at=states_at)

    def _scan_step(self, frame: Projected, state: Tensor) -> tuple[Tensor, Tensor]:
        angle = self._sums(self._angles(frame.h))
        turn = angle[:, -1, -1]
        if angle.shape[2] > 1:  # keys as seen from the frame's last token, to which the state turns
            frame = _turned_keys(frame, angle - turn[:, None, None])
        return scan_step(frame.inputs, state, turn)

    def _scan_peek(self, frame: Projected, state: Tensor) -> Tensor:
        return super()._scan_peek(_turned_keys(frame, self._sums(self._angles(frame.h))), state)

    def _angles(self, h: Tensor) -> Tensor:
        """Of tokens `(B, T, N, W)`, the angles `(B', T, n, S // 2)` of each block's tokens, in radians per frame."""
        exact = torch.promote_types(h.dtype, torch.float32)  # they add up over thousands of frames
        with torch.autocast(h.device.type, enabled=False):
            angles = F.linear(h.to(exact), self.angle.weight.to(exact))
        return to_tubes(angles * (self.scales / self.block**2), self.side)

    @staticmethod
    def _sums(angles: Tensor) -> Tensor:
        """Sums of the angles from the first token on, each token's own included.

        Summed within parts and over parts: torch.compile cannot compile one long sum over time (torch 2.11, CUDA).
        """
        tokens = angles.shape[1] * angles.shape[2]
        if tokens == 1:
            return angles
        parts = F.pad(angles.flatten(1, 2), (0, 0, 0, -tokens % SUM)).unflatten(1, (-1, SUM)).cumsum(2)
        last = parts[:, :, -1]
        before = last.cumsum(1) - last
        return (parts + before[:, :, None]).flatten(1, 2)[:, :tokens].view_as(angles)

    def _query_sums(self, sums: Tensor, angles: Tensor) -> Tensor:
        """Of a query stream: the clean sum before its chunk of frames, and its own angles since."""
        chunks = angles.unflatten(1, (-1, self.chunk_frames))
        own = chunks.flatten(2, 3).cumsum(2).view_as(chunks)
        before = sums[:, self.chunk_frames - 1 :: self.chunk_frames, -1].roll(1, 1)
        before = torch.cat([torch.zeros_like(before[:, :1]), before[:, 1:]], 1)
        return (own + before[:, :, None, None]).view_as(angles)


def _turned_keys(stream: Projected, angle: Tensor) -> Projected:
    inputs = stream.inputs
    return stream._replace(inputs=inputs._replace(b=turned(inputs.b, angle), c=turned(inputs.c, angle)))
