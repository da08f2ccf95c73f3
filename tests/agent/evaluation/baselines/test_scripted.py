"""`longdream collect` and `longdream evaluate oracle`, in the real Memory Maze."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from longdream.agent.cli import main as cli
from longdream.agent.data import npz_episodes as offline
from longdream.agent.evaluation.baselines import scripted
from longdream.envs.contract import UserError
from longdream.envs.make import derive_seed

ID = "longdream/MemoryMaze-9x9-v0"
FAST = {"control_freq": 0.2}  # episodes of 50 steps


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "STEPS", 25)


def test_collected_rows_are_what_the_environment_gave(short: None, tmp_path: Path) -> None:
    summary = scripted.collect(ID, "navigator", 3, tmp_path, first=4, seed=1, copies=2)
    assert summary["episodes"] == 3 and summary["steps"] == 75
    assert [Path(name).name for name in summary["files"]] == [f"episode-{i:06d}.npz" for i in (4, 5, 6)]
    env = gym.make(ID, probes=True)
    episode = offline.read(tmp_path / "episode-000005.npz")
    obs, info = env.reset(seed=derive_seed(1, 0, 5))
    for t in range(26):
        np.testing.assert_array_equal(episode["image"][t], obs)
        for key in ("maze_layout", "agent_pos", "agent_dir", "targets_pos", "targets_vec", "target_color"):
            np.testing.assert_allclose(episode[key][t], info[key], atol=1e-6)
        if t < 25:
            obs, reward, _, _, info = env.step(int(episode["action"][t + 1].argmax()))
            assert episode["reward"][t + 1] == reward
    env.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"episode-{i:06d}.npz" for i in (4, 5, 6)]
    with pytest.raises(UserError, match=r"episode-000005\.npz exists already: name another --out"):
        scripted.collect(ID, "random", 1, tmp_path, first=5)


def test_the_oracles_episodes_do_not_depend_on_what_plays_beside_them(short: None, tmp_path: Path) -> None:
    scripted.collect(ID, "oracle", 2, tmp_path / "two", seed=3, copies=2)
    scripted.collect(ID, "oracle", 1, tmp_path / "one", first=1, seed=3)
    one, two = (offline.read(tmp_path / name / "episode-000001.npz") for name in ("one", "two"))
    for key in offline.LAYOUT:
        np.testing.assert_array_equal(one[key], two[key])


def test_collecting_from_the_command_line(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With arguments of the environment one by one."""
    words = ["collect", "--env", ID, "--policy", "random", "--episodes", "1", "--out", str(tmp_path), "--seed", "1"]
    assert (
        cli.main([*words, "--env.kwargs.control_freq", "0.2", "--env.kwargs.randomize_colors", "true", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["steps"] == 25
    other = tmp_path / "other"
    scripted.collect(ID, "random", 1, other, seed=1, env_kwargs=FAST | {"randomize_colors": True})
    one, two = (offline.read(folder / "episode-000000.npz") for folder in (tmp_path, other))
    plain = tmp_path / "plain"
    scripted.collect(ID, "random", 1, plain, seed=1)
    assert all((one[key] == two[key]).all() for key in offline.LAYOUT)
    assert not (one["image"] == offline.read(plain / "episode-000000.npz")["image"]).all()


@pytest.mark.parametrize("kwargs", [["--env-kwargs", json.dumps(FAST)], ["--env.kwargs.control_freq", "0.2"]])
def test_whole_episodes_are_evaluated(kwargs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "random", "--env", ID, *kwargs, "--episodes", "3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["length_mean"] == 50 and summary["episodes"] == 3 and summary["env_steps"] == 150
    assert summary["policy"] == "random" and "references" not in summary  # with that argument it is another task
    assert summary["return_ci95"][0] <= summary["return_mean"] <= summary["return_ci95"][1]


def test_episodes_of_different_lengths_are_summed_up_each_to_its_end() -> None:
    summary = scripted.evaluate("random", "longdream/Recall-v0", {"corridor": 2}, 40, seed=0)
    assert 0 <= summary["return_mean"] <= 1 and 3 <= summary["length_mean"] < 16 and "references" not in summary


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("evaluate oracle --env longdream/Recall-v0", "a scripted policy plays in Memory Maze"),
        ("evaluate random --env Pendulum-v1", "scripted policies choose one of several"),
        ("evaluate oracle --env longdream/MemoryMaze-8x8-v0", "did you mean"),
        ("evaluate oracle --episodes 0", "--episodes 0: must be at least 1"),
        ("collect --policy wizard", "--policy 'wizard': should be 'oracle', 'navigator' or 'random'"),
        ("collect --episodes 0", "--episodes 0"),
        ("collect --episodes 1 --env.kwargs.wals 3", "wals"),
        ("collect --env CartPole-v1", "a scripted policy plays in Memory Maze"),
    ],
)
def test_a_mistake_ends_in_one_line(
    line: str, problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.npz"))
