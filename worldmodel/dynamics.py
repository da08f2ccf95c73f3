"""M, the dynamics: layers of block-wise state-space scan, attention over frames and MLP on the latent tokens of each
frame.

After Long-Context State-Space Video World Models (Po et al. 2025, arXiv 2505.20171). The scan remembers the distant
past at constant cost per frame. The attention over the last k frames preserves detail. Each frame has a noise level, so
that one network commits clean frames to memory and predicts noised ones. Action and noise level condition every layer
through AdaLN.

State is a value: it goes in and comes out, and M itself remembers nothing. `commit` is the only call that advances
time. `predict` only reads the state. `forward` is the same computation over a whole clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.kernels.adaln import ResidualStream, clip_stream
from longdream.worldmodel.kernels.attention import AttentionMask, Cache
from longdream.worldmodel.layer import Layer, LayerState
from longdream.worldmodel.predictor import Predictor

LEVEL_FREQUENCIES = 4
"""Sines and cosines that encode a noise level or a step size, beside the number itself."""


class State(NamedTuple):
    """M's memory of B sequences, a tuple of tensors.

    mixers: the state of each layer's mixer, bottom to top; of a scan `(B, G, H, S, P)`, for G token blocks.
    k, v: the last frames' keys and values of each layer's attention, `(B, held, N, H, P)`. held is the attention's
    reach, or the number of frames so far if the cache grows.
    last: `(B, N, D)`, the last frame's latents. age: `(B,)`, how many of the keys are valid.
    """

    mixers: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    last: Tensor
    age: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """Apply fn to every tensor (index rows, repeat, detach, move)."""
        mixers, k, v = (tuple(fn(t) for t in part) for part in (self.mixers, self.k, self.v))
        return State(mixers, k, v, fn(self.last), fn(self.age))

    def reset(self, first: Tensor) -> State:
        """Forget everything where first `(B,)` is true."""

        def clear(t: Tensor) -> Tensor:
            return torch.where(first.view(-1, *[1] * (t.ndim - 1)), torch.zeros((), dtype=t.dtype, device=t.device), t)

        return self.map(clear)

    def without_long_memory(self) -> State:
        """The same state with the mixers' states erased, which leaves what the attention remembers."""
        return self._replace(mixers=tuple(torch.zeros_like(s) for s in self.mixers))

    def without_short_memory(self) -> State:
        """The same state with the last frames erased that the attention sees, which leaves what the mixers remember.

        The latents of the last frame stay: M predicts what changes from there.
        """
        keys = tuple(torch.zeros_like(k) for k in self.k)
        values = tuple(torch.zeros_like(v) for v in self.v)
        return self._replace(k=keys, v=values, age=torch.zeros_like(self.age))

    @classmethod
    def from_layers(cls, states: Sequence[LayerState], last: Tensor) -> State:
        """M's state from the layers' states, bottom to top, and the last frame's latents."""
        caches = [state.cache for state in states if state.cache is not None]
        age = caches[-1].age if caches else last.new_zeros(last.shape[0], dtype=torch.long)
        mixers = tuple(state.mixer for state in states if state.mixer is not None)
        return cls(mixers, tuple(c.k for c in caches), tuple(c.v for c in caches), last, age)

    def of_layers(self, layers: Sequence[Layer]) -> list[LayerState]:
        """The layers' states, bottom to top; the inverse of `from_layers`."""
        mixers = iter(self.mixers)
        caches = zip(self.k, self.v, strict=True)
        return [
            LayerState(
                None if layer.mixer is None else next(mixers),
                None if layer.attention is None else Cache(*next(caches), self.age),
            )
            for layer in layers
        ]


class Output(NamedTuple):
    """Output of `Dynamics.forward`.

    feat: `(B, T, F)`, features of the clean stream. pred: `(B, T, N, D)`, predictions of the query stream if there is
    one, else of the clean stream. state: after the last frame, without gradient. states_at: after the frames asked for,
    `(B * M, ...)`, row by row.
    """

    feat: Tensor
    pred: Tensor
    state: State
    states_at: State | None


class Dynamics(nn.Module):
    """M: latents and actions in, features and predicted latents out.

    Args:
        grid: side of the token grid; N = grid * grid tokens per frame.
        channels: D of the latents. actions: A, length of an encoded action.

    Raises:
        ValueError: a configuration that does not fit together.
    """

    def __init__(self, config: DynamicsConfig, grid: int, channels: int, actions: int):
        super().__init__()
        if config.window < config.chunk_frames:
            raise ValueError(
                f"worldmodel.chunk_frames = {config.chunk_frames} is more than worldmodel.window = "
                f"{config.window}: a frame sees its whole chunk"
            )
        self.config = config
        self.channels = channels
        self.actions = actions
        width = config.width
        self.tokens = grid * grid
        # two layers, since with a linear embedding of continuous latents the first scan did not learn to remember
        self.embed = nn.Sequential(nn.Linear(channels, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.place = nn.Parameter(torch.randn(self.tokens, width) * 0.02)
        self.action = nn.Linear(actions, width)
        self.level = nn.Linear(2 * LEVEL_FREQUENCIES + 1, width)
        # One map from the condition to scale, shift and gate of each layer's three branches, shared by all layers (as
        # in PixArt-alpha, arXiv 2310.00426): a map per layer would cost as much as the layers themselves. It is zero at
        # first, and a layer starts as a plain pre-norm one.
        modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), modulation)
        blocks = [min(config.blocks[i % len(config.blocks)], grid) for i in range(config.layers)]
        self.layers = nn.ModuleList(Layer(config, grid, block) for block in blocks)
        self.predictor = Predictor(config, grid, channels, actions)
        self.state_shapes = self._shapes(self.initial(0))
        self.step_size_embedding: nn.Linear | None = None

    def condition_on_step_size(self) -> None:
        """Let M know how long a denoising step is, for an objective that trains steps of several lengths.

        Noised latents then enter M as they are, since their noise matters to such an objective.
        """
        self.step_size_embedding = nn.Linear(2 * LEVEL_FREQUENCIES + 1, self.config.width)

    @property
    def feature_size(self) -> int:
        """F, the length of a feature."""
        return self.predictor.feature_size

    @property
    def stack(self) -> list[Layer]:
        """The layers, bottom to top."""
        return cast("list[Layer]", list(self.layers))

    @property
    def grows(self) -> bool:
        """Whether M's state grows with the frames seen."""
        return any(layer.grows for layer in self.stack)

    def initial(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state of B sequences that have seen nothing."""
        device = device or self.place.device
        states = [layer.initial(batch, self.tokens, device) for layer in self.stack]
        return State.from_layers(states, torch.zeros(batch, self.tokens, self.channels, device=device))

    def forward(
        self,
        z: Tensor,
        prev_action: Tensor,
        level: Tensor,
        is_first: Tensor,
        state: State,
        query: tuple[Tensor, Tensor] | None = None,
        at: Tensor | None = None,
        step_size: Tensor | None = None,
    ) -> Output:
        """A whole clip in parallel.

        Args:
            z: `(B, T, N, D)`, latents noised to `level` `(B, T)` (1 clean, 0 pure noise).
            prev_action: `(B, T, A)`, the action that led to frame t; masked where `is_first` `(B, T)` is true.
            state: before frame 0.
            query: `(z, level)` of a query stream. Its frame t sees the clean stream's frames before t and itself, which
                amounts to `predict` at every frame. With chunk_frames > 1, read "chunk" for "frame".
            at: `(B, M)`, frames after which the state is returned as well, without gradient, to start dreams from.
            step_size: `(B, T)`, lengths d of the frames' denoising steps on a logarithmic scale: 0 for the whole way in
                one step (d = 1), 1 for the shortest step. Of the query stream, if there is one. None: 1. Only used
                after `condition_on_step_size`.

        Raises:
            ValueError: latents, actions or a state of the wrong size, or a clip that is not whole chunks of frames.
        """
        self._check(state, z, prev_action)
        if z.shape[1] % self.config.chunk_frames:
            raise ValueError(
                f"a clip of {z.shape[1]} frames is not whole chunks of worldmodel.chunk_frames = "
                f"{self.config.chunk_frames}: let its length be a multiple of that"
            )
        if at is not None and at.numel():
            self._require_single_frames("a state after any frame")
        u, cond = self.before_layers(z, prev_action, level, is_first, None if query else step_size)
        query_u, query_cond = (
            self.before_layers(query[0], prev_action, query[1], is_first, step_size) if query else (None, None)
        )
        layer_states = state.of_layers(self.stack)
        mask = self._attention_mask(is_first, layer_states, query is not None)
        stream = clip_stream(u)
        query_stream = None if query_u is None else clip_stream(query_u)
        ends = []
        layer_states_at = []
        for layer, layer_state in zip(self.stack, layer_states, strict=True):
            stream, query_stream, end, end_at = layer(
                stream, cond, is_first, layer_state, query_stream, query_cond, at, mask
            )
            ends.append(end)
            layer_states_at.append(end_at)
        # scaled by the level, so that predictions rely less on a previous frame that has more noise
        signal = z * level[..., None, None]
        # cloned, since a view would keep the clip in memory
        end_state = State.from_layers(ends, signal[:, -1].detach().clone())
        states_at = None
        if at is not None:
            rows = torch.arange(len(z), device=z.device)[:, None]
            states_at = State.from_layers(layer_states_at, signal[rows, at].flatten(0, 1).detach())
        last = torch.cat([state.last[:, None], signal[:, :-1]], 1)
        if query and self.config.chunk_frames > 1:  # within a chunk the query stream knows its own frames alone
            own = (query[0] * query[1][..., None, None]).roll(1, 1)
            inside = torch.arange(z.shape[1], device=z.device) % self.config.chunk_frames > 0
            last = torch.where(inside[:, None, None], own, last)
        continues = ~is_first[..., None]
        last = last * continues[..., None]
        action = prev_action * continues
        feat, pred = self.after_layers(stream, cond, query_stream, query_cond, z, last, action)
        return Output(feat, pred, end_state, states_at)

    def predict(
        self, state: State, z_noisy: Tensor, prev_action: Tensor, level: Tensor, step_size: Tensor | None = None
    ) -> Tensor:
        """Predict the next frame's latents `(B, N, D)`. The state is only read.

        Args:
            z_noisy: `(B, N, D)`, the frame's latents noised to `level` `(B,)`.
            prev_action: `(B, A)`, the action that leads to the frame. step_size: `(B,)`, see `forward`.
        """
        self._require_single_frames("a single frame")
        self._check(state, z_noisy, prev_action)
        step_size = None if step_size is None else step_size[:, None]
        u, cond = self._embed(z_noisy[:, None], prev_action[:, None], level[:, None], None, step_size)
        for layer, layer_state in zip(self.stack, state.of_layers(self.stack), strict=True):
            u = layer.peek(u, cond, layer_state)
        return self.predictor(self.predictor.norm(u)[:, 0], state.last, prev_action)

    def commit(
        self, state: State, z: Tensor, prev_action: Tensor, is_first: Tensor | None, level: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance time by one frame: its feature `(B, F)` and the new state.

        Args:
            z: `(B, N, D)`. prev_action: `(B, A)`.
            is_first: `(B,)`, where an episode begins; None, as in dreams: nowhere, which saves the reset.
            level: `(B,)`, of the frame; None: 1, clean. A slightly lower level makes M trust the frame slightly less.
        """
        self._require_single_frames("a single frame")
        self._check(state, z, prev_action)
        state = state if is_first is None else state.reset(is_first)
        level = torch.ones_like(prev_action[:, 0]) if level is None else level
        first = None if is_first is None else is_first[:, None]
        u, cond = self._embed(z[:, None], prev_action[:, None], level[:, None], first)
        ends = []
        for layer, layer_state in zip(self.stack, state.of_layers(self.stack), strict=True):
            u, end = layer.step(u, cond, layer_state)
            ends.append(end)
        feat = self.predictor.feature(self.predictor.norm(u), z[:, None])[:, 0]
        return feat, State.from_layers(ends, z * level[:, None, None])

    def before_layers(
        self, z: Tensor, prev_action: Tensor, level: Tensor, first: Tensor, step_size: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The computation before the layers over a clip, which can be compiled apart; see `_embed`."""
        return self._embed(z, prev_action, level, first, step_size)

    def after_layers(
        self,
        stream: ResidualStream,
        cond: Tensor,
        query_stream: ResidualStream | None,
        query_cond: Tensor | None,
        z: Tensor,
        last: Tensor,
        action: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The computation after the layers over a clip, which can be compiled apart.

        Returns:
            the clean stream's features `(B, T, F)`, and the predictions `(B, T, N, D)` of the query stream if there is
            one, else of the clean stream.
        """
        u = self.predictor.norm(stream.total(cond))
        query_u = u
        if query_stream is not None and query_cond is not None:
            query_u = self.predictor.norm(query_stream.total(query_cond))
        return self.predictor.feature(u, z), self.predictor(query_u, last, action)

    def _embed(
        self, z: Tensor, prev_action: Tensor, level: Tensor, first: Tensor | None, step_size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token embeddings `(B, T, N, W)` and the condition `(B, T, 1, 9, W)`.

        The action that precedes an episode is masked; first None: no frame begins an episode.
        """
        action = self.action(prev_action)
        action = action if first is None else action * ~first[..., None]
        inputs = action + self.level(level_features(level))
        if self.step_size_embedding is not None:
            step_size = torch.ones_like(level) if step_size is None else step_size
            inputs = inputs + self.step_size_embedding(level_features(step_size))
        cond = self.condition(inputs).unflatten(-1, (9, -1)).unsqueeze(2)
        u = self.embed(z)
        if self.step_size_embedding is None:
            # scaled by the share of signal in the latents, sqrt(SNR / (1 + SNR)): pure noise does not enter at all
            u = u * (level * torch.rsqrt(level.square() + (1 - level).square()))[..., None, None]
        if self.config.tied_condition_keys:
            u = u + action[..., None, :]
        return u + self.place, cond

    def _attention_mask(self, first: Tensor, states: list[LayerState], query: bool) -> AttentionMask | None:
        """The mask of a clip's attention, the same in all layers."""
        for layer, state in zip(self.stack, states, strict=True):
            if layer.attention is not None and state.cache is not None:
                return layer.attention.mask(first, state.cache, query)
        return None

    def _require_single_frames(self, what: str) -> None:
        if self.config.chunk_frames > 1:
            raise ValueError(
                f"worldmodel.chunk_frames = {self.config.chunk_frames}: M processes whole chunks of frames, and {what} "
                f"was requested, as agents and their dreams do: set it to 1, or use `forward`"
            )

    def _check(self, state: State, z: Tensor, prev_action: Tensor) -> None:
        """Raise ValueError for latents and actions of the wrong size and for a state of another M."""
        if z.shape[-2:] != (self.tokens, self.channels):
            raise ValueError(
                f"latents of shape {tuple(z.shape)}: M was made for {self.tokens} tokens (encoder.grid) of "
                f"{self.channels} channels (encoder.channels) per frame"
            )
        if prev_action.shape != (*z.shape[:-2], self.actions):
            raise ValueError(
                f"actions of shape {tuple(prev_action.shape)} beside latents of shape {tuple(z.shape)}: M was made for "
                f"one of length {self.actions} per frame"
            )
        if self._shapes(state) != self.state_shapes:
            raise ValueError(
                "a state of another configuration: worldmodel.mixer, layers, width, num_heads, state_size, window, "
                "blocks and the token grid must be those it was made with; begin with Dynamics.initial"
            )
        # sizes by shape, not len(): torch.export takes a length for a constant
        if state.last.shape[0] != z.shape[0]:
            raise ValueError(
                f"a state of {len(state.last)} sequences beside latents of {len(z)}: index it by State.map"
            )

    def _shapes(self, state: State) -> list[tuple[int, ...]]:
        """Shapes of a sequence's state, without the dimension that grows if one does."""
        shapes = [tuple(t.shape[1:]) for t in (*state.mixers, *state.k, *state.v, state.last)]
        return [shape[1:] for shape in shapes] if self.grows else shapes


def level_features(level: Tensor) -> Tensor:
    """Numbers `(...)` in [0, 1] to `(..., 9)`: the number, and sines and cosines of pi, 2 pi, 4 pi and 8 pi times
    it."""
    angle = level[..., None] * (math.pi * 2.0 ** torch.arange(LEVEL_FREQUENCIES, device=level.device))
    return torch.cat([level[..., None], angle.sin(), angle.cos()], -1)
