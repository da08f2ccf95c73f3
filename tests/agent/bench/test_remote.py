"""What `longdream bench remote` returns; how fast anything is, is not a test's business."""

import json

import pytest

from longdream.agent.bench.envs import remote
from longdream.envs.contract import UserError


def test_the_bench_compares_the_same_frames() -> None:
    result = json.loads(json.dumps(remote.measure(steps=5, rounds=2, copies=2)))
    assert result["same"] is True
    assert result["overhead_ms"] > 0 and result["steps_per_s"] > 0 and result["parallel_frames_per_s"] > 0


def test_what_cannot_be_measured_is_told() -> None:
    with pytest.raises(UserError, match="--copies 0"):
        remote.measure(copies=0)
    with pytest.raises(UserError, match="there is no interpreter '/no/such/python'"):
        remote.measure(python="/no/such/python")
