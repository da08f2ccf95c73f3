"""The residual stream through layers: by kernels as by torch."""

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.kernels import adaln as residual
from longdream.worldmodel.kernels.adaln import Flow, Residual

# Tokens and width: a frame that is a tile, part of one, several and a part; widths that are a power of two, or not.
SIZES = [(16, 64), (1, 24), (3, 320), (20, 512), (37, 160)]
PARTS = [(0, 1, 2), (0, 2), (1, 2)]  # of a layer with all, without attention, without a mixer


@pytest.fixture
def always(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels wherever they can run."""
    assert residual.kernels is not None
    if device == "cpu":
        monkeypatch.setattr(residual.kernels, "fit", lambda u: True)


def draw(tokens: int, width: int, device: str) -> tuple[Tensor, ...]:
    """A stream, what modulates it, two layers' offsets to that, and a weight for what parts do; all want gradients."""
    drawn = torch.randn(2, 3, tokens, width) + 0.5, torch.randn(2, 3, 1, 9, width), torch.randn(2, 9, width)
    return tuple(v.to(device).requires_grad_() for v in (*drawn, torch.randn(width)))


def through(
    u: Tensor, cond: Tensor, offsets: Tensor, weight: Tensor, parts: tuple[int, ...], clip: bool
) -> tuple[Tensor, ...]:
    """What each part of two layers takes in, and the stream at the end."""
    flow, taken = Flow(u), []
    for offset in offsets.unbind():
        stream = Residual(flow, cond, offset, clip)
        for part in parts:
            taken.append(stream.into(part))
            stream.give(part, torch.tanh(weight.to(taken[-1].dtype) * taken[-1]))
        flow = stream.flow
    return (*taken, flow.end(cond))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def gradients(outs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(outs, inputs, [torch.randn(v.shape).to(v) for v in outs], materialize_grads=True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_kernels_are_torch_in_values_and_gradients(device: str, tokens: int, width: int, parts: tuple) -> None:
    inputs = draw(tokens, width, device)
    exact = tuple(v.detach().double().requires_grad_() for v in inputs)
    got, wanted = through(*inputs, parts, clip=True), through(*exact, parts, clip=False)  # type: ignore[arg-type]
    assert got[0].grad_fn is not None and "longdream" in got[0].grad_fn.name()
    pairs = zip((*got, *gradients(got, inputs)), (*wanted, *gradients(wanted, exact)), strict=True)
    for a, b in pairs:
        assert a.dtype == torch.float32 and relative(a, b) < 3e-6


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("which", [0, 1, 3, 4])
def test_one_output_alone(device: str, which: int) -> None:
    inputs = draw(5, 32, device)
    exact = tuple(v.detach().double().requires_grad_() for v in inputs)
    got, wanted = (through(*v, (0, 1), clip)[which : which + 1] for v, clip in ((inputs, True), (exact, False)))  # type: ignore[arg-type]
    for a, b in zip(gradients(got, inputs), gradients(wanted, exact), strict=True):
        assert relative(a, b) < 3e-6 if b.any() else not a.any()


@pytest.mark.usefixtures("always")
def test_a_stream_and_a_condition_in_half_precision(device: str, half: torch.dtype) -> None:
    """Under autocast parts take in its precision, whatever the stream's."""
    inputs = draw(6, 48, device)
    for kinds in ((half, half), (torch.float32, half), (half, torch.float32)):
        given = tuple(v.detach().to(kind).requires_grad_() for v, kind in zip(inputs, kinds, strict=False))
        given = (*given, *inputs[2:])
        with torch.autocast(device, half):
            got = through(*given, (0, 1, 2), clip=True)  # type: ignore[arg-type]
        wanted = through(*inputs, (0, 1, 2), clip=False)  # type: ignore[arg-type]
        assert {v.dtype for v in got[:-1]} == {half}
        found = gradients(got, given)
        assert [v.dtype for v in found] == [*kinds, torch.float32, torch.float32]
        for a, b in zip((*got, *found), (*wanted, *gradients(wanted, inputs)), strict=True):
            assert relative(a.float(), b.double()) < 3e-2


@pytest.mark.usefixtures("always")
def test_compiled_without_breaks(device: str) -> None:
    inputs = draw(4, 32, device)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return through(*inputs, (0, 1, 2), clip=True)  # type: ignore[arg-type]

    compiled = torch.compile(run, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    got, wanted = compiled(*inputs), run(*inputs)
    for a, b in zip((*got, *gradients(got, inputs)), (*wanted, *gradients(wanted, inputs)), strict=True):
        assert relative(a, b.double()) < 1e-6


@pytest.mark.usefixtures("always")
def test_the_same_bits_twice(device: str) -> None:
    inputs = draw(7, 40, device)
    once, again = (gradients(through(*inputs, (0, 1, 2), clip=True), inputs) for _ in range(2))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_part_that_gives_nothing_leaves_the_stream_alone() -> None:
    u, cond, offsets, _ = draw(2, 8, "cpu")
    stream = Residual(Flow(u), cond, offsets[0])
    stream.into(0)
    assert stream.flow.end(cond) is u
