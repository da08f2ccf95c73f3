import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longdream.worldmodel.kernels.scan import ScanInputs, _over_chunks, scan, scan_query_step, scan_reference, scan_step

HEADS = 2
HEAD = 3
SIZE = 5
# Longer than the chunk by one, a frame alone, primes, exact multiples; 1, 3, 4 and 16 tokens a frame.
SIZES = [
    (1, 1, 64),
    (1, 16, 4),
    (7, 3, 4),
    (7, 16, 5),
    (13, 4, 5),
    (13, 1, 13),
    (64, 1, 64),
    (64, 3, 16),
    (65, 1, 64),
    (65, 4, 16),
    (130, 1, 64),
    (130, 3, 7),
    (130, 4, 33),
]


def draw(
    frames: int, tokens: int, batch: int = 3, decay: float = 1.0, dtype: torch.dtype = torch.float64
) -> ScanInputs:
    """Random inputs that want gradients; log decays per token uniform in [-decay, 0]."""
    lead = (batch, frames, tokens)
    x, b, c = (torch.randn(*lead, *tail, dtype=dtype) for tail in ((HEADS, HEAD), (SIZE,), (SIZE,)))
    return ScanInputs(*(v.requires_grad_() for v in (x, b, c, -decay * torch.rand(*lead, HEADS, dtype=dtype))))


def draw_state(batch: int = 3) -> Tensor:
    return torch.randn(batch, HEADS, SIZE, HEAD, dtype=torch.float64, requires_grad=True)


def resets(frames: int, chunk: int) -> Tensor:
    """Three clips: without a reset; at frame 0 and wherever a chunk begins; anywhere."""
    first = torch.zeros(3, frames, dtype=torch.bool)
    first[1, ::chunk] = True
    first[2] = torch.rand(frames) < 0.2
    return first


def part(inputs: ScanInputs, begin: int, end: int) -> ScanInputs:
    return ScanInputs(*(v[:, begin:end] for v in inputs))


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("frames", "tokens", "chunk"), SIZES)
def test_scan_is_the_recurrence_in_values_and_gradients(frames: int, tokens: int, chunk: int) -> None:
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    state = draw_state()
    first = resets(frames, chunk)
    skip = torch.randn(clean.x.shape[3], 1, dtype=state.dtype, requires_grad=True)
    out = scan(clean, first, state, chunk, query, skip=skip)
    y, states, query_y = scan_reference(clean, first, state, query)
    got = (out.y, out.state, out.query_y)
    wanted = (y + skip * clean.x, states[-1], query_y + skip * query.x)
    for a, b in zip(got, wanted, strict=True):
        close(a, b)
    cotangents = [torch.randn_like(v) for v in wanted]
    inputs = [*clean, *query, state, skip]
    for a, b in zip(*(torch.autograd.grad(v, inputs, cotangents) for v in (got, wanted)), strict=True):
        close(a, b, 1e-10)


def test_the_reference_is_the_equation() -> None:
    """S = exp(a) S + b x^T and y = S^T c, by hand: state 2, head dim 1, two tokens, a reset between two frames."""
    x = torch.tensor([[[[[1.0]], [[2.0]]], [[[5.0]], [[3.0]]]]])
    b = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 2.0]]]])
    c = torch.tensor([[[[1.0, 1.0], [3.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]]])
    a = torch.tensor([0.5, 0.25, 0.5, 0.5]).log().view(1, 2, 2, 1)
    inputs = ScanInputs(x, b, c, a)
    state = torch.tensor([[[[4.0], [8.0]]]])
    y, states, _ = scan_reference(inputs, torch.tensor([[False, True]]), state)
    # frame 0: S = (2 + 1, 4) then (.75, 1 + 2); frame 1, forgotten: (5, 5) then (2.5, 2.5 + 6)
    close(y.flatten(), torch.tensor([7.0, 5.25, 5.0, 11.0]), 1e-6)
    close(torch.stack(states).flatten(), torch.tensor([0.75, 3.0, 2.5, 8.5]), 1e-6)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 7), (4, 64), (16, 5)])
def test_states_after_any_frame(tokens: int, chunk: int) -> None:
    frames = 23
    clean = draw(frames, tokens)
    state = draw_state()
    first = resets(frames, chunk)
    at = torch.cat([torch.arange(frames).expand(3, -1), torch.randint(0, frames, (3, 9))], 1)
    out = scan(clean, first, state, chunk, at=at)
    states = torch.stack(scan_reference(clean, first, state)[1], 1)
    assert out.states_at is not None and not out.states_at.requires_grad
    close(out.states_at, states[torch.arange(3)[:, None], at])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("cut", [1, 6, 13, 16])
def test_two_parts_with_the_state_carried_are_one_pass(tokens: int, cut: int) -> None:
    frames = 17
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    state = draw_state()
    first = resets(frames, 4)
    whole = scan(clean, first, state, 4, query)
    head = scan(part(clean, 0, cut), first[:, :cut], state, 5, part(query, 0, cut))
    tail = scan(part(clean, cut, frames), first[:, cut:], head.state, 3, part(query, cut, frames))
    assert whole.query_y is not None and head.query_y is not None and tail.query_y is not None
    close(torch.cat([head.y, tail.y], 1), whole.y)
    close(torch.cat([head.query_y, tail.query_y], 1), whole.query_y)
    close(tail.state, whole.state)
    inputs = [clean.x, clean.b, clean.a, state]  # the gradient flows through the carried state as well
    weight = torch.randn_like(whole.state)
    for a, b in zip(*(torch.autograd.grad(o.state, inputs, weight) for o in (tail, whole)), strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("tokens", [1, 3, 4, 16])
def test_frame_by_frame_is_the_scan(tokens: int) -> None:
    frames = 13
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    state = draw_state()
    first = resets(frames, 5)
    out = scan(clean, first, state, 5, query)
    assert out.query_y is not None
    for t in range(frames):
        state = torch.where(first[:, t, None, None, None], 0.0, state)
        before = state.clone()
        close(scan_query_step(part(query, t, t + 1), state), out.query_y[:, t : t + 1])
        assert torch.equal(state, before)
        y, state = scan_step(part(clean, t, t + 1), state)
        close(y, out.y[:, t : t + 1])
    close(state, out.state)


def test_a_reset_makes_separate_clips() -> None:
    """What was before a reset, however large, has no part in what comes after it."""
    frames = 21
    cut = 9
    clean = draw(frames, 2, dtype=torch.float32)
    first = torch.zeros(3, frames, dtype=torch.bool)
    first[:, cut] = True
    with torch.no_grad():
        clean.x[:, :cut] = 1e30
    state = torch.full((3, HEADS, SIZE, HEAD), 1e30)
    whole = scan(clean, first, state, 4, at=torch.full((3, 1), frames - 2))
    alone = scan(part(clean, cut, frames), first[:, cut:], torch.zeros_like(state), 4, at=torch.full((3, 1), 19 - cut))
    close(whole.y[:, cut:], alone.y, 1e-5)
    close(whole.state, alone.state, 1e-5)
    assert whole.states_at is not None and alone.states_at is not None
    close(whole.states_at, alone.states_at, 1e-5)
    x, b, c, a = torch.autograd.grad(whole.y[:, cut:].sum(), list(clean))
    assert not any(g[:, :cut].any() for g in (x, b, c))
    assert a[:, :cut].abs().amax() < 1e-5 * a.abs().amax()  # cumulative sums of what cancels


@pytest.mark.parametrize("tokens", [1, 4])
def test_padding_has_no_part_in_anything(tokens: int) -> None:
    """A last chunk filled up with real frames instead of padding gives the same for the frames before them."""
    clean = draw(16, tokens)
    query = draw(16, tokens)
    state = draw_state()
    first = resets(16, 8)
    with torch.no_grad():
        for v in (*clean[:3], *query[:3]):
            v[:, 13:] = 1e100
    at = torch.tensor([[12, 3]] * 3)
    long = scan(clean, first, state, 8, query, at)
    short = scan(part(clean, 0, 13), first[:, :13], state, 8, part(query, 0, 13), at)
    for a, b in ((long.y, short.y), (long.query_y, short.query_y)):
        assert a is not None and b is not None
        close(a[:, :13], b)
    assert long.states_at is not None and short.states_at is not None
    close(long.states_at, short.states_at)
    close(short.state, short.states_at[:, 0])


@pytest.mark.parametrize("tokens", [1, 4])
def test_thousands_of_frames_in_float32(tokens: int) -> None:
    """Decays that forget at once, that hardly forget, and both mixed: no overflow and no drift, backwards neither."""
    frames = 4000 // tokens
    clean = draw(frames, tokens, batch=2, dtype=torch.float32)
    with torch.no_grad():
        clean.a[0, :, :, 0] = -20.0
        clean.a[0, :, :, 1] = -1e-5
        clean.a[1, :, :, 0] = torch.where(torch.rand(frames, tokens) < 0.1, -20.0, -1e-3)
        clean.a[1, :, :, 1] = 0.0
    first = torch.zeros(2, frames, dtype=torch.bool)
    state = torch.ones(2, HEADS, SIZE, HEAD)
    out = scan(clean, first, state, 64, clean)
    exact = ScanInputs(*(v.detach().double() for v in clean))
    y, states, query_y = scan_reference(exact, first, state.double(), exact)
    assert out.query_y is not None
    for got, wanted in ((out.y, y), (out.query_y, query_y), (out.state, states[-1])):
        for row in range(2):
            # cumulative decays reach -1280 in a chunk: their differences keep four digits or so
            bound = 1e-3 * wanted[row].abs().amax().item()
            assert (got[row] - wanted[row]).abs().amax() < bound
    grads = torch.autograd.grad(out.y.square().mean() + out.query_y.mean(), list(clean))
    assert all(g.isfinite().all() and g.abs().amax() > 0 for g in grads)


def test_float32_stays_near_float64() -> None:
    """Relative error at decays that M starts with: time constants from 4 to 1,000 frames."""
    frames = 500
    exact = draw(frames, 1, decay=0.0)
    with torch.no_grad():
        exact.a[..., 0] = -1 / 4
        exact.a[..., 1] = -1 / 1000
    single = ScanInputs(*(v.detach().float() for v in exact))
    first = resets(frames, 77)
    state = draw_state().detach()
    got, wanted = (scan(s, first, state.to(s.x.dtype), 64, s) for s in (single, exact))
    for a, b in ((got.y, wanted.y), (got.query_y, wanted.query_y), (got.state, wanted.state)):
        assert a is not None and b is not None and a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 2e-6


def test_memory_grows_with_time_and_not_with_its_square() -> None:
    def kept(frames: int) -> int:
        """Bytes that autograd keeps for the backward pass."""
        total = 0

        def count(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        inputs = draw(frames, 2, batch=1)
        with saved_tensors_hooks(count, lambda t: t):
            scan(inputs, torch.zeros(1, frames, dtype=torch.bool), draw_state(1), 16, inputs)
        return total

    assert kept(256) < 2.2 * kept(128) < 4.84 * kept(64)


@pytest.mark.parametrize(
    ("frames", "tokens", "chunk", "chunk_frames"), [(12, 1, 4, 3), (20, 4, 7, 5), (10, 3, 64, 2), (5, 1, 1, 5)]
)
def test_chunks_of_query_frames_are_scanned_as_one(frames: int, tokens: int, chunk: int, chunk_frames: int) -> None:
    """From the state before the chunk of frames, also where an episode begins inside it."""
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    state = draw_state()
    first = resets(frames, 4)
    out = scan(clean, first, state, chunk, query, chunk_frames=chunk_frames)
    y, states, query_y = scan_reference(clean, first, state, query, chunk_frames)
    got = (out.y, out.state, out.query_y)
    wanted = (y, states[-1], query_y)
    cotangents = [torch.randn_like(v) for v in wanted]
    inputs = [*clean, *query, state]
    grads = (torch.autograd.grad(v, inputs, cotangents) for v in (got, wanted))
    for a, b in zip((*got, *next(grads)), (*wanted, *next(grads)), strict=True):
        close(a, b, 1e-10)
    assert (scan_reference(clean, first, state, query)[2] - query_y).abs().amax() > 0.1


@pytest.mark.parametrize("most", [1, 4, 13])
def test_many_chunks_in_parts_are_one_product(most: int) -> None:
    written = torch.randn(2, 14, HEADS, SIZE, HEAD, dtype=torch.float64, requires_grad=True)
    decay = (-torch.rand(2, 13, HEADS, dtype=torch.float64)).requires_grad_()
    cut = torch.rand(2, 13) < 0.2
    got, wanted = (_over_chunks(written, decay, cut, parts) for parts in (most, 13))
    close(got, wanted)
    weight = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(v, [written, decay], weight) for v in (got, wanted)), strict=True):
        close(a, b)
