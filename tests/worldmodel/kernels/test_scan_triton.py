"""The kernels for CUDA against the recurrence in float64: on CUDA, and on any machine that has Triton in its
interpreter, where `TRITON_INTERPRET=1` is set before Python starts. Neither is there in CI."""

import pytest
import torch
from torch import Tensor

from longdream.worldmodel.kernels.scan import ScanInputs, kernels, scan, scan_chunked, scan_reference

# Frames, tokens a frame, heads, channels, state: chunks of 64 tokens that end with a frame, inside one, or never fill;
# widths that are powers of two, are not, and take two programs or two turns.
SIZES = [
    (64, 1, 2, 16, 16),
    (131, 1, 1, 32, 8),
    (45, 3, 3, 24, 20),
    (9, 16, 2, 40, 32),
    (1, 4, 1, 64, 64),
    (70, 1, 1, 80, 33),
    (33, 4, 2, 128, 128),
]
# of values and gradients, relative: operands are rounded to about 22, 11 (TF32), 8 or 11 bits
TOLERANCE = {"highest": 5e-6, "high": 2e-3, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def draw(size: tuple[int, ...], device: str, dtype: torch.dtype, decay: float = 0.2) -> tuple[list[Tensor], Tensor]:
    """x, b, c, a and a state that want gradients; frames that begin episodes: in one row none, in one the first and
    any, in one nearly all."""
    frames, tokens, heads, head, state = size
    lead = (3, frames, tokens)
    x, b, c = (torch.randn(*lead, *tail) for tail in ((heads, head), (state,), (state,)))
    inputs = [x.to(dtype), (b * state**-0.5).to(dtype), c.to(dtype), -decay * torch.rand(*lead, heads)]
    inputs += [torch.randn(3, heads, state, head), torch.randn(heads, 1)]
    inputs = [v.to(device).requires_grad_() for v in inputs]
    first = torch.rand(3, frames) < torch.tensor([0.0, 0.05, 0.8])[:, None]
    first[1, 0] = True
    return inputs, first.to(device)


def by_kernels(inputs: list[Tensor], first: Tensor) -> tuple[Tensor, Tensor]:
    assert kernels is not None
    return kernels.scan_kernels(*inputs[:4], first, *inputs[4:])[:2]


def by_recurrence(inputs: list[Tensor], first: Tensor) -> tuple[Tensor, Tensor]:
    y, states, _ = scan_reference(ScanInputs(*inputs[:4]), first, inputs[4])
    return y + inputs[5] * inputs[0], states[-1]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["highest", "high", "half"])
def test_kernels_are_the_recurrence_in_values_and_gradients(
    device: str, half: torch.dtype, size: tuple[int, ...], how: str
) -> None:
    dtype = half if how == "half" else torch.float32
    torch.set_float32_matmul_precision(how if how != "half" else "high")
    inputs, first = draw(size, device, dtype)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    got = by_kernels(inputs, first)
    wanted = by_recurrence(exact, first)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    cotangents = [torch.randn_like(v) for v in got]
    grads = torch.autograd.grad(got, inputs, cotangents)
    exact_grads = torch.autograd.grad(wanted, exact, [v.double() for v in cotangents])
    assert [v.dtype for v in grads] == [v.dtype for v in inputs]
    bound = TOLERANCE[how if how in TOLERANCE else dtype]
    for name, a, b in zip(
        ("y", "state", *"xbca", "d state", "skip"), (*got, *grads), (*wanted, *exact_grads), strict=True
    ):
        assert relative(a, b) < bound, name


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("size", [(300, 1, 2, 24, 20), (29, 16, 1, 40, 32)])
def test_chunks_in_groups_carry_the_same_states(
    device: str, least: int, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few long sequences: 5 and 8 chunks, of which some groups have fewer."""
    assert kernels is not None
    inputs, first = draw(size, device, torch.float32)
    torch.set_float32_matmul_precision("highest")

    def run() -> list[Tensor]:
        got = by_kernels(inputs, first)
        return [*got, *torch.autograd.grad(got, inputs, [torch.ones_like(v) for v in got])]

    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    wanted = run()
    monkeypatch.setattr(kernels, "PROGRAMS", 10**6)
    monkeypatch.setattr(kernels, "MIN_CHUNKS", least)
    monkeypatch.setattr(kernels, "MIN_GROUPS", 1)
    for a, b in zip(run(), wanted, strict=True):
        assert relative(a, b.double()) < 2e-6


def test_one_cotangent_alone(device: str) -> None:
    """Of y or of the state after the last frame; and none for what needs none."""
    inputs, first = draw((70, 1, 2, 16, 16), device, torch.float32)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    for part, wanted in enumerate(by_recurrence(exact, first)):
        grads = torch.autograd.grad(by_kernels(inputs, first)[part].sum(), [inputs[0], inputs[3]])
        exact_grads = torch.autograd.grad(wanted.sum(), [exact[0], exact[3]], retain_graph=True)
        assert max(relative(a, b) for a, b in zip(grads, exact_grads, strict=True)) < 5e-6


def test_kernels_keep_clips_apart(device: str) -> None:
    """What was before a reset, however large, has no part in what comes after it; decays may be any."""
    inputs, first = draw((100, 2, 2, 16, 16), device, torch.float32)
    first[:] = False
    first[:, 37] = True
    with torch.no_grad():
        inputs[0][:, :37] = 1e30
        inputs[3][0] = -20.0
        inputs[3][1, ..., 0] = 0.0
        inputs[3][1, ..., 1] = -1e-5
    y, last = by_kernels(inputs, first)
    later = [v.detach()[:, 37:].double() for v in inputs[:4]]
    begin = torch.zeros_like(inputs[4]).double()
    skip = inputs[5].detach().double()
    exact, state = by_recurrence([*later, begin, skip], first[:, 37:])
    # in a chunk decays add up to -1280: their differences keep four digits or so
    assert relative(y[:, 37:], exact) < 1e-4 and relative(last, state) < 1e-4
    grads = torch.autograd.grad(y[:, 37:].sum(), inputs[:3])
    assert not any(v[:, :37].any() for v in grads) and all(v.isfinite().all() for v in grads)


def test_without_a_skip_it_is_as_with_none_of_x(device: str) -> None:
    assert kernels is not None
    inputs, first = draw((70, 2, 2, 16, 16), device, torch.float32)
    none = torch.zeros_like(inputs[5]).requires_grad_()
    results = []
    for skip in (None, none):
        got = kernels.scan_kernels(*inputs[:4], first, inputs[4], skip)[:2]
        results.append([*got, *torch.autograd.grad(got, inputs[:5], [torch.ones_like(v) for v in got])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_same_bits_twice(device: str) -> None:
    inputs, first = draw((90, 1, 3, 32, 16), device, torch.float32)
    once, again = (torch.autograd.grad(by_kernels(inputs, first)[0].square().sum(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_a_thousand_programs(dtype: torch.dtype) -> None:
    """At the size of M on video, where warps get far apart: a race between them shows in one chunk in ten."""
    torch.set_float32_matmul_precision("high")
    size = (32, 64, 16)
    x, b, c = (torch.randn(*size, *tail, device="cuda").to(dtype) for tail in ((10, 32), (128,), (128,)))
    a = -torch.rand(*size, 10, device="cuda") / 100
    state = torch.randn(32, 10, 128, 32, device="cuda")
    inputs = [v.requires_grad_() for v in (x, b * 128**-0.5, c, a, state)]
    first = torch.zeros(32, 64, dtype=torch.bool, device="cuda")
    results = [torch.autograd.grad(by_kernels(inputs, first)[0].float().square().sum(), inputs) for _ in range(5)]
    assert all(v.isfinite().all() for v in results[0])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_scan_takes_them_and_gives_states_after_any_frame(
    device: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels is not None
    if device == "cpu":
        monkeypatch.setattr(kernels, "fit", lambda x, b, c: True)
    frames = 24
    inputs, first = draw((frames, tokens, 2, 16, 16), device, torch.float32)
    scan_inputs = ScanInputs(*inputs[:4])
    at = torch.arange(frames, device=device).expand(3, -1)
    results = scan(scan_inputs, first, inputs[4], at=at)
    wanted = scan_chunked(scan_inputs, first, inputs[4], at=at)
    assert results.y.grad_fn is not None and "longdream" in results.y.grad_fn.name()
    assert results.states_at is not None and wanted.states_at is not None and not results.states_at.requires_grad
    for a, b in ((results.y, wanted.y), (results.state, wanted.state), (results.states_at, wanted.states_at)):
        assert relative(a, b.double()) < 5e-6
    together = scan(
        scan_inputs, first, inputs[4], chunk_frames=2, query=scan_inputs
    )  # the kernels know no groups of frames
    assert together.y.grad_fn is not None and "longdream" not in together.y.grad_fn.name()


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_query_stream_reads_and_leaves_no_trace(device: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the recurrence, in values, gradients of both streams, and states after any frame."""
    assert kernels is not None
    if device == "cpu":
        monkeypatch.setattr(kernels, "fit", lambda x, b, c: True)
    torch.set_float32_matmul_precision("highest")
    frames = 24
    inputs, first = draw((frames, tokens, 2, 16, 16), device, torch.float32)
    asked, _ = draw((frames, tokens, 2, 16, 16), device, torch.float32)
    at = torch.arange(frames, device=device).expand(3, -1)
    results = scan(ScanInputs(*inputs[:4]), first, inputs[4], query=ScanInputs(*asked[:4]), at=at, skip=inputs[5])
    assert results.query_y is not None and results.states_at is not None
    exact, exactly = ([v.detach().double().requires_grad_() for v in part] for part in (inputs, asked))
    y, states, query_y = scan_reference(ScanInputs(*exact[:4]), first, exact[4], ScanInputs(*exactly[:4]))
    wanted = (y + exact[5] * exact[0], query_y + exact[5] * exactly[0], states[-1])
    for a, b in zip(
        (results.y, results.query_y, results.state, results.states_at), (*wanted, torch.stack(states, 1)), strict=True
    ):
        assert relative(a, b) < 5e-6
    cotangents = [torch.randn_like(v) for v in (results.y, results.query_y, results.state)]
    got = torch.autograd.grad((results.y, results.query_y, results.state), [*inputs, *asked[:4]], cotangents)
    grads = torch.autograd.grad(wanted, [*exact, *exactly[:4]], [v.double() for v in cotangents])
    assert max(relative(a, b) for a, b in zip(got, grads, strict=True)) < 1e-5


def test_compiled_and_under_autocast(device: str, half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without breaks, operands in the precision of autocast, results and gradients in that of the inputs."""
    assert kernels is not None
    if device == "cpu":
        monkeypatch.setattr(kernels, "fit", lambda x, b, c: True)
    inputs, first = draw((70, 2, 2, 16, 16), device, torch.float32)

    def loss(*inputs: Tensor) -> Tensor:
        out = scan(ScanInputs(*inputs[:4]), first, inputs[4], skip=inputs[5])
        assert out.y.dtype == torch.float32
        return out.y.square().sum() + out.state.square().sum()

    plain = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), plain, strict=True):
        assert relative(a, b.double()) < 1e-6
    with torch.autocast(device, half):
        rounded = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(rounded, plain, strict=True):
        assert a.dtype == torch.float32 and 1e-5 < relative(a, b.double()) < 2e-2


@pytest.mark.cuda
def test_kernels_fit() -> None:
    assert kernels is not None
    x = torch.zeros(1, 1, 1, 1, 128, device="cuda")
    key = torch.zeros(1, 1, 1, 128, device="cuda")
    assert kernels.fit(x, key, key) and kernels.fit(*(v.bfloat16() for v in (x, key, key)))
    assert not kernels.fit(*(v.double() for v in (x, key, key)))
    assert not kernels.fit(x.cpu(), key.cpu(), key.cpu())
    assert not kernels.fit(torch.zeros(1, 1, 1, 1, 129, device="cuda"), key, key)
    assert not kernels.fit(x, key.bfloat16(), key)
