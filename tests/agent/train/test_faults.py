"""What a run does when the world around it fails: one clear message, and nothing that was saved is lost."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longdream.agent.cli import main as cli
from longdream.agent.run import folder as run_folder
from longdream.agent.train import trainer
from longdream.envs.contract import EnvError

SHORT = ["--steps", "160", "--evaluate.final_episodes", "2"]
FAULTY = '''
import os
import time

import gymnasium as gym
import numpy as np


class Faulty(gym.Env):
    """Episodes of ten steps. A fault happens in one copy only, after `at` of its steps, and once: `mark` is a file that
    is made then. A reward or observation that is not a number comes in all copies, `times` times."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fault, mark=None, at=30, times=1):
        self.fault, self.mark, self.at, self.times = fault, mark, at, times
        self.steps = self.time = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        self.time += 1
        obs, reward = np.full(3, 0.1 * self.time, np.float32), float(action)
        if self.at <= self.steps < self.at + self.times:
            if self.fault == "nan reward":
                reward = float("nan")
            elif self.fault == "nan observation":
                obs[:] = np.nan
        if self.steps >= self.at and self.mark and self.make_mark():
            if self.fault == "raise":
                raise ZeroDivisionError("a bug of the environment")
            elif self.fault == "hang":
                time.sleep(60)
            elif self.fault == "die":
                os._exit(3)
        return obs, reward, False, self.time >= 10, {}

    def make_mark(self):
        try:
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            return False


gym.register("Faulty-v0", entry_point="faulty:Faulty")
'''


@pytest.fixture(autouse=True)
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment above, importable as a user's own is: from the current folder."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    yield


def train(fault: str, *flags: str, **kwargs: object) -> int:
    where = ["--env", "faulty:Faulty-v0", "--env.kwargs", json.dumps({"fault": fault, **kwargs})]
    return cli.main(["train", "tiny", "--name", "run", *where, *SHORT, *flags])


def lines(folder: Path = Path("runs/run")) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines(folder)]


# -- environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "fault", "what"),
    [
        ("sync", "raise", "raised in step: ZeroDivisionError: a bug of the environment"),
        ("async", "raise", "raised in step: ZeroDivisionError: a bug of the environment"),
        ("async", "hang", "gave no answer to step within 4 s"),
        ("async", "die", "died in step"),
        ("beside", "raise", "raised in step: ZeroDivisionError: a bug of the environment"),
        ("beside", "hang", "gave no answer to step within 4 s"),
    ],
)
def test_an_environment_that_fails(workers: str, fault: str, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--env.workers", workers, "--env.copies", "2", "--env.timeout_s", "4"]
    assert train(fault, *flags, mark=str(Path("mark").absolute())) == 1
    err = capfd.readouterr().err
    message = next(line for line in err.splitlines() if line.startswith("longdream: "))
    assert "environment worker " in message and what in message
    assert "go on with: longdream train --resume runs/run" in err
    assert "trainer.py" not in err  # the environment's traceback, not ours
    if fault == "raise":
        assert err.count('raise ZeroDivisionError("a bug of the environment")') == 1
    assert Path("mark").exists()

    # all that was learned is in the checkpoint; the run goes on with new episodes
    tree, step = run_folder.open_run("runs/run").saved
    assert step >= 30 and tree["collected"][0] == step and tree["collector"] is None
    assert sum(rows for _, rows, _ in tree["replay"]["segments"]) == step // 2 + step // 20 + 1
    if workers != "sync" and fault != "hang":
        return  # to go on is the same after every fault
    assert cli.main(["train", "--resume", "runs/run"]) == 0
    record = lines()
    assert [line["count/lost_worlds"] for line in record if "count/lost_worlds" in line][-1] == 1
    assert json.loads(Path("runs/run/summary.json").read_text())["env_steps"] >= 160
    assert [line["step"] for line in record] == sorted(line["step"] for line in record)


def test_the_episode_that_was_lost_is_not_counted(capfd: pytest.CaptureFixture[str]) -> None:
    assert train("raise", mark=str(Path("mark").absolute()), at=35) == 1
    assert cli.main(["train", "--resume", "runs/run"]) == 0
    assert {line["episode/length"] for line in lines() if "episode/length" in line} == {10}


def test_an_evaluation_that_fails_does_not_touch_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("none", "--name", "whole") == 0

    def fails(*args: object) -> None:
        raise EnvError("environment worker 0 of Faulty-v0 died in step", 0)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "play", fails)
        assert train("none") == 1
    assert run_folder.open_run("runs/run").saved[0]["collector"] is not None
    assert cli.main(["train", "--resume", "runs/run"]) == 0
    assert untimed(Path("runs/run")) == untimed(Path("runs/whole"))


def test_an_environment_that_fails_at_once_leaves_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("none", nonsense=3) == 2
    assert "faulty:Faulty-v0 cannot be made with fault='none', nonsense=3" in capsys.readouterr().err
    assert not Path("runs/run").exists()


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_is_skipped_and_counted(capfd: pytest.CaptureFixture[str]) -> None:
    assert train("nan reward", at=25) == 0
    record = [line for line in lines() if "count/skipped" in line]
    skipped, updates = record[-1]["count/skipped"], record[-1]["count/updates"]
    assert 0 < skipped < updates
    learned = [line for line in record if "model/reward" in line]
    assert learned and all(line["model/reward"] is not None for line in learned)
    assert json.loads(Path("runs/run/summary.json").read_text())["updates"] == updates


def test_ten_in_a_row_end_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert train("nan reward", "--evaluate.save_seconds", "0", at=20, times=10**9) == 1
    err = capfd.readouterr().err
    message = [line for line in err.splitlines() if line.startswith("longdream: ")]
    assert len(message) == 1 and "not finite in 10 updates in a row" in message[0] and "--resume runs/run" in message[0]
    assert "Traceback" not in err
    tree, step = run_folder.open_run("runs/run").saved
    assert tree["counters"]["skipped_in_a_row"] < 10 and step >= 60


def test_observations_that_are_not_finite(capfd: pytest.CaptureFixture[str]) -> None:
    assert train("nan observation", at=20) == 1
    err = capfd.readouterr().err
    message = [line for line in err.splitlines() if line.startswith("longdream: ")]
    assert len(message) == 1 and "of faulty:Faulty-v0 returned an observation 'obs' that is not finite" in message[0]
    assert "Traceback" not in err and "--resume runs/run" in err
    assert run_folder.open_run("runs/run").saved[1] >= 70


# -- disk -------------------------------------------------------------------------------------------------------------


def test_disk_full(cramped, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(cramped.folder)
    assert cli.main(["train", "tiny", "--name", "run", "--steps", "100", "--evaluate.final_episodes", "1"]) == 0
    before = {path: path.read_bytes() for path in Path("runs/run/checkpoints").rglob("*") if path.is_file()}
    assert before
    capfd.readouterr()
    with cramped.room(20_000):
        assert cli.main(["train", "--resume", "runs/run", "--steps", "200", "--evaluate.save_seconds", "0"]) == 1
    err = capfd.readouterr().err
    message = [line for line in err.splitlines() if line.startswith("longdream: ")]
    assert len(message) == 1 and "disk full" in message[0] and "--resume runs/run" in message[0]
    assert "Traceback" not in err
    assert all(path.read_bytes() == data for path, data in before.items())
    assert cli.main(["train", "--resume", "runs/run", "--steps", "200"]) == 0  # there is room again
    assert json.loads(Path("runs/run/summary.json").read_text())["env_steps"] >= 200
