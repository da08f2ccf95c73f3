"""The state-space scan: Mamba-2's SSD in chunked matrix form, with state in and out, resets and parallel queries.

Recurrence, per head, with one token after another (Dao and Gu 2024, arXiv 2405.21060, eq. 2 and section 6):

    S_l = exp(a_l) S_{l-1} + b_l x_l^T          S: (state, head dim)
    y_l = S_l^T c_l + D x_l

Tokens come frame by frame, `n` to a frame. Where a frame begins an episode the state is zero before its first token.

A *query* stream may run beside the clean one. Query frame t starts from the state that the clean frames before t left
and is then scanned alone: what M computes for a noised frame at time t, for every t at once. That is how denoising is
trained against a clean past at every frame in one pass. In groups of frames, a group starts from the state before it
and is scanned as a whole.

`scan` is the fast form (cost linear in time): on CUDA, frame by frame, kernels of its own (scan_triton.py), elsewhere
`scan_chunked`. `scan_step` advances one frame, `scan_reference` is the slow truth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from longdream.worldmodel.kernels import scan_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None


class Stream(NamedTuple):
    """Inputs of a scan: B tubes, T frames, n tokens a frame, H heads.

    x: `(B, T, n, H, P)` values. b, c: `(B, T, n, S)` write and read keys, shared by the heads. a: `(B, T, n, H)` log
    decay <= 0.
    """

    x: Tensor
    b: Tensor
    c: Tensor
    a: Tensor


class ScanOut(NamedTuple):
    """y and query: `(B, T, n, H, P)` of the two streams; state: `(B, H, S, P)` after the last frame; at:
    `(B, M, H, S, P)`."""

    y: Tensor
    state: Tensor
    query: Tensor | None
    at: Tensor | None


def scan_step(stream: Stream, state: Tensor) -> tuple[Tensor, Tensor]:
    """One frame (T = 1): y `(B, 1, n, H, P)`, without D x, and the state after it. Resets are the caller's (a zeroed
    state)."""
    x, b, c, a = (v[:, 0] for v in stream)
    if x.shape[1] == 1:
        decay = a[:, 0].exp()[..., None, None]
        state = decay * state + b[:, 0, None, :, None] * x[:, 0, :, None, :]
        return torch.einsum("bs,bhsp->bhp", c[:, 0], state)[:, None, None], state
    cum = a.cumsum(1).transpose(1, 2)  # (B, H, n)
    x = x.transpose(1, 2)
    weight = (c @ b.transpose(1, 2))[:, None] * _causal_decay(cum, cum)
    y = weight @ x + cum.exp()[..., None] * (c[:, None] @ state)
    last = (cum[..., -1:] - cum).exp()[..., None] * x  # each token's value, decayed to the frame's end
    state = cum[..., -1].exp()[..., None, None] * state + b.transpose(1, 2)[:, None] @ last
    return y.transpose(1, 2)[:, None], state


def scan_query_step(stream: Stream, state: Tensor) -> Tensor:
    """One query frame (T = 1) against a state, which it leaves as it is: y `(B, 1, n, H, P)`."""
    if stream.x.shape[2] > 1:
        return scan_step(stream, state)[0]
    x, b, c, a = (v[:, 0, 0] for v in stream)
    past = torch.einsum("bs,bhsp->bhp", c, state) * a.exp()[..., None]
    return (past + (b * c).sum(-1)[:, None, None] * x)[:, None, None]


def scan(
    clean: Stream,
    first: Tensor,
    state: Tensor,
    chunk: int = 64,
    query: Stream | None = None,
    at: Tensor | None = None,
    group: int = 1,
    skip: Tensor | None = None,
) -> ScanOut:
    """Scan T frames, in the form that is fastest where the inputs are.

    Args:
        clean: the stream that writes the state. query: a second one that only reads it (see the module's text).
        first: `(B, T)` bool, frames before which the state is zero.
        state: `(B, H, S, P)` float32, before frame 0.
        chunk: frames per chunk; the kernels for CUDA have a size of their own.
        at: `(B, M)` frame indices after which to return the state as well, without gradient, to start dreams from.
        group: query frames that are scanned together; T is a multiple of it.
        skip: `(H, 1)`, D of each head; None for 0.
    """
    if group == 1 and kernels is not None and kernels.fit(clean.x, clean.b, clean.c):
        return _scan_kernels(clean, first, state, query, at, skip)
    out = scan_chunked(clean, first, state, chunk, query, at, group)
    if skip is None:
        return out
    query_y = None if out.query is None or query is None else out.query + skip * query.x
    return out._replace(y=out.y + skip * clean.x, query=query_y)


def _scan_kernels(
    clean: Stream, first: Tensor, state: Tensor, query: Stream | None, at: Tensor | None, skip: Tensor | None
) -> ScanOut:
    """The scan by the kernels; under autocast in its precision, as matrix products are."""
    assert kernels is not None
    stream = clean
    if query is not None:  # its tokens stand before the clean ones of their frame: they read, and leave no trace
        trace = (False, False, True, False)  # of x, b, c and a
        both = zip(trace, query, clean, strict=True)
        stream = Stream(*(torch.cat([q if read else torch.zeros_like(q), v], 2) for read, q, v in both))
    x, b, c, a = stream
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x, b, c = (v.to(torch.get_autocast_dtype(x.device.type)) for v in (x, b, c))
    x, b, c, a = (v.contiguous() for v in (x, b, c, a))  # here the compiler can make them so for nothing
    y, last, start, cum, episode = kernels.scan_kernels(x, b, c, a, first, state.float(), skip, at is not None)
    y, states_at, query_y = y.to(clean.x.dtype), None, None
    if at is not None:
        chunks = start.shape[1]
        size, length = cum.shape[-1] // chunks, x.shape[1] * x.shape[2]  # chunks are of tokens, not of frames
        x, b = (v.detach().flatten(1, 2) for v in stream[:2])
        if length % size:
            x, b = (_pad_time(v, -length % size) for v in (x, b))
        x, b, cum, episode = (v.unflatten(d, (chunks, size)) for v, d in ((x, 1), (b, 1), (cum, 2), (episode, 1)))
        none = torch.zeros_like(episode[..., 0])  # episodes begun where a chunk begins
        known = x.transpose(2, 3), b, cum.transpose(1, 2)
        states_at = _states_at(at, known, episode, none, start, stream.x.shape[2])
    if query is not None:
        past, y = y.chunk(2, 2)
        query_y = past * query.a.cumsum(2).exp()[..., None] + _own(query)
        query_y = query_y if skip is None else query_y + skip * query.x
    return ScanOut(y, last, query_y, states_at)


def _own(query: Stream) -> Tensor:
    """What the tokens of a query frame read of their own frame, like x."""
    x, b, c, a = query
    if x.shape[2] == 1:
        return (b * c).sum(-1)[..., None, None] * x
    decay = a.cumsum(2).transpose(2, 3)  # (B, T, H, n)
    inside = (c @ b.transpose(-1, -2))[:, :, None] * _causal_decay(decay, decay)
    return (inside @ x.transpose(2, 3)).transpose(2, 3)


def scan_chunked(
    clean: Stream,
    first: Tensor,
    state: Tensor,
    chunk: int = 64,
    query: Stream | None = None,
    at: Tensor | None = None,
    group: int = 1,
) -> ScanOut:
    """`scan` in torch, on any device: matrix products inside a chunk, one recurrence over chunks."""
    frames, tokens = clean.x.shape[1:3]
    chunk = max(1, min(chunk, frames) // group) * group
    segment = first.long().cumsum(1)
    pad = -frames % chunk
    if pad:  # padding writes nothing (b = 0) and keeps the state (a = 0)
        clean = Stream(*(_pad_time(v, pad) for v in clean))
        query = query and Stream(*(_pad_time(v, pad) for v in query))
        segment = torch.cat([segment, segment[:, -1:].expand(-1, pad)], 1)
    chunks = (frames + pad) // chunk
    x, b, c, a = _chunked(clean, chunks)
    seg = segment.view(len(segment), chunks, chunk)  # (B, K, frames)
    # (B, K): the segment that a chunk's incoming state is of
    before = torch.cat([torch.zeros_like(seg[:, :1, 0]), seg[:, :-1, -1]], 1)
    token_seg = seg.repeat_interleave(tokens, 2)
    cum = a.cumsum(-1)  # (B, K, H, L), log decay from the chunk's start, inclusive

    # the state before each chunk
    keep = (token_seg == token_seg[..., -1:])[:, :, None]
    write = torch.where(keep, (cum[..., -1:] - cum), -torch.inf).exp()[..., None] * x
    written = b.transpose(-1, -2)[:, :, None] @ write  # (B, K, H, S, P)
    states = _over_chunks(torch.cat([state[:, None], written], 1), cum[..., -1], seg[..., -1] != before)
    start = states[:, :-1]  # (B, K, H, S, P)
    alive = (token_seg == before[..., None])[:, :, None]  # tokens whose episode the incoming state is of

    same = token_seg[..., :, None] == token_seg[..., None, :]
    weight = (c @ b.transpose(-1, -2))[:, :, None] * _causal_decay(cum, cum, same[:, :, None])
    y = weight @ x + torch.where(alive, cum.exp(), 0.0)[..., None] * (c[:, :, None] @ start)

    query_y = None
    if query is not None:
        query_y = _read(query, (x, b, cum), start, alive, same, tokens * group, chunks, group > 1)
        query_y = _unchunk(query_y, tokens)[:, :frames]
    states_at = None if at is None else _states_at(at, (x, b, cum), token_seg, before, start, tokens)
    last = states[:, -1].clone()  # a view would keep the states of all chunks in memory
    return ScanOut(_unchunk(y, tokens)[:, :frames], last, query_y, states_at)


def _over_chunks(written: Tensor, decay: Tensor, cut: Tensor, most: int = 256) -> Tensor:
    """The recurrence from chunk to chunk, as one product with the (K + 1)^2 decays between them; beyond `most` chunks,
    as several, so that the cost stays linear in time.

    written: `(B, K + 1, H, S, P)`, the state before all chunks, then what each chunk adds. decay: `(B, K, H)` log decay
    over each chunk; cut: `(B, K)`, whether nothing passes through it. Returns the states before each chunk and after
    the last, as written.
    """
    if decay.shape[1] > most:
        parts, state = [], written[:, :1]
        for k in range(0, decay.shape[1], most):
            now = slice(k, k + most)
            found = _over_chunks(torch.cat([state, written[:, 1:][:, now]], 1), decay[:, now], cut[:, now], most)
            parts.append(found[:, :-1])
            state = found[:, -1:]
        return torch.cat([*parts, state], 1)
    since = F.pad(decay.cumsum(1), (0, 0, 1, 0)).transpose(1, 2)  # (B, H, K + 1)
    piece = F.pad(cut.long().cumsum(1), (1, 0))
    same = (piece[:, :, None] == piece[:, None])[:, None]
    with torch.autocast(written.device.type, enabled=False):  # states sum over thousands of frames
        states = _causal_decay(since, since, same) @ written.transpose(1, 2).flatten(3).to(decay.dtype)
    return states.transpose(1, 2).unflatten(3, written.shape[3:])


def _read(query: Stream, clean, start, alive, same, tokens: int, chunks: int, grouped: bool) -> Tensor:
    """The query stream's outputs: past clean frames through the chunk and its incoming state, then its own frame. Where
    `grouped`, a group of frames, of that many tokens, within which an episode may begin."""
    x, b, cum = clean
    qx, qb, qc, qa = _chunked(query, chunks)
    frame_of = torch.arange(qx.shape[-2], device=qx.device) // tokens
    own = qa.unflatten(-1, (-1, tokens)).cumsum(-1)  # (B, K, H, frames, n)
    ends = cum.unflatten(-1, (-1, tokens))[..., -1]
    # log decay from the chunk's start to the query token
    since = (F.pad(ends, (1, 0))[..., :-1, None] + own).flatten(-2)
    past = (same & (frame_of[:, None] > frame_of))[:, :, None]
    decay = torch.where(past, since[..., :, None] - cum[..., None, :], -torch.inf).exp()
    y = ((qc @ b.transpose(-1, -2))[:, :, None] * decay) @ x
    y = y + torch.where(alive, since.exp(), 0.0)[..., None] * (qc[:, :, None] @ start)
    if tokens == 1:
        return y + (qb * qc).sum(-1)[:, :, None, :, None] * qx
    qx, qb, qc = qx.unflatten(-2, (-1, tokens)), qb.unflatten(-2, (-1, tokens)), qc.unflatten(-2, (-1, tokens))
    within = None
    if grouped:
        episode = same.unflatten(-1, (-1, tokens)).unflatten(-3, (-1, tokens))  # (B, K, groups, n, groups, n)
        within = episode.diagonal(dim1=2, dim2=4).movedim(-1, 2)[:, :, None]
    inside = (qc @ qb.transpose(-1, -2))[:, :, None] * _causal_decay(own, own, within)
    return y + (inside @ qx).flatten(-3, -2)


@torch.no_grad()
def _states_at(at: Tensor, clean, token_seg, before, start, tokens: int) -> Tensor:
    """States after the frames `at` `(B, M)`: the chunk's incoming state plus what its tokens up to there wrote."""
    x, b, cum = clean
    rows, size = torch.arange(len(at), device=at.device)[:, None], cum.shape[-1]
    token = at * tokens + tokens - 1  # the frame's last
    k, end = token // size, token % size
    cum_k, seg_k = cum[rows, k], token_seg[rows, k]  # (B, M, H, L), (B, M, L)
    cum_end = cum_k.gather(-1, end[..., None, None].expand(-1, -1, cum_k.shape[2], 1))
    seg_end = seg_k.gather(-1, end[..., None])
    tokens_in = (torch.arange(seg_k.shape[-1], device=at.device) <= end[..., None]) & (seg_k == seg_end)
    decay = torch.where(tokens_in[:, :, None], cum_end - cum_k, -torch.inf).exp()
    with torch.autocast(x.device.type, enabled=False):  # dreams begin with these
        written = b[rows, k].to(decay.dtype).transpose(-1, -2)[:, :, None] @ (decay[..., None] * x[rows, k])
    carry = torch.where((seg_end[..., 0] == before[rows, k])[..., None], cum_end[..., 0].exp(), 0.0)
    return carry[..., None, None] * start[rows, k] + written


def scan_reference(
    clean: Stream, first: Tensor, state: Tensor, query: Stream | None = None, group: int = 1
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The slow truth: the recurrence token by token. Returns y, the state after each frame, and the queries' y."""
    ys, states, query_ys, aside = [], [], [], state
    for t in range(clean.x.shape[1]):
        aside = state if t % group == 0 else aside
        state, aside = (torch.where(first[:, t, None, None, None], torch.zeros_like(s), s) for s in (state, aside))
        if query is not None:
            y, aside = _token_by_token(query, t, aside)
            query_ys.append(y)
        y, state = _token_by_token(clean, t, state)
        ys.append(y)
        states.append(state)
    return torch.stack(ys, 1), states, torch.stack(query_ys, 1) if query is not None else torch.empty(0)


def _token_by_token(stream: Stream, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for i in range(stream.x.shape[2]):
        write = torch.einsum("bs,bhp->bhsp", stream.b[:, t, i], stream.x[:, t, i])
        state = stream.a[:, t, i].exp()[..., None, None] * state + write
        outputs.append(torch.einsum("bs,bhsp->bhp", stream.c[:, t, i], state))
    return torch.stack(outputs, 1), state


def _causal_decay(to: Tensor, since: Tensor, same: Tensor | None = None) -> Tensor:
    """exp(to_i - since_j) for j <= i (and the same episode), else 0. Masked before exp, which would
    overflow above the diagonal."""
    causal = torch.ones(to.shape[-1], since.shape[-1], dtype=torch.bool, device=to.device).tril()
    mask = causal if same is None else same & causal
    return torch.where(mask, to[..., :, None] - since[..., None, :], -torch.inf).exp()


def _chunked(stream: Stream, chunks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x `(B, K, H, L, P)`, b and c `(B, K, L, S)`, a `(B, K, H, L)`, L tokens a chunk."""
    batch = stream.x.shape[0]
    x, b, c, a = (v.reshape(batch, chunks, -1, *v.shape[3:]) for v in stream)
    return x.transpose(2, 3), b, c, a.transpose(2, 3)


def _unchunk(y: Tensor, tokens: int) -> Tensor:
    """`(B, K, H, L, P)` back to `(B, T, n, H, P)`."""
    return y.transpose(2, 3).flatten(1, 2).unflatten(1, (-1, tokens))


def _pad_time(v: Tensor, pad: int) -> Tensor:
    return torch.cat([v, v.new_zeros(v.shape[0], pad, *v.shape[2:])], 1)
