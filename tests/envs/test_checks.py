"""`check-env` reports no problem in correct environments, and each problem in an environment that has it."""

import re
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from longdream.envs.checks import check
from longdream.envs.contract import UserError


class RandomWalk(gym.Env):
    """A random walk on a line. The argument selects a fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.observation_space = spaces.Dict(
            {"place": spaces.Box(-100, 100, (2,), np.float32), "image": spaces.Box(0, 255, (16, 16, 3), np.uint8)}
        )
        if fault == "layout":
            self.observation_space = spaces.Box(0, 255, (3, 16, 16), np.uint8)
        if fault == "tuple":
            self.observation_space = spaces.Tuple([spaces.Discrete(2)])
        self.action_space = spaces.Discrete(3)
        self.played = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        self.place = self.np_random.normal(size=2)
        self.played += self.fault in ("history", "grows")
        if self.fault == "grows":
            self.action_space = spaces.Discrete(3 + self.played)
        if self.fault == "unseeded":
            self.place = np.random.default_rng(time.perf_counter_ns()).normal(size=2)
        if self.fault == "ignores seed":
            self.place = np.zeros(2)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        if self.fault == "raises" and self.t == 3:
            raise RuntimeError("at step 3")
        if self.fault == "exits" and self.t == 3:
            sys.exit()
        if self.fault == "interrupts" and self.t == 3:
            raise KeyboardInterrupt
        noise = 0 if self.fault == "ignores seed" else self.np_random.normal()
        self.place += [action - 1, noise + 0.01 * self.played * (self.fault == "history")]
        reward: Any = float(self.place[0])
        if self.t == 5 and self.fault in ("nan", "array reward", "inf obs"):
            reward = {"nan": np.nan, "array reward": np.array([1.0]), "inf obs": 0.0}[self.fault]
        over: Any = self.t == 8 and self.fault != "endless"
        info = {"near": np.zeros(self.np_random.integers(1, 9))} if self.fault == "info" else {}
        return self._observe(), reward, 1 * over if self.fault == "flag" else over, False, info

    def close(self) -> None:
        if self.fault == "exits in close":
            sys.exit(0)

    def _observe(self) -> Any:
        place = self.place.astype(np.float64 if self.fault == "dtype" else np.float32)
        if self.fault == "range" and self.t == 6:
            place[0] = 1000
        if self.fault == "inf obs" and self.t == 5:
            place[0] = np.nan
        side = 15 if self.fault == "shape" and self.t == 7 else 16
        return {"place": place, "image": np.zeros((side, side, 3), np.uint8)}


gym.register("Checked-v0", entry_point=RandomWalk)
gym.register("CheckedToTheLimit-v0", entry_point=RandomWalk, max_episode_steps=8)


@pytest.mark.parametrize("env_id", ["Checked-v0", "longdream/Recall-v0", "CartPole-v1", "Pendulum-v1", "Blackjack-v1"])
def test_correct_environments_have_no_problems(env_id: str) -> None:
    report = check(env_id)
    assert report.problems == [] and len(report.passed) == 5 and report.steps_per_s


def test_memory_maze_has_no_problems() -> None:
    report = check("longdream/MemoryMaze-9x9-v0", steps=8)
    assert report.problems == [] and "no episode ended within 8 steps" in " ".join(report.notes)
    assert not any("seed changes nothing" in note for note in report.notes)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tuple", "returned the observation {'place'.*, its space is a Tuple: return a tuple with 1 entries"),
        ("layout", "returned the observation 'obs' as object .*, its space is"),
        ("grows", "action_space changed from .* set it once, in __init__"),
        ("shape", r"'image' as uint8 of shape \(15, 15, 3\)"),
        ("dtype", "'place' as float64 of shape"),
        ("range", r"with values from .* to 1000.0"),
        ("nan", "returned the reward nan: it must be finite"),
        ("inf obs", "is not finite|returned 'place'"),
        ("array reward", "return one number"),
        ("flag", "returned terminated = 0: return a bool"),
        ("unseeded", "draw everything random from self.np_random"),
        ("raises", "reset or step raised RuntimeError: at step 3 .*test_checks.py, line|Gymnasium"),
        ("exits", "reset or step raised SystemExit .*test_checks.py, line|Gymnasium"),
        ("interrupts", "reset or step raised KeyboardInterrupt .*test_checks.py, line|Gymnasium"),
        ("exits in close", "close raised SystemExit: 0 .*test_checks.py, line"),
        ("history", "after an episode was played|differ at row"),
    ],
)
def test_each_fault_is_reported(fault: str, message: str) -> None:
    report = check("Checked-v0", {"fault": fault})
    assert re.search(message, " | ".join(report.problems)), report.problems


def test_the_line_named_is_the_environments_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a package has put a function of its own in place of sys.exit, as those that watch a program do."""
    package: dict[str, Any] = {}
    exec(compile("def exits(*status):\n    raise SystemExit(*status)", "package.py", "exec"), package)
    monkeypatch.setattr(sys, "exit", package["exits"])
    for fault in ("exits", "exits in close"):
        problems = " | ".join(check("Checked-v0", {"fault": fault}).problems)
        assert "test_checks.py, line" in problems and "package.py" not in problems, problems


def test_termination_at_the_time_limit_is_reported() -> None:
    assert "terminated at its time limit of 8 steps" in " ".join(check("CheckedToTheLimit-v0").problems)
    endless = check("CheckedToTheLimit-v0", {"fault": "endless"})  # ends only by the limit, which truncates
    assert endless.problems == []


def test_infos_that_cannot_be_combined_are_noted() -> None:
    report = check("Checked-v0", {"fault": "info"})
    assert report.problems == [] and any("one type and shape that never change" in note for note in report.notes)
    assert not any("SyncVectorEnv" in note for note in check("Checked-v0").notes)


def test_what_may_be_intended_is_a_note() -> None:
    assert any("time limit" in note for note in check("Checked-v0", {"fault": "endless"}).notes)
    ignores_seed = check("Checked-v0", {"fault": "ignores seed"})
    assert ignores_seed.problems == []
    assert any("seed changes nothing" in note for note in ignores_seed.notes)


def test_an_environment_that_cannot_be_made_is_reported() -> None:
    with pytest.raises(UserError, match="unknown environment"):
        check("Chcked-v0")
    with pytest.raises(UserError, match=r"cannot be made with \{'falt': 1\}"):
        check("Checked-v0", {"falt": 1})
