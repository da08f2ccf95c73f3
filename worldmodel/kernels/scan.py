"""The state-space scan: Mamba-2's SSD in chunked matrix form, with state in and out, resets and parallel queries.

Recurrence, per head, token after token (Dao and Gu 2024, arXiv 2405.21060, eq. 2 and section 6):

    S_l = exp(a_l) S_{l-1} + b_l x_l^T          S: (state, head dim)
    y_l = S_l^T c_l + D x_l

Tokens come frame by frame, n per frame. Where a frame begins an episode, the state is zero before its first token.

A query stream may accompany the clean stream. Its frame t starts from the state that the clean frames before t left,
and only its own tokens follow. Each query frame thus sees a clean past and itself, and a single pass trains denoising
at every frame. With attention over chunks of frames, a chunk of the query stream starts from the state before the chunk
and is scanned as a whole.

`scan` is the fast form, whose cost is linear in time. On CUDA it runs its own kernels (scan_triton.py), elsewhere
`scan_chunked`. `scan_step` advances one frame. `scan_reference` is the slow reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from longdream.worldmodel.kernels import scan_step_triton as step_kernel
    from longdream.worldmodel.kernels import scan_triton as kernels
except ModuleNotFoundError:  # builds of torch without CUDA come without Triton
    kernels = None
    step_kernel = None


class ScanInputs(NamedTuple):
    """Inputs of a scan over B sequences of T frames with n tokens each, for H heads.

    x: `(B, T, n, H, P)` values. b, c: `(B, T, n, S)` write and read keys, shared by the heads. a: `(B, T, n, H)` log
    decay <= 0.
    """

    x: Tensor
    b: Tensor
    c: Tensor
    a: Tensor


class ScanOutput(NamedTuple):
    """Outputs of a scan.

    y, query_y: `(B, T, n, H, P)` of the two streams. state: `(B, H, S, P)` after the last frame. states_at:
    `(B, M, H, S, P)`, after the frames asked for.
    """

    y: Tensor
    state: Tensor
    query_y: Tensor | None
    states_at: Tensor | None


class _Chunks(NamedTuple):
    """The clean stream in K chunks of L tokens, as queries and states inside a chunk need it.

    x: `(B, K, H, L, P)`. b: `(B, K, L, S)`. cum: `(B, K, H, L)`, log decay from the chunk's start, inclusive. segment:
    `(B, K, L)`, the tokens' episodes. entering: `(B, K)`, the episode of the state before each chunk. start:
    `(B, K, H, S, P)`, that state.
    """

    x: Tensor
    b: Tensor
    cum: Tensor
    segment: Tensor
    entering: Tensor
    start: Tensor


def turned(v: Tensor, angle: Tensor, dim: int = -1) -> Tensor:
    """v, with its channels i and i + S // 2 along `dim` turned as a pair by `angle`, whose size there is S // 2.

    Of an odd number S of channels, the last stays as it is. The result has v's type.
    """
    cos, sin = angle.cos(), angle.sin()
    half = cos.shape[dim]
    p, q, rest = v.split([half, half, v.shape[dim] - 2 * half], dim)
    return torch.cat([p * cos - q * sin, p * sin + q * cos, rest.to(cos.dtype)], dim).to(v.dtype)


def turned_back(state: Tensor, angle: Tensor) -> Tensor:
    """A state `(..., H, S, P)` as seen after the angles `(..., S // 2)`."""
    return turned(state, -angle[..., None, :, None], -2)


def scan_step(inputs: ScanInputs, state: Tensor, turn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One frame (T = 1): y `(B, 1, n, H, P)` without D x, and the state after it, of the state's dtype or a wider one.

    The caller resets the state, by zeroing it. `turn` `(B, S // 2)`: angles by which the state turns back before the
    frame. On CUDA, without gradient and with one token per frame, it is one kernel (scan_step_triton.py).
    """
    if step_kernel is not None and not torch.is_grad_enabled() and step_kernel.fit(inputs.x, state):
        x, b, c, a = (v[:, 0, 0] for v in inputs)
        y, state = step_kernel.scan_step(x, b, c, a, state, turn)
        return y[:, None, None], state
    if turn is not None:
        state = turned_back(state, turn)
    x, b, c, a = (v[:, 0] for v in inputs)
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


def scan_query_step(inputs: ScanInputs, state: Tensor) -> Tensor:
    """One query frame (T = 1) that reads the state and does not change it: y `(B, 1, n, H, P)` without D x."""
    if inputs.x.shape[2] > 1:
        return scan_step(inputs, state)[0]
    x, b, c, a = (v[:, 0, 0] for v in inputs)
    past = torch.einsum("bs,bhsp->bhp", c, state) * a.exp()[..., None]
    return (past + (b * c).sum(-1)[:, None, None] * x)[:, None, None]


def scan(
    clean: ScanInputs,
    first: Tensor,
    state: Tensor,
    chunk: int = 64,
    query: ScanInputs | None = None,
    at: Tensor | None = None,
    chunk_frames: int = 1,
    skip: Tensor | None = None,
) -> ScanOutput:
    """Scan T frames, in the form that is fastest on the inputs' device.

    Args:
        clean: of the stream that writes the state. query: of a stream that only reads it (see the module's text).
        first: `(B, T)` bool, frames before which the state is zero.
        state: `(B, H, S, P)` float32, before frame 0.
        chunk: frames per chunk of the scan; the kernels for CUDA use a size of their own.
        at: `(B, M)`, frames after which the state is returned as well, without gradient, to start dreams from.
        chunk_frames: query frames that are scanned together; T is a multiple of it.
        skip: `(H, 1)`, D of each head; None for 0.
    """
    if chunk_frames == 1 and kernels is not None and kernels.fit(clean.x, clean.b, clean.c):
        return _scan_kernels(clean, first, state, query, at, skip)
    out = scan_chunked(clean, first, state, chunk, query, at, chunk_frames)
    if skip is None:
        return out
    query_y = None if out.query_y is None or query is None else out.query_y + skip * query.x
    return out._replace(y=out.y + skip * clean.x, query_y=query_y)


def _scan_kernels(
    clean: ScanInputs, first: Tensor, state: Tensor, query: ScanInputs | None, at: Tensor | None, skip: Tensor | None
) -> ScanOutput:
    """The scan by the kernels; under autocast in its precision, like matrix products."""
    assert kernels is not None
    inputs = clean
    if query is not None:  # its tokens precede the clean ones of their frame: they read the state and write nothing
        keeps = (False, False, True, False)  # of x, b, c and a
        pairs = zip(keeps, query, clean, strict=True)
        inputs = ScanInputs(*(torch.cat([q if keep else torch.zeros_like(q), v], 2) for keep, q, v in pairs))
    x, b, c, a = inputs
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x, b, c = (v.to(torch.get_autocast_dtype(x.device.type)) for v in (x, b, c))
    x, b, c, a = (v.contiguous() for v in (x, b, c, a))  # here the compiler can fuse the copies with what comes before
    y, last, start, cum, episode = kernels.scan_kernels(x, b, c, a, first, state.float(), skip, at is not None)
    y = y.to(clean.x.dtype)
    tokens = inputs.x.shape[2]
    states_at = None if at is None else _states_at(at, _kernel_chunks(inputs, start, cum, episode), tokens)
    if query is None:
        return ScanOutput(y, last, None, states_at)
    past, y = y.chunk(2, 2)
    query_y = past * query.a.cumsum(2).exp()[..., None] + _own_frame(query)
    query_y = query_y if skip is None else query_y + skip * query.x
    return ScanOutput(y, last, query_y, states_at)


def _kernel_chunks(inputs: ScanInputs, start: Tensor, cum: Tensor, episode: Tensor) -> _Chunks:
    """The kernels' chunks, which are cut by tokens and not by frames."""
    chunks = start.shape[1]
    size = cum.shape[-1] // chunks
    x = inputs.x.detach().flatten(1, 2)
    b = inputs.b.detach().flatten(1, 2)
    pad = -x.shape[1] % size
    if pad:
        x = _pad_time(x, pad)
        b = _pad_time(b, pad)
    x = x.unflatten(1, (chunks, size)).transpose(2, 3)
    b = b.unflatten(1, (chunks, size))
    cum = cum.unflatten(2, (chunks, size)).transpose(1, 2)
    segment = episode.unflatten(1, (chunks, size))  # counted from each chunk's start
    return _Chunks(x, b, cum, segment, torch.zeros_like(segment[..., 0]), start)


def _own_frame(query: ScanInputs) -> Tensor:
    """What the tokens of a query frame read of their own frame, like x."""
    x, b, c, a = query
    if x.shape[2] == 1:
        return (b * c).sum(-1)[..., None, None] * x
    decay = a.cumsum(2).transpose(2, 3)  # (B, T, H, n)
    inside = (c @ b.transpose(-1, -2))[:, :, None] * _causal_decay(decay, decay)
    return (inside @ x.transpose(2, 3)).transpose(2, 3)


def scan_chunked(
    clean: ScanInputs,
    first: Tensor,
    state: Tensor,
    chunk: int = 64,
    query: ScanInputs | None = None,
    at: Tensor | None = None,
    chunk_frames: int = 1,
) -> ScanOutput:
    """`scan` in torch, on any device and without D x: matrix products inside a chunk, one recurrence over chunks."""
    frames, tokens = clean.x.shape[1:3]
    chunk = max(1, min(chunk, frames) // chunk_frames) * chunk_frames
    segment = first.long().cumsum(1)
    pad = -frames % chunk
    if pad:  # padding writes nothing (b = 0) and keeps the state (a = 0)
        clean = ScanInputs(*(_pad_time(v, pad) for v in clean))
        query = query and ScanInputs(*(_pad_time(v, pad) for v in query))
        segment = torch.cat([segment, segment[:, -1:].expand(-1, pad)], 1)
    chunks = (frames + pad) // chunk
    x, b, c, a = _chunked(clean, chunks)
    segment = segment.view(len(segment), chunks, chunk)  # (B, K, frames)
    entering = torch.cat([torch.zeros_like(segment[:, :1, 0]), segment[:, :-1, -1]], 1)
    token_segment = segment.repeat_interleave(tokens, 2)
    cum = a.cumsum(-1)  # (B, K, H, L)

    # the state before each chunk
    keep = (token_segment == token_segment[..., -1:])[:, :, None]
    write = torch.where(keep, (cum[..., -1:] - cum), -torch.inf).exp()[..., None] * x
    written = b.transpose(-1, -2)[:, :, None] @ write  # (B, K, H, S, P)
    states = _over_chunks(torch.cat([state[:, None], written], 1), cum[..., -1], segment[..., -1] != entering)
    known = _Chunks(x, b, cum, token_segment, entering, states[:, :-1])

    same = token_segment[..., :, None] == token_segment[..., None, :]
    reads_start = (token_segment == entering[..., None])[:, :, None]  # tokens of the entering state's episode
    weight = (c @ b.transpose(-1, -2))[:, :, None] * _causal_decay(cum, cum, same[:, :, None])
    y = weight @ x + torch.where(reads_start, cum.exp(), 0.0)[..., None] * (c[:, :, None] @ known.start)

    query_y = None
    if query is not None:
        query_y = _read(query, known, reads_start, same, tokens * chunk_frames, chunk_frames > 1)
        query_y = _unchunk(query_y, tokens)[:, :frames]
    states_at = None if at is None else _states_at(at, known, tokens)
    last = states[:, -1].clone()  # a view would keep the states of all chunks in memory
    return ScanOutput(_unchunk(y, tokens)[:, :frames], last, query_y, states_at)


def _over_chunks(written: Tensor, decay: Tensor, cut: Tensor, most: int = 256) -> Tensor:
    """The recurrence from chunk to chunk, as one product with the (K + 1)^2 decays between chunks.

    More than `most` chunks are done in several products, so that the cost stays linear in time.

    Args:
        written: `(B, K + 1, H, S, P)`, the state before all chunks, then what each chunk adds.
        decay: `(B, K, H)`, log decay over each chunk. cut: `(B, K)`, whether an episode begins in the chunk.

    Returns:
        the states before each chunk and after the last, like `written`.
    """
    if decay.shape[1] > most:
        parts = []
        state = written[:, :1]
        for k in range(0, decay.shape[1], most):
            now = slice(k, k + most)
            states = _over_chunks(torch.cat([state, written[:, 1:][:, now]], 1), decay[:, now], cut[:, now], most)
            parts.append(states[:, :-1])
            state = states[:, -1:]
        return torch.cat([*parts, state], 1)
    since = F.pad(decay.cumsum(1), (0, 0, 1, 0)).transpose(1, 2)  # (B, H, K + 1)
    segment = F.pad(cut.long().cumsum(1), (1, 0))
    same = (segment[:, :, None] == segment[:, None])[:, None]
    with torch.autocast(written.device.type, enabled=False):  # states are sums over thousands of frames
        states = _causal_decay(since, since, same) @ written.transpose(1, 2).flatten(3).to(decay.dtype)
    return states.transpose(1, 2).unflatten(3, written.shape[3:])


def _read(
    query: ScanInputs, clean: _Chunks, reads_start: Tensor, same: Tensor, own_tokens: int, episodes_inside: bool
) -> Tensor:
    """The query stream's outputs `(B, K, H, L, P)`: of the clean past, and of its own frame or chunk of frames.

    Args:
        reads_start: `(B, K, 1, L)`, tokens that see the state before the scan's chunk. same: `(B, K, L, L)`, pairs of
            tokens of one episode.
        own_tokens: tokens of a query frame, or of a chunk of query frames.
        episodes_inside: whether an episode may begin within them.
    """
    x, b, c, a = _chunked(query, clean.x.shape[1])
    frame_of = torch.arange(x.shape[-2], device=x.device) // own_tokens
    own = a.unflatten(-1, (-1, own_tokens)).cumsum(-1)  # (B, K, H, frames, n)
    ends = clean.cum.unflatten(-1, (-1, own_tokens))[..., -1]
    # log decay from the chunk's start to the query token
    since = (F.pad(ends, (1, 0))[..., :-1, None] + own).flatten(-2)
    past = (same & (frame_of[:, None] > frame_of))[:, :, None]
    decay = torch.where(past, since[..., :, None] - clean.cum[..., None, :], -torch.inf).exp()
    y = ((c @ clean.b.transpose(-1, -2))[:, :, None] * decay) @ clean.x
    y = y + torch.where(reads_start, since.exp(), 0.0)[..., None] * (c[:, :, None] @ clean.start)
    if own_tokens == 1:
        return y + (b * c).sum(-1)[:, :, None, :, None] * x
    x, b, c = (v.unflatten(-2, (-1, own_tokens)) for v in (x, b, c))
    same_own = None
    if episodes_inside:
        pairs = same.unflatten(-1, (-1, own_tokens)).unflatten(-3, (-1, own_tokens))  # (B, K, frames, n, frames, n)
        same_own = pairs.diagonal(dim1=2, dim2=4).movedim(-1, 2)[:, :, None]
    inside = (c @ b.transpose(-1, -2))[:, :, None] * _causal_decay(own, own, same_own)
    return y + (inside @ x).flatten(-3, -2)


@torch.no_grad()
def _states_at(at: Tensor, clean: _Chunks, tokens: int) -> Tensor:
    """States after the frames `at` `(B, M)`: the state before the chunk, and what the chunk's tokens wrote until
    then."""
    rows = torch.arange(len(at), device=at.device)[:, None]
    size = clean.cum.shape[-1]
    token = at * tokens + tokens - 1  # the frame's last
    k = token // size
    end = token % size
    cum = clean.cum[rows, k]  # (B, M, H, L)
    segment = clean.segment[rows, k]  # (B, M, L)
    cum_end = cum.gather(-1, end[..., None, None].expand(-1, -1, cum.shape[2], 1))
    segment_end = segment.gather(-1, end[..., None])
    counted = (torch.arange(segment.shape[-1], device=at.device) <= end[..., None]) & (segment == segment_end)
    decay = torch.where(counted[:, :, None], cum_end - cum, -torch.inf).exp()
    with torch.autocast(clean.x.device.type, enabled=False):  # dreams start from these states
        written = clean.b[rows, k].to(decay.dtype).transpose(-1, -2)[:, :, None] @ (decay[..., None] * clean.x[rows, k])
    carry = torch.where((segment_end[..., 0] == clean.entering[rows, k])[..., None], cum_end[..., 0].exp(), 0.0)
    return carry[..., None, None] * clean.start[rows, k] + written


def scan_reference(
    clean: ScanInputs, first: Tensor, state: Tensor, query: ScanInputs | None = None, chunk_frames: int = 1
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The slow reference: the recurrence token by token, without D x.

    Returns:
        y, the state after each frame, and the query stream's y (empty without one).
    """
    ys = []
    states = []
    query_ys = []
    query_state = state
    for t in range(clean.x.shape[1]):
        query_state = state if t % chunk_frames == 0 else query_state
        state, query_state = (
            torch.where(first[:, t, None, None, None], torch.zeros_like(s), s) for s in (state, query_state)
        )
        if query is not None:
            y, query_state = _token_by_token(query, t, query_state)
            query_ys.append(y)
        y, state = _token_by_token(clean, t, state)
        ys.append(y)
        states.append(state)
    return torch.stack(ys, 1), states, torch.stack(query_ys, 1) if query is not None else torch.empty(0)


def _token_by_token(inputs: ScanInputs, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for i in range(inputs.x.shape[2]):
        write = torch.einsum("bs,bhp->bhsp", inputs.b[:, t, i], inputs.x[:, t, i])
        state = inputs.a[:, t, i].exp()[..., None, None] * state + write
        outputs.append(torch.einsum("bs,bhsp->bhp", inputs.c[:, t, i], state))
    return torch.stack(outputs, 1), state


def _causal_decay(to: Tensor, since: Tensor, same: Tensor | None = None) -> Tensor:
    """exp(to_i - since_j) for j <= i (and the same episode), else 0. The mask comes before exp, which would overflow
    above the diagonal."""
    causal = torch.ones(to.shape[-1], since.shape[-1], dtype=torch.bool, device=to.device).tril()
    mask = causal if same is None else same & causal
    return torch.where(mask, to[..., :, None] - since[..., None, :], -torch.inf).exp()


def _chunked(inputs: ScanInputs, chunks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x `(B, K, H, L, P)`, b and c `(B, K, L, S)`, a `(B, K, H, L)`, for L tokens per chunk."""
    batch = inputs.x.shape[0]
    x, b, c, a = (v.reshape(batch, chunks, -1, *v.shape[3:]) for v in inputs)
    return x.transpose(2, 3), b, c, a.transpose(2, 3)


def _unchunk(y: Tensor, tokens: int) -> Tensor:
    """`(B, K, H, L, P)` back to `(B, T, n, H, P)`."""
    return y.transpose(2, 3).flatten(1, 2).unflatten(1, (-1, tokens))


def _pad_time(v: Tensor, pad: int) -> Tensor:
    return torch.cat([v, v.new_zeros(v.shape[0], pad, *v.shape[2:])], 1)
