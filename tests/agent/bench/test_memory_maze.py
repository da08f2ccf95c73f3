"""What `longdream bench memory-maze` returns; how fast anything is, is not a test's business."""

import json

import pytest

from longdream.agent.bench.envs import memory_maze
from longdream.envs.contract import UserError
from longdream.envs.memory_maze.env import simulation_class


def test_the_bench_compares_what_both_show(monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.loads(json.dumps(memory_maze.measure(rounds=1, steps=4)))
    assert result["identical"] is True and result["ratio_steps"] > 0 and result["ratio_resets"] > 0
    simulation = simulation_class()
    step = simulation.step
    monkeypatch.setattr(simulation, "step", lambda self, action: (step(self, action)[0] + 1, False))
    assert memory_maze.measure(rounds=1, steps=2)["identical"] is False


def test_what_cannot_be_measured_is_told() -> None:
    with pytest.raises(UserError, match="--size 10"):
        memory_maze.measure(size=10)
