"""Two ranks learn what one learns from their rows together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "prior": ({"forcing.objective": "prior", "learn.warmup": 0, "replay.length": 12}, "images"),
    "flow, noisy history": (
        {
            "forcing.history": "noisy",
            "forcing.shortcut": 0.25,
            "controller.replay_value": 0.3,
            "controller.center_advantages": True,
            "controller.return_floor": 0.01,
        },
        "vectors",
    ),
    "mask": ({"forcing.objective": "mask"}, "images"),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every case came to, on two ranks and on one."""
    command = [sys.executable, str(Path(__file__).with_name("learn.py")), json.dumps(CASES)]
    store = {"WORLD_SIZE": "2", "LONGDREAM_STORE": str(tmp_path_factory.mktemp("ranks") / "store")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=os.environ | store | {"RANK": str(rank)}, **pipes) for rank in range(2)]
    outcomes = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(err for _, err in outcomes)
    (two, one), (too,) = (out.splitlines() for out, _ in outcomes)
    assert two == too  # what is averaged is the same everywhere
    return json.loads(two), json.loads(one)


@pytest.mark.parametrize("case", CASES)
def test_losses_over_20_updates_are_those_of_one_rank(case: str, learned: tuple[dict, dict]) -> None:
    two, one = (each[case] for each in learned)
    assert two["dream_steps"] == one["dream_steps"] and two["skipped"] == one["skipped"] == 0
    assert len(one["losses"]) == 20 and one["losses"][0] != one["losses"][-1]
    worst = 0.0
    for mine, theirs in zip(one["losses"], two["losses"], strict=True):
        assert mine.keys() == theirs.keys()
        worst = max(worst, *(abs(theirs[key] - mine[key]) / max(abs(mine[key]), 1e-3) for key in mine))
    print(f"{case}: largest relative difference {worst:.1e}")
    assert worst < 1e-5
