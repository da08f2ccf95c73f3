"""Another C in the dreams of a run that is there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.run import checkpoint
from longdream.agent.run.folder import load_agent, open_run
from longdream.agent.train import imagined as dream_loop
from longdream.envs.contract import UserError

SMALL = {"controller.evolution.population": 6, "controller.evolution.moments": 3, "learn.updates": 9}
SMALL |= {"controller.planner.candidates": 4, "controller.planner.elites": 2, "controller.planner.iterations": 1}
SMALL |= {"controller.planner.horizon": 2, "controller.tree.simulations": 3}
SMALL |= {"evaluate.every": 0, "evaluate.episodes": 2, "evaluate.final_episodes": 1, "evaluate.save_seconds": 0.0}


def told(source: Path, kind: str, **settings: object) -> Config:
    config = open_run(source).config
    return options.update(config, SMALL | {"world": str(source), "controller.kind": kind} | settings)


@pytest.mark.parametrize(("run", "kind"), [("images", "actor_critic"), ("images", "evolution"), ("mixed", "tree")])
def test_v_and_m_stay_and_c_learns(dream_runs, tmp_path: Path, run: str, kind: str) -> None:
    source = dream_runs(run)
    before = load_agent(source)[0].model.state_dict()
    found = dream_loop.train(told(source, kind), tmp_path / "new", console=False)
    assert found["updates"] == 9 and found["env_steps"] == open_run(source).saved[1] and found["episodes"] == 1
    agent, config, _, _ = load_agent(tmp_path / "new")
    after = agent.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and config.controller.kind == kind
    fresh = type(agent)(config, agent.spec).controller.state_dict()
    assert str(fresh) != str(agent.controller.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "controller/return" in line] == list(range(1, 10))
    # it is a run like others: its dreams can be opened, and begin in the replay of the run that it dreamt of
    dreams = DreamVecEnv(3, tmp_path / "new", pool=8)
    obs, _ = dreams.reset(seed=1)
    assert np.isfinite(obs).all() and np.isfinite(dreams.step(dreams.action_space.sample())[1]).all()


@pytest.mark.parametrize("kind", ["actor_critic", "evolution"])
def test_resumed_is_uninterrupted(dream_runs, tmp_path: Path, monkeypatch, kind: str) -> None:
    keep = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda root, step, tree: keep(root, step, tree, keep=100))
    config = told(dream_runs("images"), kind)
    found = dream_loop.train(config, tmp_path / "whole", console=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "summary.json").unlink()
    saved = sorted((tmp_path / "half" / "checkpoints").iterdir())
    assert len(saved) > 4
    for later in saved[4:]:
        shutil.rmtree(later)
    again = dream_loop.train(config, tmp_path / "half", resume=True, console=False)
    assert {k: v for k, v in again.items() if k != "wall_s"} == {k: v for k, v in found.items() if k != "wall_s"}
    records = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "half")]
    lines = [[{k: v for k, v in json.loads(x).items() if not k.startswith("time/")} for x in r] for r in records]
    assert lines[0] == lines[1]
    assert dream_loop.train(config, tmp_path / "half", resume=True, console=False) == again  # done is done


def test_from_the_command_line(dream_runs, tmp_path: Path, monkeypatch, capsys) -> None:
    source = dream_runs("images")
    monkeypatch.chdir(tmp_path)
    words = ["train", "--world", str(source), "--controller.kind", "evolution", "--name", "bred", "--json"]
    words += [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    assert cli.main(words) == 0
    assert (
        json.loads(capsys.readouterr().out)["updates"] == 9 and (tmp_path / "runs" / "bred" / "summary.json").exists()
    )
    assert cli.main(["train", "--resume", "runs/bred", "--learn.updates", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 12


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--worldmodel.layers", "3"], "--worldmodel.layers cannot change"),
        (["--learn.steps", "3"], "--learn.steps cannot change"),
        (["--replay.length", "9999"], "replay.length"),
        (["quickstart"], "unexpected 'quickstart'"),
    ],
)
def test_bad_input_is_said_in_one_line(dream_runs, tmp_path: Path, monkeypatch, capsys, words, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words, "--world", str(dream_runs("images"))]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and problem in said[0] and not list(tmp_path.glob("runs/*"))


def test_a_world_that_is_none(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--world", "runs/nowhere"]) == 2
    assert "there is no such run" in capsys.readouterr().err


def test_v_and_m_of_another_shape(dream_runs, tmp_path: Path) -> None:
    config = told(dream_runs("images"), "actor_critic", **{"worldmodel.width": 32})
    with pytest.raises(UserError, match=r"V and M .* are not those"):
        dream_loop.train(config, tmp_path / "new", console=False)
