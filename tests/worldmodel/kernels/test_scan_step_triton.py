"""The kernel of a single step against the recurrence in float64: see test_scan_triton.py for where it runs."""

import pytest
import torch

from longdream.worldmodel.kernels import scan as module
from longdream.worldmodel.kernels.scan import ScanInputs, scan_step

step_kernel = module.step_kernel
# sequences, heads, channels, state: powers of two or not, one of each, more than a warp holds
SIZES = [(3, 2, 16, 16), (5, 1, 24, 20), (1, 3, 80, 33), (2, 1, 1, 1), (4, 8, 64, 32), (1, 1, 128, 128)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["float32", "half"])
@pytest.mark.parametrize("turns", [False, True])
def test_a_step_is_the_recurrence(device: str, half: torch.dtype, size: tuple[int, ...], how: str, turns: bool) -> None:
    assert step_kernel is not None
    dtype = torch.float32 if how == "float32" else half
    tolerance = 1e-6 if how == "float32" else 1e-2
    sequences, heads, width, state_size = size
    lead = (sequences, 1, 1)
    x = torch.randn(*lead, heads, width).to(device, dtype)
    b = torch.randn(*lead, state_size).to(device, dtype)
    c = torch.randn(*lead, state_size).to(device, dtype)
    a = -torch.rand(*lead, heads).to(device)
    a[0, 0, 0, 0] = -200.0  # forgets everything
    state = torch.randn(sequences, heads, state_size, width).to(device, dtype)
    turn = 3 * torch.randn(sequences, state_size // 2).to(device) if turns else None
    kept = state.clone()
    y, after = step_kernel.scan_step(*(v[:, 0, 0] for v in (x, b, c, a)), state, turn)
    assert y.dtype == dtype and after.dtype == dtype and torch.equal(state, kept)
    with torch.enable_grad():  # with gradient, the step is the one in torch
        wanted_turn = None if turn is None else turn.double()
        wanted_y, wanted = scan_step(ScanInputs(*(v.double() for v in (x, b, c, a))), state.double(), wanted_turn)
    assert (y.double() - wanted_y[:, 0, 0]).norm() <= tolerance * wanted_y.norm()
    assert (after.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.cuda
def test_it_is_what_steps_run_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_kernel is not None
    calls = []
    monkeypatch.setattr(step_kernel, "scan_step", lambda *args: calls.append(1) or (args[0], args[4]))
    inputs = ScanInputs(*(torch.randn(2, 1, 1, *tail, device="cuda") for tail in ((2, 16), (8,), (8,), (2,))))
    state = torch.randn(2, 2, 8, 16, device="cuda")
    scan_step(inputs, state)
    assert not calls
    with torch.no_grad():
        scan_step(inputs, state)
        assert calls
        scan_step(ScanInputs(*(v.double() for v in inputs)), state.double())
    assert len(calls) == 1


def test_ops_are_as_they_are_described(device: str) -> None:
    assert step_kernel is not None
    x, b, c, a = (torch.randn(3, *tail, device=device) for tail in ((2, 16), (8,), (8,), (2,)))
    for turn in (None, torch.randn(3, 4, device=device)):
        torch.library.opcheck(step_kernel._scan_step, (x, b, c, a, torch.randn(3, 2, 8, 16, device=device), turn))
