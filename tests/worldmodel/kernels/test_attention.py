import math

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longdream.worldmodel.kernels.attention import (
    QKV,
    Cache,
    attend,
    attend_causal,
    attend_flex,
    attend_reference,
    attend_step,
    cache_after,
    cache_at,
    flex_attention_mask,
    push,
)
from longdream.worldmodel.kernels.rope import apply_rope, rope_table

BATCH = 3
HEADS = 2
HEAD = 6
TOLERANCE = 2e-6  # rotary angles are float32 whatever the type of the values
# frames, tokens, window, query frames
SIZES = [
    (1, 1, 1, 16),
    (1, 2, 4, 1),
    (7, 1, 2, 16),
    (7, 3, 3, 2),
    (13, 1, 4, 4),
    (13, 4, 5, 13),
    (17, 2, 6, 3),
    (17, 1, 7, 5),
    (33, 2, 7, 16),
]


def draw(frames: int, tokens: int) -> QKV:
    size = (BATCH, frames, tokens, HEADS, HEAD)
    return QKV(*(torch.randn(*size, dtype=torch.float64, requires_grad=True) for _ in range(3)))


def draw_cache(tokens: int, window: int, age: list[int] | None = None) -> Cache:
    """Random content, also in the slots that are not valid."""
    k, v = (
        torch.randn(BATCH, window - 1, tokens, HEADS, HEAD, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    return Cache(k, v, torch.tensor(age if age else [0, (window - 1) // 2, window - 1]))


def resets(frames: int) -> Tensor:
    """Three clips: without a reset; at frame 0 and in the middle; anywhere."""
    first = torch.zeros(BATCH, frames, dtype=torch.bool)
    first[1, 0] = first[1, frames // 2] = True
    first[2] = torch.rand(frames) < 0.25
    return first


def visible(first: Tensor, age: Tensor, reach: int, row: int, t: int) -> list[int]:
    """Frames before t that frame t of a row sees, by walking back; -1 is the newest frame of the cache."""
    seen = []
    for s in range(t - 1, t - reach - 1, -1):
        begun = first[row, s + 1] if s + 1 >= 0 else False  # frame s + 1 begins an episode: s is of another one
        if begun or s < -int(age[row]):
            break
        seen.append(s)
    return seen


def part(heads: QKV, t: int) -> QKV:
    return QKV(*(v[:, t : t + 1] for v in heads))


def close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("frames", "tokens", "window", "query_frames"), SIZES)
def test_rectangles_are_the_reference_in_values_and_gradients(
    frames: int, tokens: int, window: int, query_frames: int
) -> None:
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    cache = draw_cache(tokens, window)
    first = resets(frames)
    got = attend(clean, first, cache, query, query_frames)
    wanted = attend_reference(clean, first, cache), attend_reference(clean, first, cache, query)
    close(attend(clean, first, cache, None, query_frames)[0], wanted[0])
    cotangents = [torch.randn_like(v) for v in wanted]
    grads = []
    inputs = [*clean, *query, cache.k, cache.v]
    for y in (got, wanted):
        assert y[1] is not None
        grads.append(torch.autograd.grad(y, inputs, cotangents, materialize_grads=True))
    for a, b in zip((*got, *grads[0]), (*wanted, *grads[1]), strict=True):
        assert a is not None
        close(a, b)


@pytest.mark.parametrize(("frames", "tokens", "window", "query_frames"), SIZES)
def test_a_frame_sees_its_window_of_its_episode_and_nothing_else(
    frames: int, tokens: int, window: int, query_frames: int
) -> None:
    """By gradients: of values, zero exactly outside of the window and not zero inside, for both streams."""
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    cache = draw_cache(tokens, window)
    first = resets(frames)
    y, query_y = attend(clean, first, cache, query, query_frames)
    assert query_y is not None
    for t in range(frames):
        for qkv, out in ((clean, y), (query, query_y)):
            inputs = [cache.k, cache.v, clean.k, clean.v, query.k, query.v]
            grads = torch.autograd.grad(out[:, t].square().sum(), inputs, retain_graph=True, materialize_grads=True)
            reached = [g.abs().sum((2, 3, 4)) > 0 for g in grads]
            values = [torch.cat([reached[1], reached[3]], 1), reached[5]]
            keys = [torch.cat([reached[0], reached[2]], 1), reached[4]]
            for row in range(BATCH):
                wanted = {s + window - 1 for s in visible(first, cache.age, window - 1, row, t)}
                own = {t + window - 1} if qkv is clean else set()
                assert set(values[0][row].nonzero().flatten().tolist()) == wanted | own
                assert set(keys[0][row].nonzero().flatten().tolist()) <= wanted | own
                assert values[1][row].nonzero().flatten().tolist() == ([t] if qkv is query else [])
                assert set(keys[1][row].nonzero().flatten().tolist()) <= {t}


@pytest.mark.parametrize("query_frames", [1, 4, 16])
def test_what_a_cache_holds_beyond_its_age_is_nothing(query_frames: int) -> None:
    clean = draw(9, 2)
    query = draw(9, 2)
    cache = draw_cache(2, 5)
    first = resets(9)
    stale = (torch.arange(4) < 4 - cache.age[:, None])[..., None, None, None]
    poisoned = Cache(torch.where(stale, 1e30, cache.k), torch.where(stale, 1e30, cache.v), cache.age)
    for a, b in zip(
        attend(clean, first, cache, query, query_frames),
        attend(clean, first, poisoned, query, query_frames),
        strict=True,
    ):
        assert a is not None and b is not None
        assert torch.equal(a, b)
    assert torch.equal(attend_step(part(clean, 0), cache), attend_step(part(clean, 0), poisoned))


@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (3, 2), (1, 4), (2, 7)])
def test_frame_by_frame_is_the_clip(tokens: int, window: int) -> None:
    frames = 13
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    cache = draw_cache(tokens, window)
    first = resets(frames)
    y, query_y = attend(clean, first, cache, query, 4)
    everywhere = cache_at(clean, first, cache, torch.arange(frames).expand(BATCH, -1), window - 1)
    assert query_y is not None
    for t in range(frames):
        cache = cache._replace(age=torch.where(first[:, t], 0, cache.age))
        close(attend_step(part(query, t), cache), query_y[:, t : t + 1])
        close(attend_step(part(clean, t), cache), y[:, t : t + 1])
        cache = push(cache, clean.k[:, t : t + 1], clean.v[:, t : t + 1], window - 1)
        assert torch.equal(everywhere.age[:, t], cache.age)
        for row in range(BATCH):
            valid = slice(window - 1 - int(cache.age[row]), None)
            assert torch.equal(everywhere.k[row, t, valid], cache.k[row, valid])
            assert torch.equal(everywhere.v[row, t, valid], cache.v[row, valid])


@pytest.mark.parametrize(("held", "reach"), [(0, 0), (4, 4), (3, 9), (0, 6)])
def test_the_cache_after_a_clip_is_the_one_after_its_last_frame(held: int, reach: int) -> None:
    clean = draw(13, 2)
    cache = draw_cache(2, held + 1)
    first = resets(13)
    for frames in (1, 2, 5, 13):
        shown = QKV(*(v[:, :frames] for v in clean))
        got = cache_after(shown, first[:, :frames], cache, reach)
        wanted = cache_at(shown, first[:, :frames], cache, torch.full((BATCH, 1), frames - 1), reach)
        assert torch.equal(got.age, wanted.age[:, 0])
        for row in range(BATCH):
            valid = slice(got.k.shape[1] - int(got.age[row]), None)
            assert torch.equal(got.k[row, valid], wanted.k[row, 0, valid])
            assert torch.equal(got.v[row, valid], wanted.v[row, 0, valid])


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("cut", [1, 2, 9, 12])
def test_two_parts_with_the_cache_carried_are_one_pass(window: int, cut: int) -> None:
    clean = draw(13, 2)
    cache = draw_cache(2, window)
    first = resets(13)
    whole, _ = attend(clean, first, cache, None, 4)
    between = cache_at(clean, first, cache, torch.full((BATCH, 1), cut - 1), window - 1)
    between = Cache(between.k[:, 0], between.v[:, 0], between.age[:, 0])
    tail, _ = attend(QKV(*(v[:, cut:] for v in clean)), first[:, cut:], between, None, 3)
    close(tail, whole[:, cut:])


def test_only_distances_count() -> None:
    """The same frames later in the clip, behind others of another episode, give the same."""
    clean = draw(21, 2)
    cache = draw_cache(2, 4, [0] * BATCH)
    for late in (1, 5, 13):
        late_first = torch.zeros(BATCH, 21, dtype=torch.bool)
        late_first[:, late] = True
        alone = QKV(*(v[:, late:] for v in clean))
        y, _ = attend(clean, late_first, cache, None, 16)
        close(y[:, late:], attend(alone, late_first[:, late:], cache, None, 16)[0])


def test_distances_do_count() -> None:
    """Equal keys at different distances are told apart."""
    clean = draw(5, 1)
    k = clean.k[:, :1].expand(-1, 5, -1, -1, -1)
    same = QKV(clean.q, k, clean.v)
    y, _ = attend(same, torch.zeros(BATCH, 5, dtype=torch.bool), draw_cache(1, 4, [0] * BATCH))
    mean = clean.v[:, 1:5].mean(1)  # what attention without positions would give at frame 4
    assert (y[:, 4] - mean).abs().amax() > 0.05


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_rotation_is_multiplication_by_complex_phases(size: int) -> None:
    x = torch.randn(2, 4, 1, 1, size)
    where = torch.arange(3, 7)
    half = size // 2
    rotated = apply_rope(x, rope_table(where, x.shape[-1]))
    for i in range(half):
        phase = torch.polar(torch.ones(4), where * 1000.0 ** -(i / half))
        wanted = torch.complex(x[..., i], x[..., half + i]) * phase[:, None, None]
        close(torch.complex(rotated[..., i], rotated[..., half + i]), wanted, 1e-5)
    assert torch.equal(rotated[..., 2 * half :], x[..., 2 * half :])
    assert math.isclose(rotated.norm().item(), x.norm().item(), rel_tol=1e-5)


def test_memory_grows_with_time_and_not_with_its_square() -> None:
    def kept(frames: int) -> int:
        """Bytes that autograd keeps for the backward pass."""
        total = 0

        def count(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with saved_tensors_hooks(count, lambda t: t):
            attend(draw(frames, 2), torch.zeros(BATCH, frames, dtype=torch.bool), draw_cache(2, 4), draw(frames, 2))
        return total

    assert kept(512) < 2.2 * kept(256) < 4.84 * kept(128)


# -- chunks, and the far past -----------------------------------------------------------------------------------------

# frames, tokens, window, chunk, query frames: whole chunks and parts of one, windows that are no multiple of a chunk
CHUNKS = [(13, 2, 10, 5, 16), (20, 1, 10, 5, 5), (7, 3, 3, 3, 1), (17, 1, 5, 2, 3), (12, 2, 7, 4, 8), (3, 1, 9, 4, 16)]


def same_in_values_and_gradients(got, wanted, inputs: list[Tensor]) -> None:
    cotangents = [torch.randn_like(v) for v in wanted]
    grads = []
    for y in (got, wanted):
        assert y[1] is not None
        grads.append(torch.autograd.grad(y, inputs, cotangents, materialize_grads=True))
    for a, b in zip((*got, *grads[0]), (*wanted, *grads[1]), strict=True):
        close(a, b)


@pytest.mark.parametrize(("frames", "tokens", "window", "chunk", "query_frames"), CHUNKS)
def test_chunks_are_the_reference(frames: int, tokens: int, window: int, chunk: int, query_frames: int) -> None:
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    first = resets(frames)
    cache = draw_cache(tokens, window - chunk + 1)
    got = attend(clean, first, cache, query, query_frames, chunk)
    wanted = attend_reference(clean, first, cache, None, chunk), attend_reference(clean, first, cache, query, chunk)
    same_in_values_and_gradients(got, wanted, [*clean, *query, cache.k, cache.v])


@pytest.mark.parametrize(("frames", "tokens", "window", "chunk", "query_frames"), CHUNKS)
def test_a_frame_sees_its_chunk_and_what_of_the_window_lies_before_it(
    frames: int, tokens: int, window: int, chunk: int, query_frames: int
) -> None:
    clean = draw(frames, tokens)
    query = draw(frames, tokens)
    reach = window - chunk
    cache = draw_cache(tokens, reach + 1, [reach] * BATCH)
    outputs = attend(clean, torch.zeros(BATCH, frames, dtype=torch.bool), cache, query, query_frames, chunk)
    for t in range(frames):
        begin = t // chunk * chunk
        past = set(range(begin - reach, begin))
        own = set(range(begin, min(begin + chunk, frames)))
        for y, both in zip(outputs, ((past | own, set()), (past, own)), strict=True):
            assert y is not None
            values = torch.autograd.grad(
                y[:, t].sum(), [cache.v, clean.v, query.v], retain_graph=True, allow_unused=True
            )
            held, seen, asked = ([] if v is None else v[0].flatten(1).any(1).nonzero().flatten() for v in values)
            assert {int(s) - reach for s in held} | {int(s) for s in seen} == both[0]
            assert {int(s) for s in asked} == both[1]


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(("held", "reach", "query_frames"), [(0, 100, 5), (4, 100, 32), (3, 9, 4), (6, 6, 1)])
def test_the_far_past_is_the_reference(held: int, reach: int, query_frames: int, chunk: int) -> None:
    """Whether all of it is reached or not, however much of it there is and how much of that is valid."""
    clean = draw(17, 2)
    query = draw(17, 2)
    first = resets(17)
    cache = draw_cache(2, held + 1)
    got = attend_causal(clean, first, cache, reach, query, query_frames, chunk)
    wanted = [attend_reference(clean, first, cache, qkv, chunk, reach) for qkv in (None, query)]
    same_in_values_and_gradients(got, wanted, [*clean, *query, cache.k, cache.v])
    with torch.no_grad():
        close(attend_causal(clean, first, cache, reach, None, query_frames, chunk)[0], wanted[0])


@pytest.mark.parametrize("reach", [5, 100])
def test_a_cache_that_grows_holds_all_that_is_reached_and_no_more(reach: int) -> None:
    clean = draw(13, 2)
    first = resets(13)
    cache = draw_cache(2, 1)
    y, _ = attend_causal(clean, first, cache, reach)
    everywhere = cache_at(clean, first, cache, torch.arange(13).expand(BATCH, -1), reach)
    for t in range(13):
        cache = cache._replace(age=torch.where(first[:, t], 0, cache.age))
        close(attend_step(part(clean, t), cache), y[:, t : t + 1])
        cache = push(cache, clean.k[:, t : t + 1], clean.v[:, t : t + 1], reach)
        assert cache.k.shape[1] == min(t + 1, reach)
        assert torch.equal(everywhere.age[:, t], cache.age)
        for row in range(BATCH):
            newest = slice(-int(cache.age[row]), None)  # the frame itself, at least
            assert torch.equal(everywhere.k[row, t, newest], cache.k[row, newest])


@pytest.mark.parametrize(("held", "reach", "chunk"), [(4, 4, 1), (3, 9, 3)])
@pytest.mark.filterwarnings("ignore:flex_attention called without")  # its slow form is what runs here
@torch.no_grad()
def test_flex_attention_is_the_reference(held: int, reach: int, chunk: int) -> None:
    clean = draw(17, 2)
    query = draw(17, 2)
    first = resets(17)
    cache = draw_cache(2, held + 1)
    y, query_y = attend_flex(clean, cache, flex_attention_mask(first, cache, reach, True, chunk), query)
    assert query_y is not None
    close(y, attend_reference(clean, first, cache, None, chunk, reach))
    close(query_y, attend_reference(clean, first, cache, query, chunk, reach))


@pytest.mark.cuda
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("reach", [4, 100])
def test_compiled_flex_attention_is_the_reference_in_values_and_gradients(reach: int, chunk: int) -> None:
    """At an odd number of frames, in bfloat16 and near the exact values."""
    size = (BATCH, 67, 4, HEADS, 16)
    clean, query = (QKV(*(torch.randn(*size, device="cuda", requires_grad=True) for _ in range(3))) for _ in range(2))
    nothing = torch.zeros(BATCH, 0, *size[2:], device="cuda")
    first = resets(67).cuda()
    cache = Cache(nothing, nothing, torch.zeros(BATCH, dtype=torch.long, device="cuda"))
    got = attend_flex(clean, cache, flex_attention_mask(first, cache, reach, True, chunk), query)
    wanted = [attend_reference(clean, first, cache, qkv, chunk, reach) for qkv in (None, query)]
    cotangents = [torch.randn_like(v) for v in wanted]
    grads = [torch.autograd.grad(ys, [*clean, *query], cotangents) for ys in (got, wanted)]
    for a, b in zip((*got, *grads[0]), (*wanted, *grads[1]), strict=True):
        assert a is not None and (a - b).norm() < 0.02 * b.norm()
