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
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.attention import Cache, Heads, attend, attend_step, cache_at, push
from worldmodel.scan import Stream, scan, scan_query_step, scan_step

Mixer = Literal["hybrid", "window"]


@dataclass(frozen=True)
class DynamicsConfig:
    """Size and shape of M."""

    mixer: Mixer = "hybrid"
    """hybrid: scan and frame-local attention. window: frame-local attention alone, so nothing older than it is
    remembered."""
    layers: int = 2
    width: int = 64
    heads: int = 4
    """Heads of both the scan and the attention; width / heads channels each."""
    state_size: int = 16
    """Size of the scan's state per channel."""
    window: int = 4
    """Frames that the attention sees, the present one included."""
    blocks: tuple[int, ...] = (1,)
    """Side of the scan's token blocks, one per layer, repeated as needed; no larger than the token grid."""
    chunk: int = 64
    """Tokens per chunk of the parallel scan, whose cost within a chunk is quadratic; at least a frame of a block."""
    change: bool = False
    """Predict the change from the frame before instead of the frame: what hardly changes from frame to frame, like
    positions among an observation's numbers, then need not be copied through every layer."""
    see_latents: bool = False
    """Give C and the heads each frame's latents beside what M makes of them, as [z, h] of World Models (arXiv
    1803.10122). With `change` M itself has less reason to keep them in its features."""


class State(NamedTuple):
    """M's memory of B streams, a tuple of tensors.

    ssm: per layer `(B, G, H, S, P)`, one scan state for each of G token blocks. k, v: per layer `(B, window - 1, N,
    H, P)`, the last frames' keys and values. last: `(B, N, D)`, the last frame's latents. age: `(B,)`, how many of the
    keys are valid.
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
        """The same state with the scans' part erased: what attention alone still knows."""
        return self._replace(ssm=tuple(torch.zeros_like(s) for s in self.ssm))


class Output(NamedTuple):
    """Of `forward`. feat: `(B, T, F)` of the clean stream; pred: `(B, T, N, D)`, of the query stream if there is one,
    else of the clean one; state after the last frame; at: states after the asked-for frames, `(B * M, ...)`, row by
    row."""

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
        self.config, self.grid, self.channels = config, grid, channels
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
        # how much of each channel of the frame before stays: all of it at first
        self.stay = nn.Parameter(torch.ones(channels)) if config.change else None
        # a frame's feature: its tokens side by side, pooled to 4 x 4 where the grid is finer
        self.feature_grid = min(grid, 4)
        self.feature_size = self.feature_grid**2 * (width + channels * config.see_latents)

    def initial(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state of B streams that have seen nothing."""
        config = self.config
        device = device or self.place.device
        head = config.width // config.heads
        cache = torch.zeros(batch, config.window - 1, self.tokens, config.heads, head, device=device)
        ssm = tuple(layer.mix.initial(batch, device) for layer in self.stack if layer.mix is not None)
        last = torch.zeros(batch, self.tokens, self.channels, device=device)
        age = torch.zeros(batch, dtype=torch.long, device=device)
        return State(ssm, (cache,) * config.layers, (cache,) * config.layers, last, age)

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
    ) -> Output:
        """A whole clip in parallel.

        Args:
            z: `(B, T, N, D)` latents, noised as `level` `(B, T)` says (1 clean, 0 pure noise).
            prev_action: `(B, T, A)`, the action that led to frame t; masked where `is_first` `(B, T)` is true.
            state: before frame 0.
            query: `(z, level)` of a second stream, whose frame t sees the first stream's frames before t and itself:
                `predict` at every frame at once.
            at: `(B, M)` frames after which the state is wanted as well, without gradient, to start dreams from.
        """
        u, cond = self._enter(z, prev_action, level, is_first)
        uq, cond_q = self._enter(query[0], prev_action, query[1], is_first) if query else (None, None)
        ssm, ks, vs, ages = [], [], [], None
        ssm_at, ks_at, vs_at, ages_at = [], [], [], None
        s = 0
        for i, layer in enumerate(self.stack):
            cache = Cache(state.k[i], state.v[i], state.age)
            ssm_in = state.ssm[s] if layer.mix is not None else None
            step = layer(u, cond, is_first, ssm_in, cache, uq, cond_q, at)
            u, uq = step.u, step.uq
            if ssm_in is not None:
                ssm.append(step.ssm)
                ssm_at.append(step.ssm_at)
                s += 1
            ks.append(step.cache.k)
            vs.append(step.cache.v)
            ages = step.cache.age
            if step.cache_at is not None:
                ks_at.append(step.cache_at.k.flatten(0, 1))
                vs_at.append(step.cache_at.v.flatten(0, 1))
                ages_at = step.cache_at.age.flatten()
        assert ages is not None
        known = z * level[..., None, None]  # a noised frame is no ground to build on
        end = State(tuple(ssm), tuple(ks), tuple(vs), known[:, -1], ages)
        starts = None
        if at is not None and ages_at is not None:
            rows = torch.arange(len(z), device=z.device)[:, None]
            last_at = known[rows, at].flatten(0, 1).detach()
            starts = State(tuple(ssm_at), tuple(ks_at), tuple(vs_at), last_at, ages_at)
        last = torch.cat([state.last[:, None], known[:, :-1]], 1) * ~is_first[..., None, None]
        u = self.norm(u)
        return Output(self._feature(u, z), self._leave(u if uq is None else self.norm(uq), last), end, starts)

    def predict(self, state: State, z_noisy: Tensor, prev_action: Tensor, level: Tensor) -> Tensor:
        """What the next frame's latents are, `(B, N, D)`, from their noised version `(B, N, D)` at `level` `(B,)`,
        the state and the action `(B, A)` that leads there. Reads only."""
        first = torch.zeros_like(level, dtype=torch.bool)[:, None]
        u, cond = self._enter(z_noisy[:, None], prev_action[:, None], level[:, None], first)
        s = 0
        for i, layer in enumerate(self.stack):
            ssm = state.ssm[s] if layer.mix is not None else None
            u = layer.peek(u, cond, ssm, Cache(state.k[i], state.v[i], state.age))
            s += layer.mix is not None
        return self._leave(self.norm(u)[:, 0], state.last)

    def commit(
        self, state: State, z: Tensor, prev_action: Tensor, is_first: Tensor, level: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance time by a frame: z `(B, N, D)`, prev_action `(B, A)`, is_first `(B,)` to feat `(B, F)` and the new
        state.

        level `(B,)` defaults to 1, clean; a little less tells M to trust the frame a little less.
        """
        state = state.reset(is_first)
        level = torch.ones_like(prev_action[:, 0]) if level is None else level
        u, cond = self._enter(z[:, None], prev_action[:, None], level[:, None], is_first[:, None])
        ssm, ks, vs, age = [], [], [], state.age
        for i, layer in enumerate(self.stack):
            before = state.ssm[len(ssm)] if layer.mix is not None else None
            u, after, cache = layer.step(u, cond, before, Cache(state.k[i], state.v[i], state.age))
            if after is not None:
                ssm.append(after)
            ks.append(cache.k)
            vs.append(cache.v)
            age = cache.age
        last = z * level[:, None, None]
        return self._feature(self.norm(u), z[:, None])[:, 0], State(tuple(ssm), tuple(ks), tuple(vs), last, age)

    def _leave(self, u: Tensor, last: Tensor) -> Tensor:
        """Normed tokens `(..., N, W)` and the frame before `(..., N, D)` to predicted latents (or logits of them)."""
        return self.out(u) if self.stay is None else self.out(u) + self.stay * last

    def _enter(self, z: Tensor, prev_action: Tensor, level: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings `(B, T, N, W)` and the condition `(B, T, 1, 9, W)`. The previous action is masked here and
        nowhere else."""
        action = self.action(prev_action) * ~first[..., None]
        cond = self.condition(action + self.level(level_features(level)))
        # noise enters in proportion to the signal in it: at level 0, where it says nothing, not at all
        clear = level * torch.rsqrt(level.square() + (1 - level).square())
        return self.embed(z) * clear[..., None, None] + self.place, cond.unflatten(-1, (9, -1)).unsqueeze(2)

    def _feature(self, u: Tensor, z: Tensor) -> Tensor:
        """`(B, T, N, W)` and latents `(B, T, N, D)` to `(B, T, F)`."""
        if self.config.see_latents:
            u = torch.cat([u, z], -1)
        if self.grid > self.feature_grid:
            maps = u.flatten(0, 1).transpose(1, 2).unflatten(-1, (self.grid, self.grid))
            u = F.adaptive_avg_pool2d(maps, self.feature_grid).flatten(2).transpose(1, 2).unflatten(0, u.shape[:2])
        return u.flatten(2)


class LayerOut(NamedTuple):
    u: Tensor
    uq: Tensor | None
    ssm: Tensor
    cache: Cache
    ssm_at: Tensor
    cache_at: Cache | None


class Layer(nn.Module):
    """Scan, attention, MLP, each behind a modulated norm and added to the residual stream."""

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        width = config.width
        self.mix = ScanMixer(config, grid, block) if config.mixer == "hybrid" else None
        self.attention = Attention(width, config.heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.offset = nn.Parameter(torch.tensor([1.0, 0.0, 1.0] * 3)[:, None].repeat(1, width))  # scale, shift, gate

    def forward(
        self,
        u: Tensor,
        cond: Tensor,
        first: Tensor,
        ssm: Tensor | None,
        cache: Cache,
        uq: Tensor | None,
        cond_q: Tensor | None,
        at: Tensor | None,
    ) -> LayerOut:
        """u, uq `(B, T, N, W)`; cond, cond_q `(B, T, 1, 9, W)`. See Dynamics.forward."""
        mods = self._mods(cond)
        mods_q = None if cond_q is None else self._mods(cond_q)
        ssm_out = ssm_at = u.new_zeros(0)
        if self.mix is not None:
            assert ssm is not None
            hq = None if uq is None or mods_q is None else self._in(uq, mods_q, 0)
            y, yq, ssm_out, ssm_at = self.mix(self._in(u, mods, 0), first, ssm, hq, at)
            u = self._add(u, y, mods, 0)
            uq = uq if mods_q is None or uq is None else self._add(uq, yq, mods_q, 0)
        heads = self.attention.heads_of(self._in(u, mods, 1))
        heads_q = None if uq is None or mods_q is None else self.attention.heads_of(self._in(uq, mods_q, 1))
        y, yq = attend(heads, first, cache, heads_q)
        end = torch.full_like(first[:, :1], first.shape[1] - 1, dtype=torch.long)
        last = cache_at(heads, first, cache, end)
        last = Cache(last.k[:, 0], last.v[:, 0], last.age[:, 0])
        caches = None if at is None else cache_at(Heads(*(v.detach() for v in heads)), first, cache, at)
        u = self._add(u, self.attention.out(y.flatten(-2)), mods, 1)
        u = self._add(u, self.mlp(self._in(u, mods, 2)), mods, 2)
        if uq is not None and mods_q is not None and yq is not None:
            uq = self._add(uq, self.attention.out(yq.flatten(-2)), mods_q, 1)
            uq = self._add(uq, self.mlp(self._in(uq, mods_q, 2)), mods_q, 2)
        return LayerOut(u, uq, ssm_out, last, ssm_at, caches)

    def step(self, u: Tensor, cond: Tensor, ssm: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor | None, Cache]:
        """One frame (T = 1) that is remembered."""
        mods = self._mods(cond)
        if self.mix is not None and ssm is not None:
            y, ssm = self.mix.step(self._in(u, mods, 0), ssm)
            u = self._add(u, y, mods, 0)
        heads = self.attention.heads_of(self._in(u, mods, 1))
        u = self._add(u, self.attention.out(attend_step(heads, cache).flatten(-2)), mods, 1)
        return self._add(u, self.mlp(self._in(u, mods, 2)), mods, 2), ssm, push(cache, heads.k, heads.v)

    def peek(self, u: Tensor, cond: Tensor, ssm: Tensor | None, cache: Cache) -> Tensor:
        """One frame (T = 1) that is not."""
        mods = self._mods(cond)
        if self.mix is not None and ssm is not None:
            u = self._add(u, self.mix.peek(self._in(u, mods, 0), ssm), mods, 0)
        y = attend_step(self.attention.heads_of(self._in(u, mods, 1)), cache)
        u = self._add(u, self.attention.out(y.flatten(-2)), mods, 1)
        return self._add(u, self.mlp(self._in(u, mods, 2)), mods, 2)

    def _mods(self, cond: Tensor) -> tuple[Tensor, ...]:
        """Scale, shift and gate of the three parts, nine times `(B, T, 1, W)`."""
        return (cond + self.offset).unbind(-2)

    def _in(self, u: Tensor, mods: tuple[Tensor, ...], part: int) -> Tensor:
        return torch.addcmul(mods[3 * part + 1], self.norm(u), mods[3 * part])

    def _add(self, u: Tensor, y: Tensor, mods: tuple[Tensor, ...], part: int) -> Tensor:
        return torch.addcmul(u, y, mods[3 * part + 2])


class ScanMixer(nn.Module):
    """The block-wise scan: the token grid falls into blocks, each of which is scanned through time with a state of
    its own."""

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        if grid % block:
            raise ValueError(f"worldmodel.blocks: a block side of {block} does not divide the token grid of {grid}")
        width = config.width
        self.heads, self.size, self.chunk = config.heads, config.state_size, max(1, config.chunk // block**2)
        self.block, self.side = block, grid // block
        self.split = [width, width, self.size, self.size, self.heads, self.heads]
        self.inp = nn.Linear(width, sum(self.split))
        self.skip = nn.Parameter(torch.ones(self.heads, 1))
        self.norm = nn.LayerNorm(width, bias=False)
        self.out = nn.Linear(width, width)
        # Memory is an initialisation: time constants log-spaced over 4 to 1000 frames across heads, and not
        # input-dependent at first; Mamba-2's own, short for most heads, left the cue forgotten before any gradient
        # could ask for it.
        tau = torch.logspace(math.log10(4), math.log10(1000), self.heads)
        self.rate = nn.Parameter(torch.log(torch.expm1(1 / tau)))
        with torch.no_grad():
            self.inp.weight[-2 * self.heads :].mul_(0.1)
            self.inp.bias[-2 * self.heads :].zero_()

    def initial(self, batch: int, device: torch.device | str) -> Tensor:
        """An empty state `(B, G, H, S, P)`."""
        head = self.norm.normalized_shape[0] // self.heads
        return torch.zeros(batch, self.side**2, self.heads, self.size, head, device=device)

    def forward(
        self, h: Tensor, first: Tensor, ssm: Tensor, hq: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """h, hq `(B, T, N, W)` to their outputs, the state after the clip and the states after the frames `at`, `(B *
        M, ...)`."""
        tubes = self.side**2
        stream, gate = self._project(h)
        query, gate_q = (None, None) if hq is None else self._project(hq)
        first = first.repeat_interleave(tubes, 0)
        at = None if at is None else at.repeat_interleave(tubes, 0)
        out = scan(stream, first, ssm.flatten(0, 1), self.chunk, query, at)
        states_at = h.new_zeros(0)
        if out.at is not None:
            states_at = out.at.unflatten(0, (-1, tubes)).transpose(1, 2).flatten(0, 1)
        y = self._finish(out.y, stream, gate)
        yq = None if query is None or out.query is None or gate_q is None else self._finish(out.query, query, gate_q)
        return y, yq, out.state.unflatten(0, (-1, tubes)), states_at

    def step(self, h: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor]:
        stream, gate = self._project(h)
        y, state = scan_step(stream, ssm.flatten(0, 1))
        return self._finish(y, stream, gate), state.unflatten(0, (-1, self.side**2))

    def peek(self, h: Tensor, ssm: Tensor) -> Tensor:
        stream, gate = self._project(h)
        return self._finish(scan_query_step(stream, ssm.flatten(0, 1)), stream, gate)

    def _project(self, h: Tensor) -> tuple[Stream, Tensor]:
        gate, x, b, c, rate, write = self.inp(h).split(self.split, -1)
        # rates are per frame: a block of n tokens decays n times less per token
        exact = torch.promote_types(h.dtype, torch.float32)  # the state sums over thousands of frames
        a = -F.softplus(rate.to(exact) + self.rate) / self.block**2
        x = (x.unflatten(-1, (self.heads, -1)) * torch.sigmoid(write)[..., None]).to(exact)
        b, c = (F.rms_norm(v.to(exact), (self.size,)) * self.size**-0.5 for v in (b, c))
        return Stream(*(self._to_tubes(v) for v in (x, b, c, a))), gate

    def _finish(self, y: Tensor, stream: Stream, gate: Tensor) -> Tensor:
        y = self._from_tubes(y + self.skip * stream.x).flatten(-2).to(gate.dtype)
        return self.out(self.norm(y) * F.silu(gate))

    def _to_tubes(self, v: Tensor) -> Tensor:
        """`(B, T, N, ...)` to `(B * G, T, n, ...)`: one row per block, raster order inside it."""
        if self.side == 1:
            return v
        v = v.unflatten(2, (self.side, self.block, self.side, self.block))
        return v.movedim((2, 4), (1, 2)).flatten(0, 2).flatten(2, 3)

    def _from_tubes(self, v: Tensor) -> Tensor:
        if self.side == 1:
            return v
        v = v.unflatten(2, (self.block, self.block)).unflatten(0, (-1, self.side, self.side))
        return v.movedim((1, 2), (2, 4)).flatten(2, 5)


class Attention(nn.Module):
    """Projections of frame-local attention, with normed queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)

    def heads_of(self, h: Tensor) -> Heads:
        """`(B, T, N, W)` to queries, keys, values `(B, T, N, H, P)`."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return Heads(self.q_norm(q), self.k_norm(k), v)


LEVEL_FEATURES = 4


def level_features(level: Tensor) -> Tensor:
    """`(...)` in [0, 1] to `(..., 9)`: the level, and sines and cosines of half a turn up to four turns of it."""
    angle = level[..., None] * (math.pi * 2.0 ** torch.arange(LEVEL_FEATURES, device=level.device))
    return torch.cat([level[..., None], angle.sin(), angle.cos()], -1)
