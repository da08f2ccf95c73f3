"""What the scan and attention of M are measured by: errors that mean something, and the keys that are promised."""

import json

import pytest
import torch

from longdream.agent.bench.model import attention, scan
from longdream.envs.contract import UserError
from longdream.worldmodel.kernels.attention import attend
from longdream.worldmodel.kernels.scan import scan as chunked

SMALL = {"batch": 2, "frames": 20, "heads": 2, "head": 4, "repeats": 1, "device": "cpu"}


def test_the_scan_is_measured() -> None:
    result = json.loads(json.dumps(scan.measure(**SMALL, tokens=3, state_size=5, chunk=7, checked=13)))
    assert 0 < result["error_value"] < 1e-5 and 0 < result["error_grad"] < 1e-5
    assert result["forward_ms"] > 0 and result["forward_backward_ms"] > 0
    assert 0 < 2 * result["bytes_floor_ms"] < result["bytes_floor_forward_backward_ms"]
    # x and y; both keys; decays; the state before and after: float32
    moved = 4 * (2 * 20 * 3 * (2 * 2 * 4 + 2 * 5 + 2) + 2 * 2 * 2 * 5 * 4)
    assert result["bytes_floor_ms"] == pytest.approx(moved / result["copy_gb_per_s"] / 1e6)
    assert result["fla_forward_ms"] is None and result["torch_forward_ms"] is None  # the form in torch is the one here


def test_the_scan_is_measured_in_bfloat16() -> None:
    result = json.loads(json.dumps(scan.measure(**SMALL, tokens=2, state_size=5, chunk=7, dtype="bfloat16")))
    assert 1e-4 < result["error_value"] < 0.05 and 1e-4 < result["error_grad"] < 0.05
    moved = 2 * (2 * 20 * 2 * (2 * 2 * 4 + 2 * 5)) + 4 * (2 * 20 * 2 * 2 + 2 * 2 * 2 * 5 * 4)
    assert result["bytes_floor_ms"] == pytest.approx(moved / result["copy_gb_per_s"] / 1e6)


def test_a_scan_that_is_wrong_is_noticed() -> None:
    stream, first, state = scan.inputs(torch.device("cpu"), 1, 2, 20, 2, 4, 5)
    value, grad = scan.errors(chunked, stream, first, state, 8)
    assert max(value, grad) < 1e-5

    def forgetful(stream, first, state, chunk):
        return chunked(stream, first, 0.99 * state, chunk)

    value, grad = scan.errors(forgetful, stream, first, state, 8)
    assert value > 1e-3 and grad > 1e-3


def test_attention_is_measured() -> None:
    result = json.loads(json.dumps(attention.measure(**SMALL, tokens=2, window=4, chunk=3, checked=11)))
    assert [(row["pattern"], row["path"]) for row in result["rows"]] == [
        (p, "sdpa") for p in ("local", "chunks", "causal")
    ]
    for row in result["rows"]:
        assert 0 < row["error_value"] < 1e-5 and 0 < row["error_grad"] < 1e-5
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0
    assert result["faster"] == dict.fromkeys(("local", "chunks", "causal"), "sdpa")
    assert "CPU" in result["skipped"]


def test_attention_that_is_wrong_is_noticed() -> None:
    small = attention.inputs(torch.device("cpu"), 3, 2, 11, 2, 2, 4)
    value, grad = attention.errors(
        lambda clean, first, cache: attend(clean, first, cache, chunk_frames=2)[0], *small, 1, 3
    )
    assert value > 1e-2 and grad > 1e-2


@pytest.mark.parametrize(
    "call",
    [
        lambda: scan.measure(frames=0),
        lambda: scan.measure(repeats=0),
        lambda: attention.measure(tokens=0),
        lambda: attention.measure(window=3, chunk=5),
    ],
)
def test_sizes_that_make_no_sense(call) -> None:
    with pytest.raises(UserError, match="must be at least"):
        call()


@pytest.mark.cuda
def test_kernels_are_measured_on_cuda() -> None:
    sizes = {"batch": 2, "frames": 100, "heads": 2, "head": 16, "repeats": 2, "device": "cuda"}
    result = scan.measure(**sizes, state_size=16)
    assert result["kernels"]
    for form in ("", "torch_"):
        assert result[f"{form}error_value"] < 0.01 and result[f"{form}error_grad"] < 0.01  # TF32
        assert 0 < result[f"{form}forward_ms"] < result[f"{form}forward_backward_ms"]
    result = scan.measure(**sizes, state_size=16, dtype="bfloat16")
    assert max(result["error_value"], result["error_grad"]) < 0.05
    result = attention.measure(**sizes, tokens=4)
    assert result["skipped"] is None and len(result["rows"]) == 9
    assert all(max(row["error_value"], row["error_grad"]) < 0.05 for row in result["rows"])  # bfloat16
