"""The state-space scan on CUDA as Triton kernels, with a backward pass of their own: the same sums as `scan_chunked`.

The frames' tokens are one sequence of length L, cut into K chunks of `CHUNK` tokens whatever the number of tokens per
frame (Dao and Gu 2024, arXiv 2405.21060, section 6). For head h and chunk k, let A_i be the log decay from the chunk's
start through token i, S the state before the chunk, and x, b, c the rows of the chunk's tokens:

    y_i = sum over j <= i of exp(A_i - A_j) (c_i . b_j) x_j  +  exp(A_i) c_i S  +  D x_i
    S of the next chunk = exp(A_end) S + sum over j of exp(A_end - A_j) b_j^T x_j

Each exponential is zero if an episode begins between its two ends. Forward, `_carry_kernel` carries the state from
chunk to chunk and stores the state before each, and `_output_kernel` computes y of all chunks at once. Backward,
`_carry_kernel` runs from the last chunk to the first, with c in place of b and the gradient of y in place of x, which
yields the gradient of the state after each chunk. Then `_columns_kernel` computes the gradients of what tokens wrote
(x, b) and `_rows_kernel` those of what they read (c), and of the decays. A program loops over the heads of its chunk,
so that
the gradients of b and c, which heads share, are sums in a fixed order: the same inputs give the same bits.

Matrix products take operands in the inputs' precision and accumulate in float32. For float32 operands they use TF32 or,
with `torch.set_float32_matmul_precision("highest")`, three TF32 products each, which keep about 22 bits of 24. Decays,
sums over time and the carried state are float32.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton comes with CUDA builds of torch alone.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longdream.worldmodel.kernels.common import DTYPES, load, on_tensor_cores, padded, store, without_wgmma

CHUNK = 64
"""Tokens of a chunk."""
HEAD = 64
"""Channels of a head that a program handles at once, at most."""
TILE = 32
"""Channels of a head whose state one program carries, at most. Fewer mean more programs, each of which reads all
keys."""
PROGRAMS = 512
MIN_CHUNKS = 8
MIN_GROUPS = 4
"""Few long sequences would leave most of a GPU idle. Their chunks are therefore carried in groups, so many that there
are about PROGRAMS programs with at least MIN_CHUNKS chunks each. A group is passed over twice, which only pays off from
MIN_GROUPS groups on."""
SETTINGS = {name: {"num_warps": 4, "num_stages": 1} for name in ("carry", "output", "columns", "rows")}
"""Compiler options of each kernel, simple on purpose: with more warps or stages, Triton 3.4 to 3.7 has miscompiled such
kernels on Hopper (github.com/fla-org/flash-linear-attention, issues 640 and 984). See `without_wgmma` too."""
MAX_SIZE = 128
"""Largest supported number of channels per head, and of the state size."""


def fit(x: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether the kernels support these inputs of a scan."""
    sizes = max(x.shape[-1], b.shape[-1]) <= MAX_SIZE
    return on_tensor_cores(x) and sizes and x.dtype in DTYPES and x.dtype == b.dtype == c.dtype


def scan_kernels(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
    first: Tensor,
    state: Tensor,
    skip: Tensor | None = None,
    exact_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scan; differentiable in x, b, c, a, the state and skip.

    Args:
        x: `(B, T, n, H, P)`. b, c: `(B, T, n, S)`, of the same dtype. a: `(B, T, n, H)` log decay <= 0.
        first: `(B, T)` bool, frames before which the state is zero.
        state: `(B, H, S, P)` float32, before frame 0.
        skip: `(H, 1)` float32, D of each head; None for 0.
        exact_states: return the states before chunks in float32, not in the dtype of x.

    Returns:
        y like x, and the state `(B, H, S, P)` float32 after the last frame. Without gradient: the states before chunks
        `(B, K, H, S, P)`; log decays from the chunk's start through each token, `(B, H, K * CHUNK)` float32; the number
        of episodes that began in the chunk up to each token, inclusive, `(B, K * CHUNK)` int32.
    """
    return _scan(x, b, c, a, first, state, skip, exact_states)


@triton.jit
def _prepare_kernel(
    a, first, cum, episode, frames, tokens, length, chunks, heads, CHUNK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """For a chunk: log decays from its start, and episodes begun in it. Padding after the last token does not change
    the state."""
    k = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i = tl.arange(0, CHUNK)
    h = tl.arange(0, HEADS)
    left = length - k * CHUNK
    position = k * CHUNK + i
    decay = load(a + (row * length + k * CHUNK) * heads, i, h, heads, left, heads).to(tl.float32)
    to = cum + (row * heads * chunks + k) * CHUNK + i[:, None] + h[None, :] * chunks * CHUNK
    tl.store(to, tl.cumsum(decay, 0), mask=(h < heads)[None, :] & (i >= 0)[:, None])
    begins = (i < left) & (position % tokens == 0)
    starts_episode = tl.load(first + row * frames + position // tokens, mask=begins, other=0).to(tl.int32)
    tl.store(episode + (row * chunks + k) * CHUNK + i, tl.cumsum(starts_episode, 0))


@triton.jit
def _carry_kernel(
    value, key, cum, episode, begin, states, end, group_decay, length, chunks, heads, groups, each, P: tl.constexpr,
    S: tl.constexpr, REVERSE: tl.constexpr, ADDED: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state of some channels of a head through a group of `each` chunks (the last group may have fewer).

    Starting from `begin` `(B, H, groups, S, P)`, store the state before each chunk to `states` and the state after all
    groups to `end` `(B, H, S, P)`. If ADDED: store what each group adds to a zero state to `end` `(B, H, groups, S,
    P)`, and the decay of a state over the group to `group_decay` `(B, H, groups)`.

    In REVERSE it carries the gradient of the state from after the last chunk to before the first, and stores the
    gradient after each chunk; `value` is then the gradient of y, and `key` is c.
    """
    g = tl.program_id(0) % groups
    h = tl.program_id(0) // groups % heads
    row = (tl.program_id(0) // groups // heads).to(tl.int64)
    i = tl.arange(0, CHUNK)
    s = tl.arange(0, SIZE)
    p = tl.program_id(1) * TILE + tl.arange(0, TILE)
    head_row = row * heads + h
    group_row = head_row * groups + g
    if ADDED:
        state = tl.zeros((SIZE, TILE), tl.float32)
    else:
        state = load(begin + group_row * S * P, s, p, P, S, P)
    first_chunk = g * each
    end_chunk = tl.minimum(g * each + each, chunks)
    total_decay = 0.0
    ended = 0
    for step in range(end_chunk - first_chunk):
        k = end_chunk - 1 - step if REVERSE else first_chunk + step
        left = length - k * CHUNK
        token = row * length + k * CHUNK
        if not ADDED:
            store(states + ((row * chunks + k) * heads + h) * S * P, s, p, P, S, P, state)
        sums = cum + (head_row * chunks + k) * CHUNK
        episode_at = episode + (row * chunks + k) * CHUNK
        decay = tl.load(sums + i)
        total = tl.load(sums + CHUNK - 1)
        segment = tl.load(episode_at + i)
        episodes = tl.load(episode_at + CHUNK - 1)
        if REVERSE:  # from the chunk's start to the token, if both are of one episode
            weight = tl.exp(tl.where(segment == 0, decay, float("-inf")))
        else:  # from the token to the chunk's end, if both are of one episode
            weight = tl.exp(tl.where(segment == episodes, total - decay, float("-inf")))
        values = load(value + (token * heads + h) * P, i, p, heads * P, left, P)
        keys_at = key + token * S + i[None, :] * S + s[:, None]
        keys = tl.load(keys_at, mask=(i < left)[None, :] & (s < S)[:, None], other=0.0)
        state = tl.where(episodes == 0, tl.exp(total) * state, 0.0)
        state += tl.dot(keys, (weight[:, None] * values).to(keys.dtype), input_precision=PRECISION)
        total_decay += total
        ended += episodes
    if ADDED:
        store(end + group_row * S * P, s, p, P, S, P, state)
        tl.store(group_decay + group_row, tl.where(ended == 0, tl.exp(total_decay), 0.0))
    elif g == (0 if REVERSE else groups - 1):
        store(end + head_row * S * P, s, p, P, S, P, state)


@triton.jit
def _join_kernel(
    decay, added_states, begin, group_states, groups, P: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """For some channels of a head, the state before each group, `group_states`, from what each group adds,
    `added_states`, and the decay over each, `decay` `(B, H, groups)`."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SIZE)
    p = tl.program_id(1) * TILE + tl.arange(0, TILE)
    state = load(begin + row * S * P, s, p, P, S, P)
    for step in range(groups):
        g = row * groups + (groups - 1 - step if REVERSE else step)
        store(group_states + g * S * P, s, p, P, S, P, state)
        remaining = tl.load(decay + g)
        state = tl.where(remaining > 0, remaining * state, 0.0) + load(added_states + g * S * P, s, p, P, S, P)


@triton.jit
def _output_kernel(
    x, b, c, cum, episode, states, skip, y, length, chunks, heads, SKIPS: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a chunk, for all heads."""
    k = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i = tl.arange(0, CHUNK)
    s = tl.arange(0, SIZE)
    left = length - k * CHUNK
    token = row * length + k * CHUNK
    keys = load(b + token * S, i, s, S, left, S)
    queries = load(c + token * S, i, s, S, left, S)
    segment = tl.load(episode + (row * chunks + k) * CHUNK + i)
    seen = (segment[:, None] == segment[None, :]) & (i[:, None] >= i[None, :])
    match = tl.where(seen, tl.dot(queries, tl.trans(keys), input_precision=PRECISION), 0.0)
    for h in range(heads):
        decay = tl.load(cum + ((row * heads + h) * chunks + k) * CHUNK + i)
        weight = match * tl.exp(tl.minimum(decay[:, None] - decay[None, :], 0.0))
        since = tl.exp(tl.where(segment == 0, decay, float("-inf")))
        channels = (token * heads + h) * P
        head_row = ((row * chunks + k) * heads + h) * S * P
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            state = load(states + head_row, s, p, P, S, P).to(queries.dtype)
            values = load(x + channels, i, p, heads * P, left, P)
            out = since[:, None] * tl.dot(queries, state, input_precision=PRECISION)
            out += tl.dot(weight.to(values.dtype), values, input_precision=PRECISION)
            if SKIPS:
                out += tl.load(skip + h) * values.to(tl.float32)
            store(y + channels, i, p, heads * P, left, P, out)


@triton.jit
def _columns_kernel(
    x, b, c, cum, episode, skip, dy, after, dx, db, between, dcum, d_skip, length, chunks, heads, SKIPS: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what a chunk's tokens wrote: of x and b, from the gradients `dy` of y and `after` of the state after
    the chunk; and the chunk's part of the gradient of skip, to `d_skip` `(B, K, H)`.

    In row j and column i of a pair, token j is written and token i reads. `between` `(B, K, CHUNK, CHUNK)` receives the
    gradient of b_j . c_i, and `dcum` that of the summed log decays except for the part through the state before the
    chunk. Everything about pairs is computed in this one orientation: Triton has transposed products wrongly on Hopper.
    """
    k = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i = tl.arange(0, CHUNK)
    s = tl.arange(0, SIZE)
    left = length - k * CHUNK
    token = row * length + k * CHUNK
    keys = load(b + token * S, i, s, S, left, S)
    queries = load(c + token * S, i, s, S, left, S)
    episode_at = episode + (row * chunks + k) * CHUNK
    segment = tl.load(episode_at + i)
    episodes = tl.load(episode_at + CHUNK - 1)
    seen = (segment[:, None] == segment[None, :]) & (i[:, None] <= i[None, :])
    match = tl.where(seen, tl.dot(keys, tl.trans(queries), input_precision=PRECISION), 0.0)
    d_match = tl.zeros((CHUNK, CHUNK), tl.float32)
    d_keys = tl.zeros((CHUNK, SIZE), tl.float32)
    for h in range(heads):
        sums = ((row * heads + h) * chunks + k) * CHUNK
        decay = tl.load(cum + sums + i)
        total = tl.load(cum + sums + CHUNK - 1)
        channels = (token * heads + h) * P
        head_row = ((row * chunks + k) * heads + h) * S * P
        d_weight = tl.zeros((CHUNK, CHUNK), tl.float32)
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            values = load(x + channels, i, p, heads * P, left, P)
            d_out = load(dy + channels, i, p, heads * P, left, P)
            d_weight += tl.dot(values, tl.trans(d_out), input_precision=PRECISION)
        d_weight *= tl.exp(tl.minimum(decay[None, :] - decay[:, None], 0.0))
        d_match += d_weight
        d_pairs = d_weight * match
        d_decay = tl.sum(d_pairs, 0) - tl.sum(d_pairs, 1)
        weight = match * tl.exp(tl.minimum(decay[None, :] - decay[:, None], 0.0))
        until = tl.exp(tl.where(segment == episodes, total - decay, float("-inf")))
        to_skip = tl.zeros((CHUNK,), tl.float32)
        carried = tl.zeros((CHUNK,), tl.float32)
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            d_out = load(dy + channels, i, p, heads * P, left, P)
            d_state = load(after + head_row, s, p, P, S, P)
            values = load(x + channels, i, p, heads * P, left, P)
            d_keys += until[:, None] * tl.dot(values, tl.trans(d_state), input_precision=PRECISION)
            written = until[:, None] * tl.dot(keys, d_state, input_precision=PRECISION)
            carried += tl.sum(values * written, 1)
            written += tl.dot(weight.to(d_out.dtype), d_out, input_precision=PRECISION)
            if SKIPS:
                written += tl.load(skip + h) * d_out.to(tl.float32)
                to_skip += tl.sum(values.to(tl.float32) * d_out.to(tl.float32), 1)
            store(dx + channels, i, p, heads * P, left, P, written)
        d_decay += tl.where(i == CHUNK - 1, tl.sum(carried, 0), 0.0) - carried
        tl.store(dcum + sums + i, d_decay)
        if SKIPS:
            tl.store(d_skip + (row * chunks + k) * heads + h, tl.sum(to_skip, 0))
    queries = load(c + token * S, i, s, S, left, S)
    seen = (segment[:, None] == segment[None, :]) & (i[:, None] <= i[None, :])
    d_match = tl.where(seen, d_match, 0.0).to(queries.dtype)
    store(between + (row * chunks + k) * CHUNK * CHUNK, i, i, CHUNK, CHUNK, CHUNK, d_match)
    d_keys += tl.dot(d_match, queries, input_precision=PRECISION)
    store(db + token * S, i, s, S, left, S, d_keys)


@triton.jit
def _rows_kernel(
    b, c, cum, episode, states, dy, after, between, dcum, dc, da, length, chunks, heads, P: tl.constexpr,
    S: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what a chunk's tokens read: of c and, with the part through the state before the chunk, of a."""
    k = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i = tl.arange(0, CHUNK)
    s = tl.arange(0, SIZE)
    left = length - k * CHUNK
    token = row * length + k * CHUNK
    keys = load(b + token * S, i, s, S, left, S)
    queries = load(c + token * S, i, s, S, left, S)
    episode_at = episode + (row * chunks + k) * CHUNK
    segment = tl.load(episode_at + i)
    episodes = tl.load(episode_at + CHUNK - 1)
    d_match = tl.load(between + (row * chunks + k) * CHUNK * CHUNK + i[None, :] * CHUNK + i[:, None])
    d_queries = tl.dot(d_match, keys, input_precision=PRECISION)
    for h in range(heads):
        sums = ((row * heads + h) * chunks + k) * CHUNK
        decay = tl.load(cum + sums + i)
        total = tl.load(cum + sums + CHUNK - 1)
        since = tl.exp(tl.where(segment == 0, decay, float("-inf")))
        read = tl.zeros((CHUNK, SIZE), tl.float32)
        state_dot = tl.zeros((SIZE,), tl.float32)
        head_row = ((row * chunks + k) * heads + h) * S * P
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            d_out = load(dy + (token * heads + h) * P, i, p, heads * P, left, P)
            state = load(states + head_row, s, p, P, S, P)
            d_state = load(after + head_row, s, p, P, S, P)
            read += tl.dot(d_out, tl.trans(state.to(d_out.dtype)), input_precision=PRECISION)
            state_dot += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        read = since[:, None] * read
        d_queries += read
        d_total = tl.where(episodes == 0, tl.exp(total) * tl.sum(state_dot, 0), 0.0)
        d_decay = tl.load(dcum + sums + i) + tl.sum(read * queries, 1) + tl.where(i == CHUNK - 1, d_total, 0.0)
        # a_i is part of the sums through token i and all later ones
        d_decay = tl.cumsum(d_decay, 0, reverse=True)
        tl.store(da + (token + i) * heads + h, d_decay.to(da.dtype.element_ty), mask=i < left)
    store(dc + token * S, i, s, S, left, S, d_queries)


def _options(x: Tensor, b: Tensor, kernel: str) -> dict[str, object]:
    """Constants and compiler options of a kernel."""
    precise = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    sizes = {"P": x.shape[-1], "S": b.shape[-1], "SIZE": padded(b.shape[-1])}
    return {**sizes, "PRECISION": "tf32x3" if precise else "tf32", **SETTINGS[kernel]}


def _carry(
    value: Tensor, key: Tensor, cum: Tensor, episode: Tensor, begin: Tensor, states: Tensor, reverse: bool
) -> Tensor:
    """Fill `states` `(B, K, H, S, P)` and return the state (or, in reverse, its gradient) at the other end.

    Few long sequences are carried in groups of chunks in parallel: first what each group adds to a zero state, then the
    state before each group, then the states within the groups.
    """
    rows, chunks, heads, size, head = states.shape
    tile = min(TILE, padded(head))
    chunk = cum.shape[-1] // chunks
    tiles = triton.cdiv(head, tile)
    groups = min(chunks // MIN_CHUNKS, PROGRAMS // (rows * heads * tiles))
    groups = 1 if groups < MIN_GROUPS else groups
    each = triton.cdiv(chunks, groups)
    groups = triton.cdiv(chunks, each)
    options = _options(value, key, "carry")
    end = torch.empty_like(begin)
    group_decay = end  # a placeholder: with a single group it is not used

    def run(begin: Tensor, end: Tensor, added: bool) -> None:
        _carry_kernel[(rows * heads * groups, tiles)](
            value, key, cum, episode, begin, states, end, group_decay, value.shape[1] * value.shape[2], chunks, heads,
            groups, each, REVERSE=reverse, ADDED=added, CHUNK=chunk, TILE=tile, **options,
        )  # fmt: skip

    group_states = begin
    if groups > 1:
        added_states, group_states = begin.new_empty(2, rows, heads, groups, size, head)
        group_decay = begin.new_empty(rows, heads, groups)
        run(begin, added_states, True)
        _join_kernel[(rows * heads, tiles)](
            group_decay, added_states, begin, group_states, groups, REVERSE=reverse, TILE=tile,
            **{name: options[name] for name in ("P", "S", "SIZE", "num_warps", "num_stages")},
        )  # fmt: skip
    run(group_states, end, False)
    return end


@torch.library.custom_op("longdream::scan", mutates_args=())
def _scan(
    x: Tensor, b: Tensor, c: Tensor, a: Tensor, first: Tensor, state: Tensor, skip: Tensor | None, exact_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, b, c, a, state = (v.contiguous() for v in (x, b, c, a, state))
    y, _, states, cum, episode = _scan_shapes(x, b, c, a, first, state, skip, exact_states)
    rows, chunks, heads, _, head = states.shape
    frames, tokens = x.shape[1:3]
    length = frames * tokens
    chunk = cum.shape[-1] // chunks
    grid = (rows * chunks,)
    with torch.cuda.device_of(x), without_wgmma():
        _prepare_kernel[grid](
            a, first.contiguous().view(torch.uint8), cum, episode, frames, tokens, length, chunks, heads, CHUNK=chunk,
            HEADS=triton.next_power_of_2(heads), num_warps=4,
        )  # fmt: skip
        end = _carry(x, b, cum, episode, state, states, False)
        _output_kernel[grid](
            x, b, c, cum, episode, states, cum if skip is None else skip, y, length, chunks, heads,
            SKIPS=skip is not None, CHUNK=chunk, HEAD=min(HEAD, padded(head)), **_options(x, b, "output"),
        )  # fmt: skip
    return y, end, states, cum, episode


@_scan.register_fake
def _scan_shapes(
    x: Tensor, b: Tensor, c: Tensor, a: Tensor, first: Tensor, state: Tensor, skip: Tensor | None, exact_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs."""
    rows, frames, tokens, heads, head = x.shape
    chunks = (frames * tokens + CHUNK - 1) // CHUNK
    state_dtype = torch.float32 if exact_states else x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(state.shape, dtype=torch.float32),
        x.new_empty(rows, chunks, heads, b.shape[-1], head, dtype=state_dtype),
        x.new_empty(rows, heads, chunks * CHUNK, dtype=torch.float32),
        x.new_empty(rows, chunks * CHUNK, dtype=torch.int32),
    )


@torch.library.custom_op("longdream::scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    d_end: Tensor,
    x: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
    states: Tensor,
    cum: Tensor,
    episode: Tensor,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, d_end, x, b, c = (v.contiguous() for v in (dy, d_end, x, b, c))
    rows, chunks, heads, _, head = states.shape
    length = x.shape[1] * x.shape[2]
    chunk = cum.shape[-1] // chunks
    dx, db, dc, da = (v.new_empty(v.shape) for v in (x, b, c, a))
    after = torch.empty_like(states, dtype=x.dtype)
    between = x.new_empty(rows, chunks, chunk, chunk)
    dcum = torch.empty_like(cum)
    d_skip = cum.new_empty(rows, chunks, 0 if skip is None else x.shape[3])
    grid = (rows * chunks,)
    channels = min(HEAD, padded(head))
    with torch.cuda.device_of(x), without_wgmma():
        d_begin = _carry(dy, c, cum, episode, d_end, after, True)
        _columns_kernel[grid](
            x, b, c, cum, episode, cum if skip is None else skip, dy, after, dx, db, between, dcum, d_skip, length,
            chunks, heads, SKIPS=skip is not None, CHUNK=chunk, HEAD=channels, **_options(x, b, "columns"),
        )  # fmt: skip
        _rows_kernel[grid](
            b, c, cum, episode, states, dy, after, between, dcum, dc, da, length, chunks, heads, CHUNK=chunk,
            HEAD=channels, **_options(x, b, "rows"),
        )  # fmt: skip
    return dx, db, dc, da, d_begin, d_skip.sum((0, 1))[:, None]


@_scan_backward.register_fake
def _(dy, d_end, x, b, c, a, states, cum, episode, skip):
    d_skip = cum.new_empty(0 if skip is None else x.shape[3], 1)
    return (*(v.new_empty(v.shape) for v in (x, b, c, a, d_end)), d_skip)


def _save(ctx, inputs, output) -> None:
    x, b, c, a, _, _, skip, _ = inputs
    _, _, states, cum, episode = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, b, c, a, states, cum, episode, skip)


def _gradients(ctx, dy, d_end, *_):
    x, b, c, a, states, cum, episode, skip = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()  # here the compiler can fuse the copy
    if d_end is None:
        d_end = x.new_zeros(states[:, 0].shape, dtype=torch.float32)
    dx, db, dc, da, d_begin, d_skip = _scan_backward(dy, d_end, x, b, c, a, states, cum, episode, skip)
    return dx, db, dc, da, None, d_begin, None if skip is None else d_skip, None


_scan.register_autograd(_gradients, setup_context=_save)
