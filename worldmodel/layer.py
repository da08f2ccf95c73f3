"""A layer of M: a mixer that remembers, attention over frames, an MLP."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.kernels.adaln import AdaLN, ResidualStream
from longdream.worldmodel.kernels.attention import AttentionMask, Cache
from longdream.worldmodel.mixers.attention import Attention
from longdream.worldmodel.mixers.base import make_mixer
from longdream.worldmodel.mixers.ssm import ScanMixer

MIXER, ATTENTION, MLP = range(3)
"""Branches of a layer, in their order in the condition."""


class LayerState(NamedTuple):
    """A layer's part of M's state: the mixer's state and the attention's cache, None where the layer has none."""

    mixer: Tensor | None
    cache: Cache | None


class LayerOutput(NamedTuple):
    """Of a clip: both streams, the state after it, and the states `(B * M, ...)` after the frames asked for."""

    stream: ResidualStream
    query_stream: ResidualStream | None
    state: LayerState
    states_at: LayerState


class Layer(nn.Module):
    """Mixer, attention and MLP, each applied to the modulated norm of the residual stream and added to it."""

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        width = config.width
        self.mixer, self.attention = make_mixer(config, grid, block)
        hidden = matched_hidden(config, self) if config.matched else 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.offset = nn.Parameter(torch.tensor([1.0, 0.0, 1.0] * 3)[:, None].repeat(1, width))  # scale, shift, gate

    @property
    def grows(self) -> bool:
        """Whether the layer's state grows with the frames seen."""
        return any(getattr(part, "grows", False) for part in (self.mixer, self.attention))

    def initial(self, batch: int, tokens: int, device: torch.device | str) -> LayerState:
        """The state of B sequences that have seen nothing."""
        mixer = None if self.mixer is None else self.mixer.initial(batch, device)
        return LayerState(mixer, None if self.attention is None else self.attention.initial(batch, tokens, device))

    def forward(
        self,
        stream: ResidualStream,
        cond: Tensor,
        first: Tensor,
        state: LayerState,
        query_stream: ResidualStream | None,
        query_cond: Tensor | None,
        at: Tensor | None,
        mask: AttentionMask | None,
    ) -> LayerOutput:
        """A clip: streams of `(B, T, N, W)`, conditions `(B, T, 1, 9, W)`. See `Dynamics.forward`.

        mask: of the attention over this clip.
        """
        streams = [AdaLN(stream, cond, self.offset, clip=True)]
        if query_stream is not None and query_cond is not None:
            streams.append(AdaLN(query_stream, query_cond, self.offset, clip=True))
        mixer_end = mixer_at = cache_end = cache_at = None
        if self.mixer is not None:
            assert state.mixer is not None
            h, query_h = _branch_inputs(streams, MIXER)
            y, query_y, mixer_end, states_at = self.mixer(h, first, state.mixer, query_h, at)
            mixer_at = None if at is None else states_at
            # detached, since backward would fill a gradient as large as the clip with zeros for it
            mixer_end = mixer_end.detach()
            _add(streams, MIXER, y, query_y)
        if self.attention is not None:
            assert state.cache is not None
            h, query_h = _branch_inputs(streams, ATTENTION)
            y, query_y, cache_end, cache_at = self.attention(h, first, state.cache, query_h, at, mask)
            _add(streams, ATTENTION, y, query_y)
        for adaln in streams:
            adaln.add(MLP, self.mlp(adaln.branch_input(MLP)))
        query_out = streams[1].stream if len(streams) > 1 else None
        return LayerOutput(
            streams[0].stream, query_out, LayerState(mixer_end, cache_end), LayerState(mixer_at, cache_at)
        )

    def step(self, u: Tensor, cond: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """One frame (T = 1) that is remembered: the stream u and the state after it."""
        adaln = AdaLN(ResidualStream(u), cond, self.offset)
        mixer, cache = state
        if self.mixer is not None and mixer is not None:
            y, mixer = self.mixer.step(adaln.branch_input(MIXER), mixer)
            adaln.add(MIXER, y)
        if self.attention is not None and cache is not None:
            y, cache = self.attention.step(adaln.branch_input(ATTENTION), cache)
            adaln.add(ATTENTION, y)
        adaln.add(MLP, self.mlp(adaln.branch_input(MLP)))
        return adaln.stream.u, LayerState(mixer, cache)

    def peek(self, u: Tensor, cond: Tensor, state: LayerState) -> Tensor:
        """One frame (T = 1) that is not remembered: the stream u after the layer."""
        adaln = AdaLN(ResidualStream(u), cond, self.offset)
        if self.mixer is not None and state.mixer is not None:
            adaln.add(MIXER, self.mixer.peek(adaln.branch_input(MIXER), state.mixer))
        if self.attention is not None and state.cache is not None:
            adaln.add(ATTENTION, self.attention.step(adaln.branch_input(ATTENTION), state.cache)[0])
        adaln.add(MLP, self.mlp(adaln.branch_input(MLP)))
        return adaln.stream.u


def _branch_inputs(streams: list[AdaLN], branch: int) -> tuple[Tensor, Tensor | None]:
    """A branch's inputs from the clean and from the query stream, if there is one."""
    h = streams[0].branch_input(branch)
    return h, streams[1].branch_input(branch) if len(streams) > 1 else None


def _add(streams: list[AdaLN], branch: int, y: Tensor, query_y: Tensor | None) -> None:
    streams[0].add(branch, y)
    if query_y is not None:
        streams[1].add(branch, query_y)


def matched_hidden(config: DynamicsConfig, layer: nn.Module) -> int:
    """Width of the MLP with which a layer that already has its mixer and attention gets as many parameters as a layer
    of `hybrid` whose MLP is four times as wide as the stream."""
    with torch.device("meta"):
        hybrid = nn.ModuleList([ScanMixer(config, 1, 1), Attention(config)])
    width = config.width
    left = _parameters(hybrid) + 2 * width * 4 * width + 5 * width - _parameters(layer)
    return max(1, round((left - width) / (2 * width + 1)))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
