"""Where the kernels for CUDA are tested: there, and on any machine that has Triton in its interpreter, where
`TRITON_INTERPRET=1` is set before Python starts. Neither is there in CI."""

import os

import pytest
import torch

from longdream.worldmodel.kernels.scan import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHERE = [
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(kernels is None or not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1"),
    ),
]


@pytest.fixture(params=WHERE)
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run, each test in all places there are."""
    return request.param


@pytest.fixture
def half(device: str) -> torch.dtype:
    """Half precision: float16 where the interpreter runs, whose products do not know bfloat16."""
    return torch.bfloat16 if device == "cuda" else torch.float16


@pytest.fixture(autouse=True)
def precision():
    """That of matrix products: the highest, which agents on CUDA change, and as it was before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 2.4 makes no index of an array of one number any more, as the interpreter of Triton 3.6 asks it to for the
    bounds of a loop."""
    if INTERPRETED and kernels is not None:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def with_index(tensor, scope) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)
