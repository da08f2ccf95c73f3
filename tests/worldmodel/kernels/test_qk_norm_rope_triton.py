"""The kernel between projection and attention against what it is in place of, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from longdream.worldmodel.kernels.attention import kernels
from longdream.worldmodel.kernels.rope import apply_rope, rope_table

if kernels is not None:
    from longdream.worldmodel.kernels import qk_norm_rope_triton

ROWS = 2
# Frames, cached frames, tokens a frame, heads, channels: with a cache and without, more frames than the cache has and
# fewer; heads of any width; tiles that a frame fills, that end inside a token, and that many frames fill.
SIZES = [
    (9, 3, 16, 8, 32),
    (5, 0, 4, 2, 64),
    (2, 7, 3, 3, 128),
    (6, 2, 5, 3, 40),
    (37, 4, 1, 1, 24),
    (11, 1, 3, 2, 33),
    (150, 2, 1, 5, 16),
    (3, 1, 1, 2, 3),
]
# of values and gradients, relative: the kernel computes in float32, what it takes in and puts out is rounded
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def plain(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cache_k: Tensor, cache_v: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The slow truth, as `Attention` and `attend_kernels` have it."""
    q, k, v = qkv.unbind(-3)
    q, k = (layer_norm(part, q_weight.shape, weight) for part, weight in ((q, q_weight), (k, k_weight)))
    keys = apply_rope(torch.cat([cache_k, k], 1), rope)
    return apply_rope(q, rope[cache_k.shape[1] :]), keys, torch.cat([cache_v, v], 1)


def draw(size: tuple, device: str, dtype: torch.dtype, kept: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Everything that wants gradients, numbers of a head around a mean; and the rope."""
    frames, held, tokens, heads, head = size
    qkv = torch.randn(ROWS, frames, tokens, 3, heads, head) * 2 + torch.randn(ROWS, frames, tokens, 3, heads, 1)
    weights = [1 + 0.3 * torch.randn(head) for _ in range(2)]
    cache = [torch.randn(ROWS, held, tokens, heads, head).to(kept) for _ in range(2)]
    inputs = [v.to(device).requires_grad_() for v in (qkv.to(dtype), *weights, *cache)]
    return inputs, rope_table(torch.arange(held + frames, device=device), head)


def relative(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach()
    return float((got.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


def squares(*tensors: Tensor) -> Tensor:
    return torch.stack([v.float().square().sum() for v in tensors]).sum()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["float32", "half", "half in float32", "half with a float32 cache"])
def test_the_kernel_is_norm_cache_and_phases_in_values_and_gradients(
    device: str, half: torch.dtype, size: tuple, how: str
) -> None:
    dtype = torch.float32 if how == "float32" else half
    out = half if how in ("half", "half with a float32 cache") else torch.float32
    inputs, rope = draw(size, device, dtype, half if how == "half" else torch.float32)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    got = qk_norm_rope_triton.qk_norm_rope(*inputs, rope, out)
    wanted = plain(*exact, rope.double())
    assert [v.dtype for v in got] == [out] * 3
    cotangents = [torch.randn_like(v) for v in got]
    grads = torch.autograd.grad(got, inputs, cotangents)
    exact_grads = torch.autograd.grad(wanted, exact, [v.double() for v in cotangents])
    assert [v.dtype for v in grads] == [v.dtype for v in inputs]
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and relative(a, b) < TOLERANCE[out]
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.shape == b.shape and relative(a, b) < TOLERANCE[a.dtype]


def test_programs_go_from_tile_to_tile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward, fewer programs than tiles, and no whole number of tiles for each."""
    monkeypatch.setattr(qk_norm_rope_triton, "PROGRAMS", 2 * ROWS)
    monkeypatch.setattr(qk_norm_rope_triton, "BACKWARD", {"NUMBERS": 128, "num_warps": 1})
    inputs, rope = draw((7, 2, 3, 2, 32), device, torch.float32, torch.float32)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    got = qk_norm_rope_triton.qk_norm_rope(*inputs, rope, torch.float32)
    wanted = plain(*exact, rope.double())
    cotangents = [torch.randn_like(v) for v in got]
    grads = torch.autograd.grad(got, inputs, cotangents)
    exact_grads = torch.autograd.grad(wanted, exact, [v.double() for v in cotangents])
    for a, b in zip(grads, exact_grads, strict=True):
        assert relative(a, b) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("part", range(3))
def test_no_cotangent_of_others(device: str, part: int) -> None:
    """What comes from elsewhere than q, k or v alone is zero; cotangents may lie in memory as they like."""
    inputs, rope = draw((4, 2, 3, 2, 16), device, torch.float32, torch.float32)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    got = qk_norm_rope_triton.qk_norm_rope(*inputs, rope, torch.float32)[part]
    wanted = plain(*exact, rope.double())[part]
    cotangent = torch.randn(got.shape[::-1], device=device).permute(4, 3, 2, 1, 0)
    grads = torch.autograd.grad(got, inputs, cotangent)
    exact_grads = torch.autograd.grad(wanted, exact, cotangent.double(), allow_unused=True, materialize_grads=True)
    for a, b in zip(grads, exact_grads, strict=True):
        assert relative(a, b) < TOLERANCE[torch.float32]


def test_heads_of_one_number_throughout(device: str) -> None:
    """Nothing is left of them, and no gradient but a finite one."""
    inputs, rope = draw((3, 1, 2, 2, 24), device, torch.float32, torch.float32)
    with torch.no_grad():
        inputs[0].fill_(3.0)
    q, k, _ = qk_norm_rope_triton.qk_norm_rope(*inputs, rope, torch.float32)
    assert q.abs().max() < 1e-3 and k[:, 1:].abs().max() < 1e-3  # a mean is rounded, and eps small
    assert all(v.isfinite().all() for v in torch.autograd.grad(q.sum() + k.sum(), inputs))


def test_the_same_bits_twice(device: str, half: torch.dtype) -> None:
    inputs, rope = draw((33, 5, 4, 2, 32), device, half, torch.float32)

    def run() -> tuple[Tensor, ...]:
        results = qk_norm_rope_triton.qk_norm_rope(*inputs, rope, half)
        return *results, *torch.autograd.grad(squares(*results), inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.cuda
def test_the_same_bits_with_a_thousand_programs() -> None:
    """At the size of M on video, where each goes through several tiles."""
    inputs, rope = draw((1024, 9, 16, 8, 32), "cuda", torch.bfloat16, torch.float32)
    results = []
    for _ in range(5):
        out = qk_norm_rope_triton.qk_norm_rope(*inputs, rope, torch.bfloat16)
        results.append((*out, *torch.autograd.grad(out, inputs, [v.detach() for v in out])))
    assert all(v.isfinite().all() for v in results[0])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_compiled(device: str, half: torch.dtype) -> None:
    """One graph without breaks, the same values and gradients."""
    inputs, rope = draw((11, 3, 4, 2, 16), device, torch.float32, torch.float32)

    def loss(*inputs: Tensor) -> Tensor:
        return squares(*qk_norm_rope_triton.qk_norm_rope(*inputs, rope, half))

    plainly = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), plainly, strict=True):
        assert relative(a, b.double()) < 1e-6


def test_ops_are_as_they_are_described(device: str) -> None:
    """Fakes, schemas and gradients, as `torch.library` checks them."""
    inputs, rope = draw((3, 2, 2, 2, 16), device, torch.float32, torch.float32)
    torch.library.opcheck(qk_norm_rope_triton._qk_norm_rope, (*inputs, rope, torch.float32))


@pytest.mark.cuda
def test_kernels_fit() -> None:
    qkv = torch.zeros(1, 1, 1, 3, 1, 128, device="cuda")
    assert qk_norm_rope_triton.fit(qkv) and qk_norm_rope_triton.fit(qkv.bfloat16())
    assert not qk_norm_rope_triton.fit(qkv.double()) and not qk_norm_rope_triton.fit(qkv.cpu())
    assert not qk_norm_rope_triton.fit(torch.zeros(1, 1, 1, 3, 1, 129, device="cuda"))
