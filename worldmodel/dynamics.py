"""M, the dynamics: layers of block-wise state-space scan -> frame-local attention -> MLP over the latent tokens of
each frame.

After Long-Context State-Space Video World Models (Po et al. 2025, arXiv 2505.20171): the scan keeps what was seen
long ago at constant cost per frame, the attention over the last k frames keeps detail, and a noise level per frame
lets one network commit clean frames to memory and predict noised ones. Action and level condition every layer through
AdaLN.

State is a value: it goes in and comes out, nothing is remembered here. `commit` is the only call that advances time;
`predict` reads; `forward` is the same computation over a whole clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel.heads import mlp
from longdream.worldmodel.kernels.adaln import Flow, fused, product_dtype
from longdream.worldmodel.kernels.attention import Cache, Sight
from longdream.worldmodel.mixers.base import Layer, Past


@dataclass(frozen=True)
class DynamicsConfig:
    """Size and shape of M."""

    mixer: str = "hybrid"
    """hybrid: scan and frame-local attention. window: frame-local attention alone, so nothing older than it is
    remembered. ssm, ssm+local, causal, or a dotted path `package.module:Class` to a Mixer of your own: see
    worldmodel/mixers/base.py."""
    layers: int = 2
    width: int = 64
    heads: int = 4
    """Heads of both the scan and the attention; width / heads channels each."""
    state_size: int = 16
    """Size of the scan's state per channel."""
    window: int = 4
    """Frames that the attention sees, the present one included."""
    frames_together: int = 1
    """Frames of a chunk, in which attention looks ahead too (5, of a window of 10, in Po et al. 2025). An agent acts
    after every frame and needs 1."""
    attention: Literal["triton", "sdpa", "flex"] = "triton"
    """How attention over clips is computed on CUDA: by kernels of our own; in dense rectangles, as it is elsewhere; or
    by FlexAttention where M learns, compiled for each length of clip. `longdream bench attention` compares them."""
    longest: int = 8192
    """Frames that the attention of `causal` sees. What it remembers grows with the frames seen, up to these."""
    blocks: tuple[int, ...] = (1,)
    """Side of the scan's token blocks, one per layer, repeated as needed; no larger than the token grid."""
    chunk: int = 64
    """Tokens per chunk of the parallel scan, whose cost within a chunk is quadratic; at least a frame of a block."""
    matched: bool = False
    """Give every layer as many parameters as a layer of `hybrid` has at this width, by the width of its MLP: mixers can
    then be compared at one size."""
    keyed: bool = False
    """Memory by key from the first update on: what M is told of a frame (its action or pose) is added to its tokens
    too; reading begins with the keys of writing (c = b in scans, q = k in attention); keys of scans are rectified and
    squared, which keeps more of them apart. Where frames are found again by the pose that they were seen from, M learns
    in hundreds of updates what otherwise takes it thousands (docs/video.md)."""
    change: bool = False
    """Predict the change from the frame before instead of the frame: what hardly changes from frame to frame, like
    positions among an observation's numbers, then need not be copied through every layer."""
    motion: int = 0
    """Width of a gated network that adds to the prediction what the frame before, all its tokens at once, and the
    action say of it; 0: none. Layers learn in thousands of updates what it learns in a hundred: how a view moves with
    an action (docs/results.md, Memory Maze)."""
    see_latents: bool = False
    """Give C and the heads each frame's latents beside what M makes of them, as [z, h] of World Models (arXiv
    1803.10122). With `change` M itself has less reason to keep them in its features."""


class State(NamedTuple):
    """M's memory of B streams, a tuple of tensors.

    ssm: per layer with a mixer its state; of a scan `(B, G, H, S, P)`, one for each of G token blocks. k, v: per layer
    with attention `(B, window - 1, N, H, P)`, the last frames' keys and values (with `causal`, of as many frames as
    there were). last: `(B, N, D)`, the last frame's latents. age: `(B,)`, how many of the keys are valid.
    """

    ssm: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    last: Tensor
    age: Tensor

    def map(self, fn) -> State:
        """Apply fn to every tensor (index rows, repeat, detach, move)."""
        ssm, k, v = (tuple(fn(t) for t in part) for part in (self.ssm, self.k, self.v))
        return State(ssm, k, v, fn(self.last), fn(self.age))

    def reset(self, first: Tensor) -> State:
        """Forget everything where first `(B,)` is true."""

        def clear(t: Tensor) -> Tensor:
            return torch.where(first.view(-1, *[1] * (t.ndim - 1)), torch.zeros((), dtype=t.dtype, device=t.device), t)

        return self.map(clear)

    def without_long_memory(self) -> State:
        """The same state with the mixers' part erased: what attention alone still knows."""
        return self._replace(ssm=tuple(torch.zeros_like(s) for s in self.ssm))

    @classmethod
    def of(cls, pasts: Sequence[Past], last: Tensor) -> State:
        """The layers' parts and the last frame's latents, put together."""
        caches = [past.cache for past in pasts if past.cache is not None]
        age = caches[-1].age if caches else last.new_zeros(len(last), dtype=torch.long)
        ssm = tuple(past.mix for past in pasts if past.mix is not None)
        return cls(ssm, tuple(c.k for c in caches), tuple(c.v for c in caches), last, age)

    def parts(self, layers: Sequence[Layer]) -> list[Past]:
        """The layers' parts of it, bottom to top."""
        mixed, cached = iter(self.ssm), zip(self.k, self.v, strict=True)
        return [
            Past(
                None if layer.mix is None else next(mixed),
                None if layer.attention is None else Cache(*next(cached), self.age),
            )
            for layer in layers
        ]


class Output(NamedTuple):
    """Of `forward`. feat: `(B, T, F)` of the clean stream; pred: `(B, T, N, D)`, of the query stream if there is one,
    else of the clean one; state after the last frame, without gradient; at: states after the asked-for frames, `(B * M,
    ...)`, row by row."""

    feat: Tensor
    pred: Tensor
    state: State
    at: State | None


class Dynamics(nn.Module):
    """M: latents and actions in, features and predicted latents out.

    Args:
        grid: side of the token grid; N = grid * grid tokens per frame.
        channels: D of the latents. actions: A, length of an encoded action.
    """

    def __init__(self, config: DynamicsConfig, grid: int, channels: int, actions: int):
        super().__init__()
        if config.window < config.frames_together or config.longest < config.frames_together:
            raise ValueError(
                f"worldmodel.frames_together = {config.frames_together} is more than worldmodel.window = "
                f"{config.window} or longest = {config.longest}: a frame sees its whole chunk"
            )
        self.config, self.grid, self.channels, self.actions = config, grid, channels, actions
        width = config.width
        self.tokens = grid * grid
        # two layers, not linear: continuous latents need it before the first scan, or memory does not form
        self.embed = nn.Sequential(nn.Linear(channels, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.place = nn.Parameter(torch.randn(self.tokens, width) * 0.02)
        self.action = nn.Linear(actions, width)
        self.level = nn.Linear(2 * LEVEL_FEATURES + 1, width)
        # AdaLN: scale, shift and gate of each layer's three parts from the condition, by one map that all layers
        # share (as in PixArt-alpha, arXiv 2310.00426); a map per layer would cost as much as the layers themselves.
        # Zero at first, so that a layer starts as a plain pre-norm one.
        modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), modulation)
        blocks = [min(config.blocks[i % len(config.blocks)], grid) for i in range(config.layers)]
        self.layers = nn.ModuleList(Layer(config, grid, block) for block in blocks)
        self.norm = nn.LayerNorm(width, bias=False)
        self.out = nn.Linear(width, channels)
        nn.init.zeros_(self.out.bias)
        if config.change:  # at first, none: layers that know nothing yet would only blur the frame before
            nn.init.zeros_(self.out.weight)
        # how much of each channel of the frame before stays: all of it at first
        self.stay = nn.Parameter(torch.ones(channels)) if config.change else None
        frame = self.tokens * channels
        self.motion = mlp(frame + actions, config.motion, frame, zero=True) if config.motion else None
        # a frame's feature: its tokens side by side, pooled to 4 x 4 where the grid is finer
        self.feature_grid = min(grid, 4)
        self.feature_size = self.feature_grid**2 * (width + channels * config.see_latents)
        self.layout = self._layout(self.initial(0))
        self.dimmed, self.pace = True, None

    def heed_noise(self, paces: bool) -> None:
        """For objectives to which noise is more than a lack of signal: it enters M as it is, not dimmed by its level;
        and with `paces`, M is told how long a denoising step is."""
        self.dimmed = False
        self.pace = nn.Linear(2 * LEVEL_FEATURES + 1, self.config.width) if paces else None

    def initial(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state of B streams that have seen nothing."""
        device = device or self.place.device
        pasts = [layer.initial(batch, self.tokens, device) for layer in self.stack]
        return State.of(pasts, torch.zeros(batch, self.tokens, self.channels, device=device))

    @property
    def stack(self) -> list[Layer]:
        """The layers, bottom to top."""
        return cast("list[Layer]", list(self.layers))

    def forward(
        self,
        z: Tensor,
        prev_action: Tensor,
        level: Tensor,
        is_first: Tensor,
        state: State,
        query: tuple[Tensor, Tensor] | None = None,
        at: Tensor | None = None,
        fineness: Tensor | None = None,
    ) -> Output:
        """A whole clip in parallel.

        Args:
            z: `(B, T, N, D)` latents, noised as `level` `(B, T)` says (1 clean, 0 pure noise).
            prev_action: `(B, T, A)`, the action that led to frame t; masked where `is_first` `(B, T)` is true.
            state: before frame 0.
            query: `(z, level)` of a second stream, whose frame t sees the first stream's frames before t and itself:
                `predict` at every frame at once. (With frames_together, chunks in place of frames.)
            at: `(B, M)` frames after which the state is wanted as well, without gradient, to start dreams from.
            fineness: `(B, T)` of denoising steps, from 0, the whole way in one, to 1, which is what None stands for;
                of the second stream, if there is one. Only where the objective uses it (`heed_noise`).

        Raises:
            ValueError: latents, actions or a state of another size, or no whole chunks of frames.
        """
        self._check(state, z, prev_action)
        if z.shape[1] % self.config.frames_together:
            raise ValueError(
                f"a clip of {z.shape[1]} frames is not whole chunks of worldmodel.frames_together = "
                f"{self.config.frames_together}: let its length be a multiple of that"
            )
        if at is not None and at.numel():
            self._one_by_one("a state after any frame")
        u, cond = self.enter(z, prev_action, level, is_first, None if query else fineness)
        uq, cond_q = self.enter(query[0], prev_action, query[1], is_first, fineness) if query else (None, None)
        ends, ats, pasts = [], [], state.parts(self.stack)
        sight = self._sight(is_first, pasts, query is not None)
        flow, flow_q = _flow(u), None if uq is None else _flow(uq)
        for layer, past in zip(self.stack, pasts, strict=True):
            flow, flow_q, end, each = layer(flow, cond, is_first, past, flow_q, cond_q, at, sight)
            ends.append(end)
            ats.append(each)
        known = z * level[..., None, None]  # a noised frame is no ground to build on
        end, starts = State.of(ends, known[:, -1].detach().clone()), None  # a view would keep the clip in memory
        if at is not None:
            rows = torch.arange(len(z), device=z.device)[:, None]
            starts = State.of(ats, known[rows, at].flatten(0, 1).detach())
        last = torch.cat([state.last[:, None], known[:, :-1]], 1)
        if query and self.config.frames_together > 1:  # within a chunk the query stream knows its own frames only
            own = (query[0] * query[1][..., None, None]).roll(1, 1)
            inside = torch.arange(z.shape[1], device=z.device) % self.config.frames_together > 0
            last = torch.where(inside[:, None, None], own, last)
        going_on = ~is_first[..., None]
        last, led = last * going_on[..., None], prev_action * going_on
        feat, pred = self.leave(flow, cond, flow_q, cond_q, z, last, led)
        return Output(feat, pred, end, starts)

    def predict(
        self, state: State, z_noisy: Tensor, prev_action: Tensor, level: Tensor, fineness: Tensor | None = None
    ) -> Tensor:
        """What the next frame's latents are, `(B, N, D)`, from their noised version `(B, N, D)` at `level` `(B,)`,
        the state and the action `(B, A)` that leads there. Reads only. fineness `(B,)`: see `forward`."""
        self._one_by_one("a single frame")
        self._check(state, z_noisy, prev_action)
        fineness = None if fineness is None else fineness[:, None]
        u, cond = self._enter(z_noisy[:, None], prev_action[:, None], level[:, None], None, fineness)
        for layer, past in zip(self.stack, state.parts(self.stack), strict=True):
            u = layer.peek(u, cond, past)
        return self._predicted(self.norm(u)[:, 0], state.last, prev_action)

    def commit(
        self, state: State, z: Tensor, prev_action: Tensor, is_first: Tensor | None, level: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance time by a frame: z `(B, N, D)`, prev_action `(B, A)`, is_first `(B,)` to feat `(B, F)` and the new
        state.

        is_first None, as in dreams: no stream begins anew, and states need not be looked through. level `(B,)` defaults
        to 1, clean; a little less tells M to trust the frame a little less.
        """
        self._one_by_one("a single frame")
        self._check(state, z, prev_action)
        state = state if is_first is None else state.reset(is_first)
        level = torch.ones_like(prev_action[:, 0]) if level is None else level
        first = None if is_first is None else is_first[:, None]
        u, cond = self._enter(z[:, None], prev_action[:, None], level[:, None], first)
        pasts = []
        for layer, past in zip(self.stack, state.parts(self.stack), strict=True):
            u, past = layer.step(u, cond, past)
            pasts.append(past)
        return self._feature(self.norm(u), z[:, None])[:, 0], State.of(pasts, z * level[:, None, None])

    def _sight(self, first: Tensor, pasts: list[Past], query: bool) -> Sight | None:
        """Of all layers' attention, which is alike."""
        for layer, past in zip(self.stack, pasts, strict=True):
            if layer.attention is not None and past.cache is not None:
                return layer.attention.sight(first, past.cache, query)
        return None

    def _one_by_one(self, what: str) -> None:
        if self.config.frames_together > 1:
            raise ValueError(
                f"worldmodel.frames_together = {self.config.frames_together}: M takes in whole chunks of frames, and "
                f"{what} was asked of it, as an agent or its dreams do: set it to 1, or go on by `forward`"
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
        if self._layout(state) != self.layout:
            raise ValueError(
                "a state of another configuration: worldmodel.mixer, layers, width, heads, state_size, window, blocks "
                "and the token grid must be those that it was made with; begin with Dynamics.initial"
            )
        if len(state.last) != len(z):
            raise ValueError(f"a state of {len(state.last)} streams beside latents of {len(z)}: index it by State.map")

    def _layout(self, state: State) -> list[tuple[int, ...]]:
        """Shapes of a stream's state; of a cache that grows, without its length."""
        shapes = [tuple(t.shape[1:]) for t in (*state.ssm, *state.k, *state.v, state.last)]
        return [shape[1:] for shape in shapes] if self.config.mixer == "causal" else shapes

    def enter(
        self, z: Tensor, prev_action: Tensor, level: Tensor, first: Tensor, fineness: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What comes before the layers over a clip; see `_enter`."""
        return self._enter(z, prev_action, level, first, fineness)

    def leave(
        self,
        flow: Flow,
        cond: Tensor,
        flow_q: Flow | None,
        cond_q: Tensor | None,
        z: Tensor,
        last: Tensor,
        action: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What comes behind the layers over a clip: features, and the predictions of the query stream or else of the
        only one. last, action: as for `_predicted`."""
        u = self.norm(flow.end(cond))
        uq = u if flow_q is None or cond_q is None else self.norm(flow_q.end(cond_q))
        return self._feature(u, z), self._predicted(uq, last, action)

    def _predicted(self, u: Tensor, last: Tensor, action: Tensor) -> Tensor:
        """Normed tokens `(..., N, W)`, the frame before `(..., N, D)` and the action since `(..., A)` to predicted
        latents (or logits of them)."""
        pred = self.out(u)
        if self.stay is not None:
            pred = pred + self.stay * last
        if self.motion is not None:
            pred = pred + self.motion(torch.cat([last.flatten(-2), action], -1)).unflatten(-1, last.shape[-2:])
        return pred

    def _enter(
        self, z: Tensor, prev_action: Tensor, level: Tensor, first: Tensor | None, fineness: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token embeddings `(B, T, N, W)` and the condition `(B, T, 1, 9, W)`. The previous action is masked here
        and, for `motion`, in `forward`; first None: no frame begins an episode."""
        action = self.action(prev_action)
        action = action if first is None else action * ~first[..., None]
        told = action + self.level(level_features(level))
        if self.pace is not None:
            told = told + self.pace(level_features(torch.ones_like(level) if fineness is None else fineness))
        cond = self.condition(told).unflatten(-1, (9, -1)).unsqueeze(2)
        u = self.embed(z)
        if self.dimmed:
            # noise enters in proportion to the signal in it: at level 0, where it says nothing, not at all
            clear = level * torch.rsqrt(level.square() + (1 - level).square())
            u = u * clear[..., None, None]
        if self.config.keyed:
            u = u + action[..., None, :]
        return u + self.place, cond

    def _feature(self, u: Tensor, z: Tensor) -> Tensor:
        """`(B, T, N, W)` and latents `(B, T, N, D)` to `(B, T, F)`."""
        if self.config.see_latents:
            u = torch.cat([u, z], -1)
        if self.grid > self.feature_grid:
            maps = u.flatten(0, 1).transpose(1, 2).unflatten(-1, (self.grid, self.grid))
            u = F.adaptive_avg_pool2d(maps, self.feature_grid).flatten(2).transpose(1, 2).unflatten(0, u.shape[:2])
        return u.flatten(2)


def _flow(u: Tensor) -> Flow:
    """The stream that layers carry; by kernels in the precision of their products."""
    return Flow(u.to(product_dtype(u)) if fused(u) else u)


LEVEL_FEATURES = 4


def level_features(level: Tensor) -> Tensor:
    """`(...)` in [0, 1] to `(..., 9)`: the level, and sines and cosines of half a turn up to four turns of it."""
    angle = level[..., None] * (math.pi * 2.0 ** torch.arange(LEVEL_FEATURES, device=level.device))
    return torch.cat([level[..., None], angle.sin(), angle.cos()], -1)
