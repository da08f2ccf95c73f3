"""The residual stream through layers: by kernels as by torch."""

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.kernels import adaln
from longdream.worldmodel.kernels.adaln import AdaLN, ResidualStream

# Tokens and width: a frame that is a tile, part of one, several and a part; widths that are a power of two, or not.
SIZES = [(16, 64), (1, 24), (3, 320), (20, 512), (37, 160)]
BRANCHES = [(0, 1, 2), (0, 2), (1, 2)]  # of a layer with all, without attention, without a mixer


@pytest.fixture
def always(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels wherever they can run."""
    assert adaln.kernels is not None
    if device == "cpu":
        monkeypatch.setattr(adaln.kernels, "fit", lambda u: True)


def draw(tokens: int, width: int, device: str) -> tuple[Tensor, ...]:
    """A stream, its condition, two layers' offsets to that, and a weight for the branches; all want gradients."""
    drawn = torch.randn(2, 3, tokens, width) + 0.5, torch.randn(2, 3, 1, 9, width), torch.randn(2, 9, width)
    return tuple(v.to(device).requires_grad_() for v in (*drawn, torch.randn(width)))


def through(
    u: Tensor, cond: Tensor, offsets: Tensor, weight: Tensor, branches: tuple[int, ...], clip: bool
) -> tuple[Tensor, ...]:
    """The inputs of each branch of two layers, and the stream at the end."""
    stream = ResidualStream(u)
    inputs: list[Tensor] = []
    for offset in offsets.unbind():
        layer = AdaLN(stream, cond, offset, clip)
        for branch in branches:
            inputs.append(layer.branch_input(branch))
            layer.add(branch, torch.tanh(weight.to(inputs[-1].dtype) * inputs[-1]))
        stream = layer.stream
    return (*inputs, stream.total(cond))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def gradients(outs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(outs, inputs, [torch.randn(v.shape).to(v) for v in outs], materialize_grads=True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_kernels_are_torch_in_values_and_gradients(device: str, tokens: int, width: int, branches: tuple) -> None:
    inputs = draw(tokens, width, device)
    exact = tuple(v.detach().double().requires_grad_() for v in inputs)
    # type: ignore[arg-type]
    got = through(*inputs, branches, clip=True)
    wanted = through(*exact, branches, clip=False)
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
    """Under autocast the branches' inputs have its precision, whatever the stream's."""
    inputs = draw(6, 48, device)
    for kinds in ((half, half), (torch.float32, half), (half, torch.float32)):
        converted = tuple(v.detach().to(kind).requires_grad_() for v, kind in zip(inputs, kinds, strict=False))
        converted = (*converted, *inputs[2:])
        with torch.autocast(device, half):
            got = through(*converted, (0, 1, 2), clip=True)  # type: ignore[arg-type]
        wanted = through(*inputs, (0, 1, 2), clip=False)  # type: ignore[arg-type]
        assert {v.dtype for v in got[:-1]} == {half}
        grads = gradients(got, converted)
        assert [v.dtype for v in grads] == [*kinds, torch.float32, torch.float32]
        for a, b in zip((*got, *grads), (*wanted, *gradients(wanted, inputs)), strict=True):
            assert relative(a.float(), b.double()) < 3e-2


@pytest.mark.usefixtures("always")
def test_compiled_without_breaks(device: str) -> None:
    inputs = draw(4, 32, device)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return through(*inputs, (0, 1, 2), clip=True)  # type: ignore[arg-type]

    compiled = torch.compile(run, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    got = compiled(*inputs)
    wanted = run(*inputs)
    for a, b in zip((*got, *gradients(got, inputs)), (*wanted, *gradients(wanted, inputs)), strict=True):
        assert relative(a, b.double()) < 1e-6


@pytest.mark.usefixtures("always")
def test_the_same_bits_twice(device: str) -> None:
    inputs = draw(7, 40, device)
    once, again = (gradients(through(*inputs, (0, 1, 2), clip=True), inputs) for _ in range(2))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_branch_without_output_leaves_the_stream_alone() -> None:
    u, cond, offsets, _ = draw(2, 8, "cpu")
    layer = AdaLN(ResidualStream(u), cond, offsets[0])
    layer.branch_input(0)
    assert layer.stream.total(cond) is u
