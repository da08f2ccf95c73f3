"""Commands whose environment misbehaves: every one ends in one line that names it and the fix, and nothing is lost."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest

from longdream.agent.cli import main as cli
from longdream.agent.evaluation import rollout
from longdream.agent.run import folder as run_folder

# Episodes of six steps. `how` says what is wrong, from step `at` of a copy on. Workers import the module by its name.
ODD = """
import os, sys, tempfile
import gymnasium as gym
import numpy as np

class Odd(gym.Env):
    action_space = gym.spaces.Discrete(2)

    def __init__(self, how="", at=40, size=3, actions=2):
        self.observation_space = gym.spaces.Box(-1, 1, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(actions)
        self.how, self.at, self.steps = how, at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.see(), {}

    def see(self):
        return np.full(self.observation_space.shape, self.t / 9, np.float32)

    def step(self, action):
        self.steps += 1
        self.t += 1
        if self.how == "walks" and self.steps == 5:
            os.chdir(tempfile.gettempdir())
        if self.steps >= self.at:
            if self.how == "exits":
                sys.exit()
            if self.how == "interrupts":
                raise KeyboardInterrupt
            if self.how == "dies":
                os._exit(0)
        return self.see(), float(action), self.t >= 6 and self.how != "endless", False, {}

gym.register("Odd-v0", entry_point="odd:Odd")
"""
SHORT = ["--learn.steps", "100", "--evaluate.every", "0", "--evaluate.final_episodes", "4", "--env.copies", "2"]


@pytest.fixture(autouse=True)
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if path)])
    yield
    sys.modules.pop("odd", None)
    gym.registry.pop("Odd-v0", None)


def train(how: str, *flags: str) -> int:
    kwargs = json.dumps({"how": how})
    return cli.main(["train", "tiny", "--name", "x", "--env", "odd:Odd-v0", "--env.kwargs", kwargs, *SHORT, *flags])


def message(capfd: pytest.CaptureFixture[str]) -> str:
    """The line of the message; there is one."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("longdream:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("workers", "how", "what"),
    [
        ("sync", "exits", "raised in step: SystemExit"),
        ("async", "exits", "raised in step: SystemExit"),
        ("sync", "interrupts", "raised in step: KeyboardInterrupt"),
        ("sync", "dies", "raised in step: SystemExit: os._exit(0)"),
        ("async", "dies", "died in step (exit code 0)"),
    ],
)
def test_an_environment_that_exits_while_training(workers: str, how: str, what: str, capfd) -> None:
    assert train(how, "--env.workers", workers) == 1
    said = message(capfd)
    assert "of odd:Odd-v0" in said and what in said
    tree, step = run_folder.open_run("runs/x").saved
    assert step >= 70 and tree["collector"] is None


@pytest.mark.parametrize(
    "words",
    [
        "evaluate random --env odd:Odd-v0 --episodes 20",
        "baseline --env odd:Odd-v0 --steps 400 --copies 1",
    ],
)
@pytest.mark.parametrize("how", ["exits", "dies"])
def test_an_environment_that_exits_in_other_commands(words: str, how: str, capfd) -> None:
    assert cli.main([*words.split(), "--env.kwargs.how", how]) == 1
    assert "odd:Odd-v0" in message(capfd)


@pytest.mark.parametrize("how", ["exits", "dies"])
def test_an_environment_that_exits_is_not_fit(how: str, capfd) -> None:
    assert cli.main(["check-env", "odd:Odd-v0", "--env.kwargs.how", how, "--env.kwargs.at", "3"]) == 1
    assert "SystemExit" in capfd.readouterr().out


def test_an_environment_that_exits_in_an_evaluation(capfd) -> None:
    assert train("") == 0
    assert cli.main(["evaluate", "runs/x", "--env.kwargs.how", "exits", "--env.kwargs.at", "3"]) == 1
    assert "environment worker 0 of odd:Odd-v0 raised in step: SystemExit" in message(capfd)


def test_everything_lands_where_the_command_was_given(tmp_path: Path) -> None:
    assert train("walks", "--evaluate.save_seconds", "0") == 0
    assert os.getcwd() == str(tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "replay"):
        assert (tmp_path / "runs" / "x" / name).exists()


def test_a_run_whose_episodes_do_not_end(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(rollout, "LONGEST_EPISODE", 150)
    assert train("endless") == 1
    said = message(capfd)
    assert "an episode of odd:Odd-v0 has not ended within 150 steps" in said
    assert "--env.kwargs.max_episode_steps N" in said
    # in the middle of an episode that is longer than the limit that it gets
    assert cli.main(["train", "--resume", "runs/x", "--steps", "160", "--env.kwargs.max_episode_steps", "20"]) == 0
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert summary["length_mean"] == 20 and summary["env_steps"] >= 160
    record = [json.loads(line) for line in Path("runs/x/metrics.jsonl").read_text().splitlines()]
    lengths = {line["episode/length"] for line in record if "episode/length" in line}
    assert lengths == {51, 20}  # 50 steps of 2 copies before, and the step that shows the limit


@pytest.mark.parametrize("words", ["evaluate random", "baseline --steps 64 --copies 1"])
def test_other_evaluations_whose_episodes_do_not_end(words: str, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    for module in ("longdream.agent.evaluation.rollout", "longdream.agent.evaluation.baselines.scripted"):
        monkeypatch.setattr(f"{module}.LONGEST_EPISODE", 150)
    command = [*words.split(), "--env", "odd:Odd-v0", "--env.kwargs.how", "endless"]
    assert cli.main(command) == 1
    assert "--env.kwargs.max_episode_steps N" in message(capfd)
    if words.startswith("evaluate"):
        assert cli.main([*command, "--env.kwargs.max_episode_steps", "7", "--json"]) == 0
        assert json.loads(capfd.readouterr().out.splitlines()[-1])["length_mean"] == 7


@pytest.mark.parametrize("value", ["0", "-3", "2.5", "soon", "true"])
def test_limits_that_are_no_number_of_steps(value: str, capfd) -> None:
    assert train("", "--env.kwargs.max_episode_steps", value) == 2
    assert "env.kwargs.max_episode_steps = " in message(capfd)
    assert not Path("runs/x").exists()


def test_an_environment_that_has_changed_since(capfd) -> None:
    assert train("") == 0
    before = sorted(Path("runs/x").rglob("*"))
    capfd.readouterr()
    for old, new, what in (
        ("size=3", "size=4", "its 'obs' is a vector of shape (4,), the agent knows a vector of shape (3,)"),
        ("actions=2", "actions=5", "its actions are Discrete(5), the agent was trained with Discrete(2)"),
    ):
        Path("odd.py").write_text(ODD.replace(old, new))  # as an author does who works on it
        for command in ("train --resume runs/x --steps 200", "dream runs/x", "evaluate runs/x"):
            sys.modules.pop("odd")
            gym.registry.pop("Odd-v0")
            assert cli.main(command.split()) == 2
            said = message(capfd)
            assert f"odd:Odd-v0 does not fit this agent: {what}" in said and "config.yaml" not in said
            assert sorted(Path("runs/x").rglob("*")) == before
