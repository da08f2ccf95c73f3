"""What a layer of M is made of: a mixer that remembers, attention over frames, an MLP.

`worldmodel.mixer` says which, and everything else stays equal:

| mixer | remembers by | attention |
|---|---|---|
| `hybrid` | a scan in each of the layer's token blocks | frame-local |
| `ssm` | one scan over the whole frame | none |
| `ssm+local` | one scan over the whole frame | frame-local |
| `causal` | | all frames so far |
| `window` | | frame-local |
| `package.module:Class` | a `Mixer` of your own, in the scan's place | frame-local, if it says so |
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel.kernels.adaln import Flow, Residual
from longdream.worldmodel.kernels.attention import (
    BLOCK,
    Cache,
    Heads,
    Sight,
    Turned,
    attend,
    attend_far,
    attend_flex,
    attend_kernels,
    attend_step,
    cache_after,
    cache_at,
    flex_sight_of,
    kernels,
    phases_of,
    precision,
    push,
    sight_of,
)
from longdream.worldmodel.kernels.scan import Stream, scan, scan_query_step, scan_step
from longdream.worldmodel.types import named

try:
    from longdream.worldmodel.kernels import gated_norm_triton as gate_triton
    from longdream.worldmodel.kernels import qk_norm_rope_triton as heads_triton
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    gate_triton = heads_triton = None

if TYPE_CHECKING:
    from longdream.worldmodel.dynamics import DynamicsConfig

MIXERS = ("hybrid", "ssm", "ssm+local", "causal", "window")


class Mixer(Protocol):
    """What carries memory from frame to frame in a layer. An `nn.Module` built as `Class(config, grid, block)`: M's
    DynamicsConfig, the side of the token grid, and the layer's entry in `blocks`.

    Its state is one tensor `(B, ...)` of floating point, zeros where nothing was seen: M clears rows of it with zeros
    before an episode's first frame in `step`; in the parallel form that is the mixer's own work.
    """

    local: bool
    """Whether frame-local attention follows it in the layer."""

    def initial(self, batch: int, device: torch.device | str) -> Tensor:
        """The state of B streams that have seen nothing."""
        ...

    def __call__(
        self, h: Tensor, first: Tensor, state: Tensor, hq: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """`forward`, a clip in parallel.

        Args:
            h: `(B, T, N, W)`, normed tokens. first: `(B, T)` bool, frames before which the state is zero.
            state: before frame 0.
            hq: `(B, T, N, W)` of the query stream, if there is one: its frame t sees the clean frames before t and
                itself (with frames_together = c: its chunk sees those before the chunk, and itself).
            at: `(B, M)`, frames after which the state is wanted as well, without gradient.

        Returns:
            y and yq `(B, T, N, W)`, the state after the clip, and the states `(B * M, ...)` (anything without `at`).
        """
        ...

    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One frame `(B, 1, N, W)` that is remembered: y and the new state."""
        ...

    def peek(self, h: Tensor, state: Tensor) -> Tensor:
        """One frame that is not: y."""
        ...


class Past(NamedTuple):
    """A layer's part of M's state: the mixer's, and the attention's cache."""

    mix: Tensor | None
    cache: Cache | None


class LayerOut(NamedTuple):
    """Of a clip: both streams, the past after it, and after the frames asked for, `(B * M, ...)`."""

    flow: Flow
    flow_q: Flow | None
    end: Past
    at: Past


class Layer(nn.Module):
    """Mixer, attention, MLP, each behind a modulated norm and added to the residual stream."""

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        width = config.width
        self.mix, local = mixer(config, grid, block)
        self.attention = Attention(config) if local else None
        hidden = matched_hidden(config, self) if config.matched else 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.offset = nn.Parameter(torch.tensor([1.0, 0.0, 1.0] * 3)[:, None].repeat(1, width))  # scale, shift, gate

    def initial(self, batch: int, tokens: int, device: torch.device | str) -> Past:
        """What B streams that have seen nothing remember."""
        mix = None if self.mix is None else self.mix.initial(batch, device)
        return Past(mix, None if self.attention is None else self.attention.initial(batch, tokens, device))

    def forward(
        self,
        flow: Flow,
        cond: Tensor,
        first: Tensor,
        past: Past,
        flow_q: Flow | None,
        cond_q: Tensor | None,
        at: Tensor | None,
        sight: Sight | None,
    ) -> LayerOut:
        """Both streams `(B, T, N, W)`; cond, cond_q `(B, T, 1, 9, W)`; sight: of the attention. See
        Dynamics.forward."""
        streams = [Residual(flow, cond, self.offset, clip=True)]
        if flow_q is not None and cond_q is not None:
            streams.append(Residual(flow_q, cond_q, self.offset, clip=True))
        mix_end, mix_at, cache_end, cache_at = None, None, None, None
        if self.mix is not None:
            assert past.mix is not None
            h, *hq = (stream.into(0) for stream in streams)
            y, yq, mix_end, states = self.mix(h, first, past.mix, hq[0] if hq else None, at)
            mix_at = None if at is None else states
            _give(streams, 0, y, yq)
        if self.attention is not None:
            assert past.cache is not None
            h, *hq = (stream.into(1) for stream in streams)
            y, yq, cache_end, cache_at = self.attention(h, first, past.cache, hq[0] if hq else None, at, sight)
            _give(streams, 1, y, yq)
        for stream in streams:
            stream.give(2, self.mlp(stream.into(2)))
        flow, *flows_q = (stream.flow for stream in streams)
        # a gradient that nobody asks for would cost one as large as the clip, of zeros
        mix_end = None if mix_end is None else mix_end.detach()
        return LayerOut(flow, flows_q[0] if flows_q else None, Past(mix_end, cache_end), Past(mix_at, cache_at))

    def step(self, u: Tensor, cond: Tensor, past: Past) -> tuple[Tensor, Past]:
        """One frame (T = 1) that is remembered."""
        stream, (state, cache) = Residual(Flow(u), cond, self.offset), past
        if self.mix is not None and state is not None:
            y, state = self.mix.step(stream.into(0), state)
            stream.give(0, y)
        if self.attention is not None and cache is not None:
            y, cache = self.attention.step(stream.into(1), cache)
            stream.give(1, y)
        stream.give(2, self.mlp(stream.into(2)))
        return stream.flow.u, Past(state, cache)

    def peek(self, u: Tensor, cond: Tensor, past: Past) -> Tensor:
        """One frame (T = 1) that is not."""
        stream = Residual(Flow(u), cond, self.offset)
        if self.mix is not None and past.mix is not None:
            stream.give(0, self.mix.peek(stream.into(0), past.mix))
        if self.attention is not None and past.cache is not None:
            stream.give(1, self.attention.step(stream.into(1), past.cache)[0])
        stream.give(2, self.mlp(stream.into(2)))
        return stream.flow.u


def _give(streams: list[Residual], part: int, *ys: Tensor | None) -> None:
    for stream, y in zip(streams, ys, strict=False):  # without a query stream there is none of it either
        if y is not None:
            stream.give(part, y)


def mixer(config: DynamicsConfig, grid: int, block: int) -> tuple[Mixer | None, bool]:
    """The mixer of a layer, if it has one, and whether attention follows.

    Raises:
        ValueError: `worldmodel.mixer` is neither a known word nor a class that can be found.
    """
    if config.mixer in ("causal", "window"):
        return None, True
    if config.mixer in ("ssm", "ssm+local"):
        return cast(Mixer, ScanMixer(config, grid, grid)), config.mixer == "ssm+local"
    kind: Any = named("worldmodel.mixer", config.mixer, dict.fromkeys(MIXERS, ScanMixer))
    found = kind(config, grid, block)
    return found, found.local


def matched_hidden(config: DynamicsConfig, layer: nn.Module) -> int:
    """Width of the MLP with which a layer, of which mixer and attention are there, has as many parameters as a layer
    of `hybrid` with its MLP of four times the width."""
    with torch.device("meta"):
        hybrid = nn.ModuleList([ScanMixer(config, 1, 1), Attention(config)])
    width = config.width
    left = _parameters(hybrid) + 2 * width * 4 * width + 5 * width - _parameters(layer)
    return max(1, round((left - width) / (2 * width + 1)))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class ScanMixer(nn.Module):
    """The block-wise scan: the token grid falls into blocks, each of which is scanned through time with a state of
    its own. A `Mixer`."""

    local = True

    def __init__(self, config: DynamicsConfig, grid: int, block: int):
        super().__init__()
        if grid % block:
            raise ValueError(f"worldmodel.blocks: a block side of {block} does not divide the token grid of {grid}")
        width = config.width
        self.heads, self.size, self.chunk = config.heads, config.state_size, max(1, config.chunk // block**2)
        self.block, self.side, self.group = block, grid // block, config.frames_together
        self.keyed = config.keyed
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
            if config.keyed:
                for part in (self.inp.weight, self.inp.bias):
                    _, _, b, c, _, _ = part.split(self.split)
                    c.copy_(b)

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
        out = scan(stream, first, ssm.flatten(0, 1), self.chunk, query, at, self.group, self.skip)
        states_at = h.new_zeros(0)
        if out.at is not None:
            states_at = out.at.unflatten(0, (-1, tubes)).transpose(1, 2).flatten(0, 1)
        y = self._out(out.y, gate)
        yq = None if out.query is None or gate_q is None else self._out(out.query, gate_q)
        return y, yq, out.state.unflatten(0, (-1, tubes)), states_at

    def step(self, h: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor]:
        stream, gate = self._project(h)
        y, state = scan_step(stream, ssm.flatten(0, 1))
        return self._finish(y + self.skip * stream.x, gate), state.unflatten(0, (-1, self.side**2))

    def peek(self, h: Tensor, ssm: Tensor) -> Tensor:
        stream, gate = self._project(h)
        y = scan_query_step(stream, ssm.flatten(0, 1))
        return self._finish(y + self.skip * stream.x, gate)

    def _project(self, h: Tensor) -> tuple[Stream, Tensor]:
        gate, x, b, c, rate, write = self.inp(h).split(self.split, -1)
        # rates are per frame: a block of n tokens decays n times less per token
        exact = torch.promote_types(h.dtype, torch.float32)  # decays multiply up over thousands of frames
        a = -F.softplus(rate.to(exact) + self.rate) / self.block**2
        x = x.unflatten(-1, (self.heads, -1)) * torch.sigmoid(write)[..., None]
        b, c = (v.to(exact) for v in (b, c))
        if self.keyed:
            b, c = F.relu(b).square(), F.relu(c).square()
        # squared keys may be so small that the norm's smallest divisor counts: let it be the same in every precision
        least = torch.finfo(torch.float32).eps
        b, c = ((F.rms_norm(v, (self.size,), eps=least) * self.size**-0.5).to(x.dtype) for v in (b, c))
        return Stream(*(self._to_tubes(v) for v in (x, b, c, a))), gate

    def _out(self, y: Tensor, gate: Tensor) -> Tensor:
        """`_finish` of a clip, by kernels where they fit."""
        if gate_triton is not None and gate_triton.fit(y):
            return self.out(gate_triton.gated(y, gate, self.norm.weight, self.side))
        return self._finish(y, gate)

    def _finish(self, y: Tensor, gate: Tensor) -> Tensor:
        y = self._from_tubes(y).flatten(-2).to(gate.dtype)
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
    """Attention over frames: projections with normed queries and keys, and what it can reach."""

    phases: Tensor

    def __init__(self, config: DynamicsConfig):
        super().__init__()
        width, self.heads, self.chunk = config.width, config.heads, config.frames_together
        self.far, self.path = config.mixer == "causal", config.attention
        if self.path == "flex" and width // self.heads < 16:
            raise ValueError(
                f"worldmodel.attention = flex needs heads of 16 channels, these have {width // self.heads}: lower "
                f"worldmodel.heads or use sdpa"
            )
        self.reach = (config.longest if self.far else config.window) - self.chunk
        # at hand, since in compiled layers they would be computed anew for every number that they turn
        near = 0 if self.far else BLOCK + self.chunk + self.reach
        self.register_buffer("phases", phases_of(torch.arange(near), width // config.heads), persistent=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        if config.keyed:
            with torch.no_grad():
                self.qkv.weight[:width].copy_(self.qkv.weight[width : 2 * width])
        self.q_norm, self.k_norm = (nn.LayerNorm(width // self.heads, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)

    def initial(self, batch: int, tokens: int, device: torch.device | str) -> Cache:
        """An empty cache: room for all that is reached, or none yet where it grows."""
        frames, head = 0 if self.far else self.reach, self.out.in_features // self.heads
        room = torch.zeros(batch, frames, tokens, self.heads, head, device=device)
        return Cache(room, room, torch.zeros(batch, dtype=torch.long, device=device))

    def sight(self, first: Tensor, cache: Cache, query: bool) -> Sight | None:
        """What `forward` over a clip, with a query stream or without, needs where it is not computed in rectangles."""
        if self.path == "triton" and kernels is not None and kernels.fit(cache.v, precision(cache.v)):
            return sight_of(first, cache)
        if self.path == "flex" and first.is_cuda and torch.is_grad_enabled():  # compiled for each length
            return flex_sight_of(first, cache, self.reach, query, self.chunk)
        return None

    def forward(
        self, h: Tensor, first: Tensor, cache: Cache, hq: Tensor | None, at: Tensor | None, sight: Sight | None
    ) -> tuple[Tensor, Tensor | None, Cache, Cache | None]:
        """A clip in parallel, and a query stream beside it if there is one.

        Args:
            h, hq: `(B, T, N, W)`, normed tokens. first, cache: see `attend`. sight: of this clip (`sight`).
            at: `(B, M)`, frames after which the cache is wanted as well.

        Returns:
            y and yq `(B, T, N, W)`; without gradient, the cache after the clip, and after the frames `at`: k, v
            `(B * M, ...)`, age `(B * M,)`.
        """
        qkv, qkv_q = self._project(h), None if hq is None else self._project(hq)
        if sight is not None and sight.clean is None:
            y, yq = self._by_kernels(qkv, cache, sight, qkv_q)
        else:
            clean, query = self._heads(qkv), None if qkv_q is None else self._heads(qkv_q)
            if sight is not None:
                y, yq = attend_flex(clean, cache, sight, query)
            elif self.far:
                y, yq = attend_far(clean, first, cache, self.reach, query, chunk=self.chunk)
            else:
                y, yq = attend(clean, first, cache, query, chunk=self.chunk, phases=self.phases)
        with torch.no_grad():
            frames = h.shape[1]
            needed = qkv if at is not None and at.numel() else qkv[:, max(0, frames - self.reach) :]
            kept, room = self._heads(needed.detach()), Cache(cache.k.detach(), cache.v.detach(), cache.age)
            end, ats = cache_after(kept, first, room, self.reach), None
            if at is not None:
                ats = Cache(*(v.flatten(0, 1) for v in cache_at(kept, first, room, at, self.reach)))
        return self._finish(y, h), None if yq is None else self._finish(yq, h), end, ats

    def step(self, h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One frame `(B, 1, N, W)`: y like it, and the cache after it."""
        heads = self._heads(self._project(h))
        y = attend_step(heads, cache, None if self.far else self.phases)
        return self._finish(y, h), push(cache, heads.k, heads.v, self.reach)

    def _by_kernels(
        self, qkv: Tensor, cache: Cache, sight: Sight, qkv_q: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert heads_triton is not None
        kind, held = precision(qkv), cache.k.shape[1]
        norms, none = (self.q_norm.weight, self.k_norm.weight), cache.k[:, :0]
        clean, query = Turned(*heads_triton.turned(qkv, *norms, cache.k, cache.v, sight.phases, kind)), None
        if qkv_q is not None:
            query = Turned(*heads_triton.turned(qkv_q, *norms, none, none, sight.phases[held:], kind))
        return attend_kernels(clean, sight.segment, self.reach, query, self.chunk)

    def _project(self, h: Tensor) -> Tensor:
        """`(B, T, N, W)` to what queries, keys and values are made of, `(B, T, N, 3, H, P)`."""
        return self.qkv(h).unflatten(-1, (3, self.heads, -1))

    def _heads(self, qkv: Tensor) -> Heads:
        q, k, v = qkv.unbind(-3)
        k = self.k_norm(k)
        return Heads(self.q_norm(q), k, v.to(k.dtype))  # under autocast norms are exact, and what is kept is too

    def _finish(self, y: Tensor, h: Tensor) -> Tensor:
        return self.out(y.flatten(-2).to(h.dtype))
