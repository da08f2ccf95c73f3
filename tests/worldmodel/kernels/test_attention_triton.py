"""The kernels for CUDA against the masked softmax in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.dynamics import Dynamics
from longdream.worldmodel.kernels import adaln, gated_norm, qk_norm_rope
from longdream.worldmodel.kernels.attention import (
    QKV,
    Cache,
    RotatedQKV,
    attend_kernels,
    attend_reference,
    attention_mask,
    kernels,
    key_segments,
    precision,
    rotate_qkv,
)

ROWS = 3
# Frames, tokens a frame, heads, channels, window, chunk, cached frames (None: the window's): tiles of 64 tokens that
# end with a frame, inside one, or never fill; windows within a tile, over several, and over all there is.
SIZES = [
    (9, 16, 2, 16, 3, 1, None),
    (13, 4, 1, 32, 10, 5, None),
    (37, 3, 2, 24, 6, 1, None),
    (70, 1, 1, 64, 4, 1, None),
    (20, 7, 1, 16, 1, 1, None),
    (11, 12, 3, 40, 100, 1, 0),
    (17, 5, 2, 16, 7, 3, None),
    (5, 2, 1, 128, 50, 2, 7),
]
# of values and gradients, relative: operands are rounded to about 22, 11 (TF32), 8 or 11 bits
TOLERANCE = {"highest": 5e-6, "high": 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(size: tuple, device: str, dtype: torch.dtype) -> tuple[QKV, QKV, Cache, Tensor, int, int]:
    """QKV of both streams and a cache that want gradients; frames that begin episodes: in one row none, in one the
    first and any, in one nearly all; reach and chunk."""
    frames, tokens, heads, head, window, chunk, held = size
    reach = window - chunk
    held = reach if held is None else held

    def some(count: int) -> Tensor:
        return torch.randn(ROWS, count, tokens, heads, head).to(device, dtype).requires_grad_()

    clean, query = (QKV(*(some(frames) for _ in range(3))) for _ in range(2))
    cache = Cache(some(held), some(held), torch.tensor([0, held // 2, held], device=device))
    first = torch.rand(ROWS, frames) < torch.tensor([0.0, 0.1, 0.8])[:, None]
    first[1, 0] = True
    return clean, query, cache, first.to(device), reach, chunk


def by_kernels(
    clean: QKV, cache: Cache, first: Tensor, reach: int, query: QKV | None, chunk: int
) -> tuple[Tensor, Tensor | None]:
    mask = attention_mask(first, cache)

    def rotated(qkv: QKV, cache: Cache | None, rope: Tensor) -> RotatedQKV:
        return RotatedQKV(*(v.to(precision(qkv.v)).contiguous() for v in rotate_qkv(qkv, cache, rope)))

    own = None if query is None else rotated(query, None, mask.rope[cache.k.shape[1] :])
    y, query_y = attend_kernels(rotated(clean, cache, mask.rope), mask.segment, reach, own, chunk)
    return y.to(clean.v.dtype), None if query_y is None else query_y.to(clean.v.dtype)


def exactly(clean: QKV, query: QKV, cache: Cache) -> tuple[QKV, QKV, Cache]:
    clean, query = (QKV(*(v.detach().double().requires_grad_() for v in part)) for part in (clean, query))
    return clean, query, Cache(*(v.detach().double().requires_grad_() for v in cache[:2]), cache.age)


def relative(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach()
    return float((got.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["highest", "high", "half"])
def test_kernels_are_the_masked_softmax_in_values_and_gradients(
    device: str, half: torch.dtype, size: tuple, how: str
) -> None:
    """Both streams; of a cache too, whose content beyond its age is nothing."""
    dtype = half if how == "half" else torch.float32
    torch.set_float32_matmul_precision(how if how != "half" else "high")
    clean, query, cache, first, reach, chunk = draw(size, device, dtype)
    inputs = [*clean, *query, *cache[:2]]
    exact = exactly(clean, query, cache)
    exact_inputs = [*exact[0], *exact[1], *exact[2][:2]]
    got = by_kernels(clean, cache, first, reach, query, chunk)
    wanted = [attend_reference(exact[0], first, exact[2], qkv, chunk, reach) for qkv in (None, exact[1])]
    assert got[1] is not None and got[0].dtype == dtype
    cotangents = [torch.randn_like(v) for v in got]
    grads = torch.autograd.grad(got, inputs, cotangents)
    exact_grads = torch.autograd.grad(
        wanted, exact_inputs, [v.double() for v in cotangents], allow_unused=True, materialize_grads=True
    )
    assert [v.dtype for v in grads] == [v.dtype for v in inputs]
    kind = precision(clean.v)  # on CUDA float32 goes through bfloat16, unless it has to be exact
    bound = TOLERANCE[how if kind == torch.float32 else kind]
    for a, b in zip((*got, *grads), (*wanted, *exact_grads), strict=True):
        assert relative(a, b) < bound
    alone = by_kernels(clean, cache, first, reach, None, chunk)
    assert alone[1] is None and torch.equal(alone[0], got[0])


def test_what_is_not_seen_has_no_part(device: str) -> None:
    """However large: another episode, frames beyond the window, a cache beyond its age."""
    clean, query, cache, first, reach, chunk = draw((21, 3, 2, 16, 4, 1, None), device, torch.float32)
    first[:] = False
    first[:, 9] = True
    # where such keys are seen, two ways to sum up their products differ by more than a weight can bear: not here
    cache = cache._replace(age=torch.zeros_like(cache.age))
    with torch.no_grad():
        for v in (clean.k, clean.v, query.k, query.v):
            v[:, :9] = 1e4
        cache.k.fill_(1e30)
        cache.v.fill_(1e30)
    y, query_y = by_kernels(clean, cache, first, reach, query, chunk)
    assert query_y is not None
    grads = torch.autograd.grad(y[:, 9:].sum() + query_y[:, 9:].sum(), [*clean, *query, *cache[:2]])
    assert y[:, 9:].isfinite().all() and query_y[:, 9:].isfinite().all()
    for v in grads[:6]:
        assert not v[:, :9].any() and v.isfinite().all()
    assert not grads[6].any() and not grads[7].any()


def test_no_cotangent_of_one_stream(device: str) -> None:
    clean, query, cache, first, reach, chunk = draw((9, 4, 1, 16, 3, 1, None), device, torch.float32)
    torch.set_float32_matmul_precision("highest")
    exact = exactly(clean, query, cache)
    got = by_kernels(clean, cache, first, reach, query, chunk)
    for y, qkv in zip(got, (None, exact[1]), strict=True):
        wanted = attend_reference(exact[0], first, exact[2], qkv, chunk, reach)
        assert y is not None
        grads = torch.autograd.grad(y.sum(), clean[1:], retain_graph=True)
        for a, b in zip(grads, torch.autograd.grad(wanted.sum(), exact[0][1:]), strict=True):
            assert relative(a, b) < 5e-6


def test_the_same_bits_twice(device: str, half: torch.dtype) -> None:
    clean, query, cache, first, reach, chunk = draw((33, 4, 2, 32, 5, 1, None), device, half)

    def run() -> tuple[Tensor, ...]:
        y, query_y = by_kernels(clean, cache, first, reach, query, chunk)
        assert query_y is not None
        return torch.autograd.grad(y.float().square().sum() + query_y.float().square().sum(), [*clean, *query])

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.cuda
def test_the_same_bits_with_a_thousand_programs() -> None:
    """At the size of M on video, where warps get far apart: a race between them would show."""
    q, k, v = (torch.randn(4, 1024, 16, 8, 32, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    assert kernels is not None
    first = torch.zeros(4, 1024, dtype=torch.bool, device="cuda")
    age = torch.zeros(4, dtype=torch.long, device="cuda")
    segment = key_segments(first, age, 0).int()
    results = []
    for _ in range(5):
        y = kernels.attention(q, k, v, None, segment, 9)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))))
    assert all(v.isfinite().all() for v in results[0])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_compiled_and_under_autocast(device: str, half: torch.dtype) -> None:
    """One graph without breaks, the same values and gradients."""
    clean, query, cache, first, reach, chunk = draw((11, 4, 2, 16, 3, 1, None), device, torch.float32)
    torch.set_float32_matmul_precision("highest")
    inputs = [*clean, *query]

    def loss(*inputs: Tensor) -> Tensor:
        y, query_y = by_kernels(QKV(*inputs[:3]), cache, first, reach, QKV(*inputs[3:]), chunk)
        assert query_y is not None and y.dtype == query_y.dtype == torch.float32
        return y.square().sum() + query_y.square().sum()

    plain = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), plain, strict=True):
        assert relative(a, b.double()) < 1e-6


@pytest.mark.parametrize(("mixer", "together"), [("hybrid", 1), ("causal", 1), ("window", 2)])
def test_m_takes_them(device: str, mixer: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both streams and from a state on; what it makes of clips by kernels, those around the attention included, is
    what torch makes of them."""
    others = [module.kernels for module in (gated_norm, adaln, qk_norm_rope)]
    assert kernels is not None and all(others)
    if device == "cpu":
        monkeypatch.setattr(kernels, "fit", lambda v, dtype: True)
    torch.set_float32_matmul_precision("highest")
    calls = []
    run = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *args: calls.append(args) or run(*args))
    z = torch.rand(2, 6, 4, 3, device=device)
    action = torch.rand(2, 6, 2, device=device)
    first = torch.zeros(2, 6, dtype=torch.bool, device=device)
    level = torch.rand(2, 6, device=device)
    first[1, 3] = True
    results: list[list[Tensor]] = []
    for path in ("triton", "sdpa"):
        for other in others:
            monkeypatch.setattr(other, "fit", lambda v, fits=path == "triton": fits)
        torch.manual_seed(0)
        config = DynamicsConfig(mixer, width=16, num_heads=2, state_size=8, window=4, chunk_frames=together)
        m = Dynamics(replace(config, attention=path), 2, 3, 2).to(device)  # type: ignore[arg-type]
        state = m(z, action, torch.ones_like(level), first, m.initial(2)).state
        out = m(z, action, torch.ones_like(level), first, state, query=(z, level))
        grads = torch.autograd.grad(out.pred.square().sum() + out.feat.square().sum(), [*m.parameters()])
        results.append([out.pred, out.feat, *grads])
        assert len(calls) == 2 * 3 if path == "triton" else not calls  # of each layer, and of its query stream
        calls.clear()
    for a, b in zip(*results, strict=True):
        assert relative(a, b.double()) < 1e-4


@pytest.mark.cuda
def test_kernels_fit() -> None:
    assert kernels is not None
    v = torch.zeros(1, 1, 1, 1, 128, device="cuda")
    assert kernels.fit(v, torch.float32) and kernels.fit(v, torch.bfloat16)
    assert not kernels.fit(v, torch.float64) and not kernels.fit(v.cpu(), torch.float32)
    assert not kernels.fit(torch.zeros(1, 1, 1, 1, 129, device="cuda"), torch.float32)
