"""Another C in the dreams of a run that is there."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.run import checkpoint
from longdream.agent.run.folder import load_agent, open_run
from longdream.agent.run.signals import Interrupted
from longdream.agent.train import imagined as train_imagined
from longdream.agent.train.imagined import ImaginationTrainer
from longdream.envs.contract import UserError

SMALL = {"learn.updates": 9, "evaluate.times": 0, "evaluate.episodes": 2, "evaluate.final_episodes": 1}
SMALL |= {"evaluate.save_seconds": 0.0}
KWARGS = {"actor_critic": {}, "evolution": {"population": 6, "moments": 3}, "tree": {"simulations": 3}}


def imagined(source: Path, kind: str, **settings: object) -> Config:
    """The config of a run in the dreams of `source`; names with __ for dots."""
    own = {"kind": "imagination", "world": str(source), "controller.kind": kind, "controller.kwargs": KWARGS[kind]}
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return options.update(open_run(source).config, SMALL | own | named)


def record(folder: Path) -> list[dict]:
    """The lines of metrics, without what the clock on the wall says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def without_clock(summary: dict) -> dict:
    return {key: value for key, value in summary.items() if key != "wall_s"}


@pytest.mark.parametrize(("run", "kind"), [("images", "actor_critic"), ("images", "evolution"), ("mixed", "tree")])
def test_v_and_m_stay_and_c_learns(dream_runs, tmp_path: Path, run: str, kind: str) -> None:
    source = dream_runs(run)
    before = load_agent(source)[0].model.state_dict()
    summary = ImaginationTrainer.train(imagined(source, kind), tmp_path / "new", console=False)
    assert summary["updates"] == 9 and summary["env_steps"] == open_run(source).saved[1] and summary["episodes"] == 1
    agent, _ = load_agent(tmp_path / "new")
    config = agent.config
    after = agent.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and config.controller.kind == kind
    fresh = type(agent)(config, agent.spec).controller.state_dict()
    assert str(fresh) != str(agent.controller.state_dict())
    assert [line["step"] for line in record(tmp_path / "new") if "controller/return" in line] == list(range(1, 10))
    # it is a run like others: its dreams can be opened, and begin in the replay of the run that it dreamt of
    dreams = DreamVecEnv(3, tmp_path / "new", pool=8)
    obs, _ = dreams.reset(seed=1)
    assert np.isfinite(obs).all() and np.isfinite(dreams.step(dreams.action_space.sample())[1]).all()


@pytest.mark.parametrize(
    ("kind", "stops", "log_to"), [("actor_critic", (3, 4, 6), ()), ("evolution", (4,), ("tensorboard",))]
)
def test_resumed_is_uninterrupted(
    dream_runs, tmp_path: Path, monkeypatch, kind: str, stops: tuple[int, ...], log_to: tuple[str, ...]
) -> None:
    """At whatever update it stopped: lines and evaluations come once each, and where they would have come. The newest
    checkpoint is before an evaluation, right after it, and right after the next."""
    keep = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda root, step, tree: keep(root, step, tree, keep=100))
    config = imagined(dream_runs("images"), kind, evaluate__times=3, log__to=log_to)
    summary = ImaginationTrainer.train(config, tmp_path / "whole", console=False)
    lines = record(tmp_path / "whole")
    assert [line["step"] for line in lines if "evaluate/return_mean" in line] == [3, 5, 7]
    saved = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert len(saved) > 8
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "summary.json").unlink()
        for later in saved[stop:]:
            shutil.rmtree(folder / "checkpoints" / later)
        again = ImaginationTrainer.train(config, folder, resume=True, console=False)
        assert without_clock(again) == without_clock(summary)
        assert record(folder) == lines
        assert ImaginationTrainer.train(config, folder, resume=True, console=False) == again  # done is done


def test_stopped_in_an_evaluation(dream_runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation that a signal ends is made again, and is in the record once."""
    config = imagined(dream_runs("images"), "evolution", evaluate__times=2)
    summary = ImaginationTrainer.train(config, tmp_path / "whole", console=False)
    real, stopped = train_imagined.play, []

    def play(agent, *args: Any) -> Any:
        if agent.updates not in stopped:
            stopped.append(agent.updates)
            signal.raise_signal(signal.SIGTERM)
        return real(agent, *args)

    monkeypatch.setattr(train_imagined, "play", play)
    for resume in (False, True):
        with pytest.raises(Interrupted):
            ImaginationTrainer.train(config, tmp_path / "stopped", resume=resume, console=False)
    again = ImaginationTrainer.train(config, tmp_path / "stopped", resume=True, console=False)
    assert stopped == [3, 6] and without_clock(again) == without_clock(summary)
    assert record(tmp_path / "stopped") == record(tmp_path / "whole")


def test_a_run_can_be_made_longer(dream_runs, tmp_path: Path) -> None:
    """Lines and evaluations go on, evenly over what is now the whole."""
    config = imagined(dream_runs("images"), "evolution", evaluate__times=2)
    ImaginationTrainer.train(config, tmp_path / "run", console=False)
    before = record(tmp_path / "run")
    longer = options.update(config, {"learn.updates": 18})
    assert ImaginationTrainer.train(longer, tmp_path / "run", resume=True, console=False)["updates"] == 18
    lines = record(tmp_path / "run")
    assert [line for line in lines if line["step"] < 9] == [line for line in before if line["step"] < 9]
    assert [line["step"] for line in lines if "count/updates" in line] == list(range(1, 19))
    assert [line["step"] for line in lines if "evaluate/return_mean" in line] == [3, 6, 12]


def test_from_the_command_line(dream_runs, tmp_path: Path, monkeypatch, capsys) -> None:
    source = dream_runs("images")
    monkeypatch.chdir(tmp_path)
    words = ["train", "--world", str(source), "--controller.kind", "evolution", "--name", "bred", "--json"]
    settings = SMALL | {f"controller.kwargs.{key}": value for key, value in KWARGS["evolution"].items()}
    words += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    assert cli.main(words) == 0
    assert (
        json.loads(capsys.readouterr().out)["updates"] == 9 and (tmp_path / "runs" / "bred" / "summary.json").exists()
    )
    assert cli.main(["train", "--resume", "runs/bred", "--learn.updates", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 12


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--worldmodel.layers", "3"], "--worldmodel.layers cannot change: V and M of"),
        (["--learn.steps", "3"], "--learn.steps means nothing to a run of kind imagination"),
        (["--evaluate.every", "3"], "--evaluate.every means nothing to a run of kind imagination"),
        (["--kind", "online"], "--world means nothing to a run of kind online, only to imagination"),
        (["--kind", "video"], "means nothing to a run of kind video"),
        (
            ["--controller.kind", "evolution", "--controller.kwargs.poplation", "6"],
            "controller.kwargs.poplation: there is",
        ),
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
    config = imagined(dream_runs("images"), "actor_critic", worldmodel__width=32)
    with pytest.raises(UserError, match=r"V and M .* are not those"):
        ImaginationTrainer.train(config, tmp_path / "new", console=False)
