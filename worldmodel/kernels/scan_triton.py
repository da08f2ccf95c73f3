"""The state-space scan on CUDA: the same sums as `scan_chunked`, compiled by Triton, with a backward pass of its own.

The frames' tokens are one sequence of L, cut into K chunks of `CHUNK` tokens, whatever a frame has (Dao and Gu 2024,
arXiv 2405.21060, section 6). For head h and chunk k, with A_i the log decay from the chunk's beginning through token i,
S the state before the chunk, and rows of x, b, c those of its tokens:

    y_i = sum over j <= i of exp(A_i - A_j) (c_i . b_j) x_j  +  exp(A_i) c_i S  +  D x_i
    S of the next chunk = exp(A_end) S + sum over j of exp(A_end - A_j) b_j^T x_j

where each exponential is zero if an episode begins between the two ends that it joins. Forward, one kernel carries the
state from chunk to chunk and keeps what it was before each (`_carry_kernel`), and another makes y of all chunks at once
(`_output_kernel`). Backward, the first runs from the last chunk to the first, with c for b and the gradient of y for x,
which gives the gradient G of the state after each chunk; then `_columns_kernel` finds what a token's writing was worth
(x, b) and `_rows_kernel` what its reading was (c), and with it the decays. A program of these takes the heads of its
chunk one after another, so that gradients of b and c, which heads share, are sums in a fixed order: the same inputs
give the same bits.

Products take operands in the inputs' precision and sum in float32; of float32, TF32, and with
`torch.set_float32_matmul_precision("highest")` three TF32 products in place of each, which keep about 22 bits of 24.
Decays, sums over time and the carried state are float32.
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
"""Channels of a head that a program takes at once, at most."""
TILE = 32
"""Channels of a head whose state one program carries, at most: fewer make more programs, each of which reads the
keys."""
PROGRAMS, LEAST, WORTH = 512, 8, 4
"""Programs that carry states, if so many can be had with LEAST chunks for each: too few leave most of a GPU idle. Below
WORTH groups, each of which is gone through twice, nothing is gained."""
SETTINGS = {name: {"num_warps": 4, "num_stages": 1} for name in ("carry", "output", "columns", "rows")}
"""How each kernel is compiled. Simple on purpose: with more warps or stages, Triton 3.4 to 3.7 has miscompiled kernels
like these on Hopper (github.com/fla-org/flash-linear-attention, issues 640 and 984). See `without_wgmma` too."""
MOST = 128
"""Channels of a head and of the state, at most."""


def fit(x: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether the kernels are for these inputs of a scan."""
    sizes = max(x.shape[-1], b.shape[-1]) <= MOST
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
    """The scan, with gradients for x, b, c, a, the state and skip.

    Args:
        x: `(B, T, n, H, P)`. b, c: `(B, T, n, S)`, of the same dtype. a: `(B, T, n, H)` log decay <= 0.
        first: `(B, T)` bool, frames before which the state is zero.
        state: `(B, H, S, P)` float32, before frame 0.
        skip: `(H, 1)` float32, D of each head; None for 0.
        exact_states: keep the states before chunks in float32, not in the dtype of x.

    Returns:
        y like x, the state `(B, H, S, P)` float32 after the last frame, and without gradient: the states before chunks
        `(B, K, H, S, P)`; log decays from a chunk's beginning `(B, H, K * CHUNK)` float32, inclusive; how many
        episodes began in a token's chunk until then, the token included, `(B, K * CHUNK)` int32.
    """
    return _scan(x, b, c, a, first, state, skip, exact_states)


@triton.jit
def _prepare_kernel(
    a, first, cum, episode, frames, tokens, length, chunks, heads, CHUNK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Of a chunk: log decays from its beginning, and episodes begun in it. What is behind the last token leaves the
    state as it is."""
    k, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    i, h = tl.arange(0, CHUNK), tl.arange(0, HEADS)
    left, position = length - k * CHUNK, k * CHUNK + i
    decay = load(a + (row * length + k * CHUNK) * heads, i, h, heads, left, heads).to(tl.float32)
    to = cum + (row * heads * chunks + k) * CHUNK + i[:, None] + h[None, :] * chunks * CHUNK
    tl.store(to, tl.cumsum(decay, 0), mask=(h < heads)[None, :] & (i >= 0)[:, None])
    begins = (i < left) & (position % tokens == 0)
    begun = tl.load(first + row * frames + position // tokens, mask=begins, other=0).to(tl.int32)
    tl.store(episode + (row * chunks + k) * CHUNK + i, tl.cumsum(begun, 0))


@triton.jit
def _carry_kernel(
    value, key, cum, episode, begin, states, end, left_of, length, chunks, heads, groups, each, P: tl.constexpr,
    S: tl.constexpr, REVERSE: tl.constexpr, ADDED: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some channels of a head, from chunk to chunk of a group of `each` chunks (the last may have fewer): from `begin`
    `(B, H, groups, S, P)`, the state before each chunk to `states` and the one after all groups to `end` `(B, H, S,
    P)`. Or, if what is ADDED is asked for, what each group adds to a state of zero, to `end` `(B, H, groups, S, P)`,
    and what it leaves of another, to `left_of` `(B, H, groups)`.

    In reverse: the gradient of the state, from behind the last chunk to before the first, and what it is after each;
    `value` is then the gradient of y, `key` c.
    """
    g, h = tl.program_id(0) % groups, tl.program_id(0) // groups % heads
    row = (tl.program_id(0) // groups // heads).to(tl.int64)
    i, s, p = tl.arange(0, CHUNK), tl.arange(0, SIZE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    of_head = row * heads + h
    of_group = of_head * groups + g
    if ADDED:
        state = tl.zeros((SIZE, TILE), tl.float32)
    else:
        state = load(begin + of_group * S * P, s, p, P, S, P)
    least, most = g * each, tl.minimum(g * each + each, chunks)
    passed, ended = 0.0, 0
    for step in range(most - least):
        k = most - 1 - step if REVERSE else least + step
        left, token = length - k * CHUNK, row * length + k * CHUNK
        if not ADDED:
            store(states + ((row * chunks + k) * heads + h) * S * P, s, p, P, S, P, state)
        sums, begun = cum + (of_head * chunks + k) * CHUNK, episode + (row * chunks + k) * CHUNK
        decay, total = tl.load(sums + i), tl.load(sums + CHUNK - 1)
        part, cuts = tl.load(begun + i), tl.load(begun + CHUNK - 1)
        if REVERSE:  # from the chunk's beginning to the token, if its episode was there already
            weight = tl.exp(tl.where(part == 0, decay, float("-inf")))
        else:  # from the token to the chunk's end, if its episode is still there
            weight = tl.exp(tl.where(part == cuts, total - decay, float("-inf")))
        values = load(value + (token * heads + h) * P, i, p, heads * P, left, P)
        to_keys = key + token * S + i[None, :] * S + s[:, None]
        keys = tl.load(to_keys, mask=(i < left)[None, :] & (s < S)[:, None], other=0.0)
        state = tl.where(cuts == 0, tl.exp(total) * state, 0.0)
        state += tl.dot(keys, (weight[:, None] * values).to(keys.dtype), input_precision=PRECISION)
        passed += total
        ended += cuts
    if ADDED:
        store(end + of_group * S * P, s, p, P, S, P, state)
        tl.store(left_of + of_group, tl.where(ended == 0, tl.exp(passed), 0.0))
    elif g == (0 if REVERSE else groups - 1):
        store(end + of_head * S * P, s, p, P, S, P, state)


@triton.jit
def _join_kernel(
    decay, parts, begin, starts, groups, P: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Some channels of a head, from group to group: the state before each, `starts` `(B, H, groups, S, P)`, of what
    each adds, `parts`, and what it leaves of the state before it, `decay` `(B, H, groups)`."""
    row = tl.program_id(0).to(tl.int64)
    s, p = tl.arange(0, SIZE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    state = load(begin + row * S * P, s, p, P, S, P)
    for step in range(groups):
        g = row * groups + (groups - 1 - step if REVERSE else step)
        store(starts + g * S * P, s, p, P, S, P, state)
        left = tl.load(decay + g)
        state = tl.where(left > 0, left * state, 0.0) + load(parts + g * S * P, s, p, P, S, P)


@triton.jit
def _output_kernel(
    x, b, c, cum, episode, states, skip, y, length, chunks, heads, SKIPS: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a chunk, of all heads."""
    k, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    i, s = tl.arange(0, CHUNK), tl.arange(0, SIZE)
    left, token = length - k * CHUNK, row * length + k * CHUNK
    keys, queries = load(b + token * S, i, s, S, left, S), load(c + token * S, i, s, S, left, S)
    part = tl.load(episode + (row * chunks + k) * CHUNK + i)
    seen = (part[:, None] == part[None, :]) & (i[:, None] >= i[None, :])
    match = tl.where(seen, tl.dot(queries, tl.trans(keys), input_precision=PRECISION), 0.0)
    for h in range(heads):
        decay = tl.load(cum + ((row * heads + h) * chunks + k) * CHUNK + i)
        weight = match * tl.exp(tl.minimum(decay[:, None] - decay[None, :], 0.0))
        since = tl.exp(tl.where(part == 0, decay, float("-inf")))
        channels = (token * heads + h) * P
        of_head = ((row * chunks + k) * heads + h) * S * P
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            state = load(states + of_head, s, p, P, S, P).to(queries.dtype)
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
    """What the tokens of a chunk wrote: gradients of x and b, from the gradients `dy` of y and `after` of the state
    after the chunk; and in `d_skip` `(B, K, H)` what they add to that of skip.

    Row j, column i: token j is written, token i reads. `between` `(B, K, CHUNK, CHUNK)` gets the gradient of b_j . c_i,
    `dcum` that of the sums of log decays, without what the state before the chunk has to do with. (Everything that
    concerns a pair is made in this one orientation: Triton has turned products the other way round wrongly on Hopper.)
    """
    k, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    i, s = tl.arange(0, CHUNK), tl.arange(0, SIZE)
    left, token = length - k * CHUNK, row * length + k * CHUNK
    keys, queries = load(b + token * S, i, s, S, left, S), load(c + token * S, i, s, S, left, S)
    begun = episode + (row * chunks + k) * CHUNK
    part, cuts = tl.load(begun + i), tl.load(begun + CHUNK - 1)
    seen = (part[:, None] == part[None, :]) & (i[:, None] <= i[None, :])
    match = tl.where(seen, tl.dot(keys, tl.trans(queries), input_precision=PRECISION), 0.0)
    d_match = tl.zeros((CHUNK, CHUNK), tl.float32)
    d_keys = tl.zeros((CHUNK, SIZE), tl.float32)
    for h in range(heads):
        sums = ((row * heads + h) * chunks + k) * CHUNK
        decay, total = tl.load(cum + sums + i), tl.load(cum + sums + CHUNK - 1)
        channels = (token * heads + h) * P
        of_head = ((row * chunks + k) * heads + h) * S * P
        d_weight = tl.zeros((CHUNK, CHUNK), tl.float32)
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            values = load(x + channels, i, p, heads * P, left, P)
            d_out = load(dy + channels, i, p, heads * P, left, P)
            d_weight += tl.dot(values, tl.trans(d_out), input_precision=PRECISION)
        d_weight *= tl.exp(tl.minimum(decay[None, :] - decay[:, None], 0.0))
        d_match += d_weight
        flow = d_weight * match
        d_decay = tl.sum(flow, 0) - tl.sum(flow, 1)
        weight = match * tl.exp(tl.minimum(decay[None, :] - decay[:, None], 0.0))
        until = tl.exp(tl.where(part == cuts, total - decay, float("-inf")))
        to_skip = tl.zeros((CHUNK,), tl.float32)
        kept = tl.zeros((CHUNK,), tl.float32)
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            d_out = load(dy + channels, i, p, heads * P, left, P)
            d_state = load(after + of_head, s, p, P, S, P)
            values = load(x + channels, i, p, heads * P, left, P)
            d_keys += until[:, None] * tl.dot(values, tl.trans(d_state), input_precision=PRECISION)
            written = until[:, None] * tl.dot(keys, d_state, input_precision=PRECISION)
            kept += tl.sum(values * written, 1)
            written += tl.dot(weight.to(d_out.dtype), d_out, input_precision=PRECISION)
            if SKIPS:
                written += tl.load(skip + h) * d_out.to(tl.float32)
                to_skip += tl.sum(values.to(tl.float32) * d_out.to(tl.float32), 1)
            store(dx + channels, i, p, heads * P, left, P, written)
        d_decay += tl.where(i == CHUNK - 1, tl.sum(kept, 0), 0.0) - kept
        tl.store(dcum + sums + i, d_decay)
        if SKIPS:
            tl.store(d_skip + (row * chunks + k) * heads + h, tl.sum(to_skip, 0))
    queries = load(c + token * S, i, s, S, left, S)
    seen = (part[:, None] == part[None, :]) & (i[:, None] <= i[None, :])
    d_match = tl.where(seen, d_match, 0.0).to(queries.dtype)
    store(between + (row * chunks + k) * CHUNK * CHUNK, i, i, CHUNK, CHUNK, CHUNK, d_match)
    d_keys += tl.dot(d_match, queries, input_precision=PRECISION)
    store(db + token * S, i, s, S, left, S, d_keys)


@triton.jit
def _rows_kernel(
    b, c, cum, episode, states, dy, after, between, dcum, dc, da, length, chunks, heads, P: tl.constexpr,
    S: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk read: the gradient of c, and with what the state before the chunk has to do with the
    decays, that of a."""
    k, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    i, s = tl.arange(0, CHUNK), tl.arange(0, SIZE)
    left, token = length - k * CHUNK, row * length + k * CHUNK
    keys, queries = load(b + token * S, i, s, S, left, S), load(c + token * S, i, s, S, left, S)
    begun = episode + (row * chunks + k) * CHUNK
    part, cuts = tl.load(begun + i), tl.load(begun + CHUNK - 1)
    d_match = tl.load(between + (row * chunks + k) * CHUNK * CHUNK + i[None, :] * CHUNK + i[:, None])
    d_queries = tl.dot(d_match, keys, input_precision=PRECISION)
    for h in range(heads):
        sums = ((row * heads + h) * chunks + k) * CHUNK
        decay, total = tl.load(cum + sums + i), tl.load(cum + sums + CHUNK - 1)
        since = tl.exp(tl.where(part == 0, decay, float("-inf")))
        read = tl.zeros((CHUNK, SIZE), tl.float32)
        passed = tl.zeros((SIZE,), tl.float32)
        of_head = ((row * chunks + k) * heads + h) * S * P
        for begin in tl.static_range(0, P, HEAD):
            p = begin + tl.arange(0, HEAD)
            d_out = load(dy + (token * heads + h) * P, i, p, heads * P, left, P)
            state = load(states + of_head, s, p, P, S, P)
            d_state = load(after + of_head, s, p, P, S, P)
            read += tl.dot(d_out, tl.trans(state.to(d_out.dtype)), input_precision=PRECISION)
            passed += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        read = since[:, None] * read
        d_queries += read
        through = tl.where(cuts == 0, tl.exp(total) * tl.sum(passed, 0), 0.0)
        d_decay = tl.load(dcum + sums + i) + tl.sum(read * queries, 1) + tl.where(i == CHUNK - 1, through, 0.0)
        # the sums through token i and all later ones hold a_i
        d_decay = tl.cumsum(d_decay, 0, reverse=True)
        tl.store(da + (token + i) * heads + h, d_decay.to(da.dtype.element_ty), mask=i < left)
    store(dc + token * S, i, s, S, left, S, d_queries)


def _options(x: Tensor, b: Tensor, kernel: str) -> dict[str, object]:
    """Sizes and settings that a kernel is compiled for."""
    precise = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    sizes = {"P": x.shape[-1], "S": b.shape[-1], "SIZE": padded(b.shape[-1])}
    return {**sizes, "PRECISION": "tf32x3" if precise else "tf32", **SETTINGS[kernel]}


def _carry(
    value: Tensor, key: Tensor, cum: Tensor, episode: Tensor, begin: Tensor, states: Tensor, reverse: bool
) -> Tensor:
    """Fills `states` `(B, K, H, S, P)` and returns what comes out at the other end; see the kernel.

    Long sequences that are few go in groups of chunks at once: first what each group adds to a state of zero, then what
    the state is before each, then the states within them.
    """
    rows, chunks, heads, size, head = states.shape
    tile, chunk = min(TILE, padded(head)), cum.shape[-1] // chunks
    tiles = triton.cdiv(head, tile)
    groups = min(chunks // LEAST, PROGRAMS // (rows * heads * tiles))
    groups = 1 if groups < WORTH else groups
    each = triton.cdiv(chunks, groups)
    groups = triton.cdiv(chunks, each)
    options = _options(value, key, "carry")
    end = torch.empty_like(begin)
    left = end  # of a single group nobody asks

    def run(begin: Tensor, end: Tensor, added: bool) -> None:
        _carry_kernel[(rows * heads * groups, tiles)](
            value, key, cum, episode, begin, states, end, left, value.shape[1] * value.shape[2], chunks, heads, groups,
            each, REVERSE=reverse, ADDED=added, CHUNK=chunk, TILE=tile, **options,
        )  # fmt: skip

    starts = begin
    if groups > 1:
        parts, starts = begin.new_empty(2, rows, heads, groups, size, head)
        left = begin.new_empty(rows, heads, groups)
        run(begin, parts, True)
        _join_kernel[(rows * heads, tiles)](
            left, parts, begin, starts, groups, REVERSE=reverse, TILE=tile,
            **{name: options[name] for name in ("P", "S", "SIZE", "num_warps", "num_stages")},
        )  # fmt: skip
    run(starts, end, False)
    return end


@torch.library.custom_op("longdream::scan", mutates_args=())
def _scan(
    x: Tensor, b: Tensor, c: Tensor, a: Tensor, first: Tensor, state: Tensor, skip: Tensor | None, exact_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, b, c, a, state = (v.contiguous() for v in (x, b, c, a, state))
    y, _, states, cum, episode = _scan_shapes(x, b, c, a, first, state, skip, exact_states)
    rows, chunks, heads, _, head = states.shape
    frames, tokens = x.shape[1:3]
    length, chunk = frames * tokens, cum.shape[-1] // chunks
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
    """Empty tensors of what comes out."""
    rows, frames, tokens, heads, head = x.shape
    chunks = (frames * tokens + CHUNK - 1) // CHUNK
    kept = torch.float32 if exact_states else x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(state.shape, dtype=torch.float32),
        x.new_empty(rows, chunks, heads, b.shape[-1], head, dtype=kept),
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
    length, chunk = x.shape[1] * x.shape[2], cum.shape[-1] // chunks
    dx, db, dc, da = (v.new_empty(v.shape) for v in (x, b, c, a))
    after = torch.empty_like(states, dtype=x.dtype)
    between, dcum = x.new_empty(rows, chunks, chunk, chunk), torch.empty_like(cum)
    d_skip = cum.new_empty(rows, chunks, 0 if skip is None else x.shape[3])
    grid, channels = (rows * chunks,), min(HEAD, padded(head))
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


def _keep(ctx, inputs, output) -> None:
    x, b, c, a, _, _, skip, _ = inputs
    _, _, states, cum, episode = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, b, c, a, states, cum, episode, skip)


def _gradients(ctx, dy, d_end, *_):
    x, b, c, a, states, cum, episode, skip = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()  # here the compiler can make it so for nothing
    if d_end is None:
        d_end = x.new_zeros(states[:, 0].shape, dtype=torch.float32)
    dx, db, dc, da, d_begin, d_skip = _scan_backward(dy, d_end, x, b, c, a, states, cum, episode, skip)
    return dx, db, dc, da, None, d_begin, None if skip is None else d_skip, None


_scan.register_autograd(_gradients, setup_context=_keep)
