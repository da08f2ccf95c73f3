"""A mixer that remembers by a gated recurrent unit per token (Cho et al. 2014, arXiv 1406.1078), as RSSMs do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig


class GRUMixer(nn.Module):
    """A GRU through the frames, one for each token's place, with shared weights. A `Mixer`.

    What it computes from step to step is richer than in a scan. It takes the frames one after another, so training on
    long clips is slow. It is there to compare with.
    """

    local = False
    grows = False

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        if config.chunk_frames > 1:
            raise ValueError("worldmodel.mixer = gru: it knows no chunks of frames; set worldmodel.chunk_frames to 1")
        self.tokens = grid**2
        self.inp = nn.Linear(config.width, 3 * config.width)
        self.recurrent = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width)

    def initial(self, batch: int, device: torch.device | str) -> Tensor:
        """An empty state `(B, N, W)`."""
        return torch.zeros(batch, self.tokens, self.out.in_features, device=device)

    def forward(
        self, h: Tensor, first: Tensor, state: Tensor, query_h: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """See `Mixer`."""
        given = self.inp(h)
        befores, states = [], []
        for t in range(h.shape[1]):
            before = torch.where(first[:, t, None, None], torch.zeros((), dtype=state.dtype, device=h.device), state)
            state = self._next(given[:, t], before)
            befores.append(before)
            states.append(state)
        after = torch.stack(states, 1)
        states_at = h.new_zeros(0)
        if at is not None:
            rows = torch.arange(len(h), device=h.device)[:, None]
            states_at = after.detach()[rows, at].flatten(0, 1)
        query_y = None
        if query_h is not None:
            query_y = self._read(self._next(self.inp(query_h), torch.stack(befores, 1)), h)
        return self._read(after, h), query_y, state, states_at

    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer`."""
        state = self._next(self.inp(h)[:, 0], state)
        return self._read(state[:, None], h), state

    def peek(self, h: Tensor, state: Tensor) -> Tensor:
        """See `Mixer`."""
        return self.step(h, state)[0]

    def _read(self, state: Tensor, like: Tensor) -> Tensor:
        return self.out(state.to(like.dtype))

    def _next(self, given: Tensor, state: Tensor) -> Tensor:
        """The state `(..., W)` after tokens, of which given `(..., 3 W)` is the linear map."""
        reset, keep, new = given.chunk(3, -1)
        of_reset, of_keep, of_new = self.recurrent(state.to(given.dtype)).chunk(3, -1)
        keep = torch.sigmoid(keep + of_keep)
        new = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
        return (keep * state + (1 - keep) * new).to(state.dtype)
