"""Model-free rows: SB3 in the real environment, seen, evaluated and logged as an agent is."""

import json
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import PPO

from longdream.agent.cli import main as cli
from longdream.agent.config.schema import EnvConfig
from longdream.agent.evaluation.baselines.sb3 import Player, RealVec
from longdream.agent.evaluation.rollout import Returns, play_episodes
from longdream.agent.run.signals import Signals
from longdream.envs.make import World

QUICK = '{"n_steps": 32, "batch_size": 64, "n_epochs": 4, "learning_rate": 0.001}'


def test_rows_are_those_of_the_world_and_ends_are_sb3s() -> None:
    """The counting environment: every observation says which copy, episode and step it is of."""
    config = EnvConfig(id="longdream/Counting-v0", copies=2)
    with Signals() as signals, RealVec(config, 3, signals) as vec:
        worlds = [World(world.env_id, 1, world.seed) for world in vec.worlds]
        rows = [world.reset() for world in worlds]
        obs = vec.reset()
        ends = 0
        for _ in range(60):
            same(obs, rows)
            action = np.stack([vec.action_space.sample() for _ in worlds])
            obs, reward, done, infos = vec.step(action)
            encoded = vec.spec.action.encode(action)
            rows = [world.step(encoded[i][None]) for i, world in enumerate(worlds)]
            assert reward.tolist() == [pytest.approx(row.reward[0]) for row in rows]
            assert done.tolist() == [bool(row.terminated[0] or row.truncated[0]) for row in rows]
            for i in np.flatnonzero(done):
                last = infos[i]["terminal_observation"]
                last = last if isinstance(last, dict) else {"obs": last}
                assert all((last[key] == rows[i].obs[key][0]).all() for key in last)
                assert infos[i]["TimeLimit.truncated"] == bool(rows[i].truncated[0])
                rows[i] = worlds[i].step(encoded[i][None])
                assert rows[i].is_first[0]
                ends += 1
        assert ends > 2


def same(obs, rows) -> None:
    obs = obs if isinstance(obs, dict) else {"obs": obs}
    for i, row in enumerate(rows):
        assert all((obs[key][i] == row.obs[key][0]).all() for key in row.obs)


def test_ppo_learns_and_is_logged_like_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["baseline", "--env", "CartPole-v1", "--steps", "5000", "--kwargs", QUICK, "--name", "ppo", "--json"]
    assert cli.main([*words, "--evaluate_every", "2000", "--episodes", "4", "--final_episodes", "10"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["return_mean"] > 2 * summary["random_mean"] and summary["env_steps"] >= 5000
    assert summary["env_steps"] < 5000 + 32 * 8
    keys = {"return_mean", "return_std", "return_ci95", "episodes", "random_mean", "env", "env_steps", "seed", "wall_s"}
    folder = tmp_path / "runs" / "ppo"
    assert keys <= summary.keys() and json.loads((folder / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] // 2000 for line in lines if "evaluate/return_mean" in line] == [1, 2]
    assert sum(line.get("episode/length", 0) for line in lines) <= summary["env_steps"]
    learner = PPO.load(folder / "controller.zip")
    world = World("CartPole-v1", 10, 1_000_003, {})
    again = Returns.of(*play_episodes(Player(learner, world.spec), world, 10, 0))  # type: ignore[arg-type]
    assert again.return_mean == pytest.approx(summary["return_mean"])  # the same episodes, the same greedy actions
    assert cli.main(words) == 2 and "in use" in capsys.readouterr().err


def test_memory_boxes_and_several_observations(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sb3_contrib", reason="RecurrentPPO needs sb3-contrib")
    short = ["--steps", "64", "--copies", "2", "--evaluate_every", "0", "--final_episodes", "2", "--json"]
    quick = ["--kwargs", '{"n_steps": 16, "batch_size": 16, "n_epochs": 1}']
    for i, words in enumerate(
        (
            ["--env", "Pendulum-v1", "--algo", "sb3_contrib:RecurrentPPO"],
            ["--env", "longdream/Recall-v0", "--env_kwargs", '{"corridor": 3, "size": 16}'],
            ["--env", "longdream/Counting-v0"],
        )
    ):
        assert cli.main(["baseline", *words, *short, *quick, "--name", f"b{i}"]) == 0
        assert json.loads(capsys.readouterr().out)["episodes"] == 2


def test_masks_of_actions_are_not_passed_on(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("sb3_contrib")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["baseline", "--algo", "sb3_contrib:MaskablePPO"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "--algo sb3_contrib:MaskablePPO needs masks of valid actions" in said and not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--algo", "stable_baselines3:PPOO"], "PPOO"),
        (["--algo", "no_such_package:PPO"], "pip install no-such-package"),
        (["--algo", "stable_baselines3:HerReplayBuffer"], "no algorithm"),
        (["--algo", "stable_baselines3:SAC"], "SAC cannot be made for longdream/Recall-v0"),
        (["--kwargs", '{"n_stepps": 3}'], "n_stepps"),
        (["--env", "MixedForDreams-v0"], "PPO cannot be made for MixedForDreams-v0"),  # its picture is too small
        (["--env", "NoSuch-v0"], "NoSuch-v0"),
        (["--steps", "0"], "--steps 0"),
    ],
)
def test_bad_input_is_said_in_one_line(words: list[str], problem: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["baseline", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert problem in said[-1] and not list(tmp_path.glob("runs/*"))
    assert [line for line in said[:-1] if not line.startswith("warning")] == []
