"""The kernels that gate a scan's output against their reference, in float64."""

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.kernels.gated_norm import gated_norm_reference
from longdream.worldmodel.kernels.scan import kernels
from longdream.worldmodel.mixers.ssm import ScanMixer

if kernels is not None:
    from longdream.worldmodel.kernels import gated_norm_triton
    from longdream.worldmodel.kernels.gated_norm_triton import gated_norm

# Clips, frames, grid, block, heads, channels of a head: tiles that end with a clip, inside one, or never fill; widths
# that are a power of two or none, and wider than a tile's rows are many.
SIZES = [
    (2, 7, 4, 1, 4, 16),
    (2, 9, 4, 2, 8, 32),
    (3, 5, 4, 4, 2, 16),
    (2, 3, 6, 1, 3, 8),
    (2, 3, 6, 2, 4, 24),
    (1, 5, 6, 3, 4, 25),
    (2, 2, 6, 6, 2, 12),
    (3, 1, 6, 3, 1, 24),
    (3, 37, 1, 1, 4, 24),
    (1, 1, 1, 1, 1, 5),
    (1, 2, 2, 1, 2, 1024),
]
# of values and gradients, relative
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def draw(size: tuple, device: str, dtype: torch.dtype, beside: int = 37) -> tuple[Tensor, Tensor, Tensor, ScanMixer]:
    """y, the tensor whose first columns are the gate (`beside` are others), and the weight, which want gradients; and
    the mixer of these sizes."""
    batch, frames, grid, block, heads, head = size
    mixer = ScanMixer(DynamicsConfig(width=heads * head, num_heads=heads, state_size=8), grid, block)
    y = 0.5 + 2 * torch.randn(batch * mixer.side**2, frames, block**2, heads, head)
    inp = 2 * torch.randn(batch, frames, grid**2, heads * head + beside)
    weight = torch.rand(heads * head) + 0.5
    y, inp = (v.to(device, dtype).requires_grad_() for v in (y, inp))
    return y, inp, weight.to(device).requires_grad_(), mixer


def plainly(y: Tensor, gate: Tensor, weight: Tensor, mixer: ScanMixer) -> Tensor:
    """The same of any inputs that torch can norm."""
    return gated_norm_reference(y, gate, weight, mixer.side)


def gate_of(inp: Tensor, y: Tensor) -> Tensor:
    width = y.shape[-2] * y.shape[-1]
    return inp.split([width, inp.shape[-1] - width], -1)[0]


def relative(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach()
    return float((got.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["exact", "half", "mixed"])
def test_the_plain_form_in_values_and_gradients(device: str, half: torch.dtype, size: tuple, how: str) -> None:
    """Mixed: y in float32, the gate in half precision."""
    dtype = torch.float32 if how == "exact" else half
    y, inp, weight, mixer = draw(size, device, dtype)
    y = y.detach().float().requires_grad_() if how == "mixed" else y
    exact = [v.detach().double().requires_grad_() for v in (y, inp, weight)]
    h = gated_norm(y, gate_of(inp, y), weight, mixer.side)
    wanted = plainly(exact[0], gate_of(exact[1], y), exact[2], mixer)
    assert h.dtype == dtype and h.shape == wanted.shape
    cotangent = torch.randn_like(h)
    grads = torch.autograd.grad(h, (y, inp, weight), cotangent)
    exact_grads = torch.autograd.grad(wanted, exact, cotangent.double())
    assert [v.dtype for v in grads] == [y.dtype, dtype, torch.float32]
    for a, b in zip((h, *grads), (wanted, *exact_grads), strict=True):
        assert relative(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("beside", [0, 8, 16])
def test_a_gate_that_lies_in_any_way(device: str, beside: int) -> None:
    """Whole, as columns of a wider tensor, with frames before tokens and not, and with its columns apart."""
    y, inp, weight, mixer = draw((2, 5, 4, 2, 2, 12), device, torch.float32, beside)
    gate = gate_of(inp, y)
    wanted = gated_norm(y, gate.contiguous(), weight, mixer.side)
    for other in (gate, gate.transpose(1, 2).contiguous().transpose(1, 2), gate.mT.contiguous().mT):
        got = gated_norm(y, other, weight, mixer.side)
        assert torch.equal(got, wanted) and got.is_contiguous()
    transposed = y.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gated_norm(transposed, gate, weight, mixer.side), wanted)


def test_programs_go_through_several_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are, or more than are left, or a part of one."""
    y, inp, weight, mixer = draw((2, 47, 2, 1, 2, 128), device, torch.float32)
    wanted = torch.autograd.grad(gated_norm(y, gate_of(inp, y), weight, mixer.side).square().sum(), (y, inp, weight))
    for programs in (1, 7, 10):
        for settings in gated_norm_triton.SETTINGS.values():
            monkeypatch.setitem(settings, "PROGRAMS", programs)
        got = torch.autograd.grad(gated_norm(y, gate_of(inp, y), weight, mixer.side).square().sum(), (y, inp, weight))
        for a, b in zip(got, wanted, strict=True):
            assert relative(a, b.double()) < 1e-6


def test_what_is_far_from_zero_is_normed_too(device: str) -> None:
    """And a row of one number over and over; gates of any size."""
    y, inp, weight, mixer = draw((2, 3, 2, 1, 2, 8), device, torch.float32)
    with torch.no_grad():
        y.add_(300)
        y[0, 0] = 7
        inp[0, 0] = 1e4
        inp[0, 1] = -1e4
    exact = [v.detach().double().requires_grad_() for v in (y, inp, weight)]
    h = gated_norm(y, gate_of(inp, y), weight, mixer.side)
    wanted = plainly(exact[0], gate_of(exact[1], y), exact[2], mixer)
    grads = torch.autograd.grad(h.sum(), (y, inp, weight))
    exact_grads = torch.autograd.grad(wanted.sum(), exact)
    for a, b in zip((h, *grads), (wanted, *exact_grads), strict=True):
        assert relative(a, b) < 1e-4


def test_the_same_bits_twice(device: str, half: torch.dtype) -> None:
    y, inp, weight, mixer = draw((3, 33, 4, 2, 2, 48), device, half)

    def run() -> tuple[Tensor, ...]:
        h = gated_norm(y, gate_of(inp, y), weight, mixer.side)
        return h, *torch.autograd.grad(h.float().square().sum(), (y, inp, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_same_bits_with_a_thousand_programs(block: int) -> None:
    """At the size of M on video, and what it is in float64."""
    y, inp, weight, mixer = draw((4, 1024, 4, block, 8, 32), "cuda", torch.bfloat16, 336)
    exact = [v.detach().double().requires_grad_() for v in (y, inp, weight)]
    wanted = plainly(exact[0], gate_of(exact[1], y), exact[2], mixer)
    results = []
    cotangent = torch.randn_like(wanted).bfloat16()
    for _ in range(5):
        h = gated_norm(y, gate_of(inp, y), weight, mixer.side)
        results.append((h, *torch.autograd.grad(h, (y, inp, weight), cotangent)))
    exact_grads = torch.autograd.grad(wanted, exact, cotangent.double())
    for a, b in zip(results[0], (wanted, *exact_grads), strict=True):
        assert relative(a, b) < TOLERANCE[torch.bfloat16]
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_compiled(device: str) -> None:
    """One graph without breaks, the same values and gradients."""
    y, inp, weight, mixer = draw((2, 5, 4, 2, 2, 24), device, torch.float32)

    def loss(y: Tensor, inp: Tensor, weight: Tensor) -> Tensor:
        return gated_norm(y, gate_of(inp, y), weight, mixer.side).square().sum()

    plain = torch.autograd.grad(loss(y, inp, weight), (y, inp, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(y, inp, weight), (y, inp, weight)), plain, strict=True):
        assert relative(a, b.double()) < 1e-6


@pytest.mark.cuda
def test_kernels_fit() -> None:
    y = torch.zeros(1, 1, 1, 16, 128, device="cuda")
    assert gated_norm_triton.fit(y) and gated_norm_triton.fit(y.bfloat16())
    assert not gated_norm_triton.fit(y.double()) and not gated_norm_triton.fit(y.cpu())
    assert not gated_norm_triton.fit(torch.zeros(1, 1, 1, 16, 129, device="cuda"))
