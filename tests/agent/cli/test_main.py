"""The command line as its user meets it: help, mistakes in one line, JSON as the last line of stdout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longdream import __version__
from longdream.agent import bench
from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.run import folder as run_folder

SHORT = ["--steps", "80", "--learn.warmup", "1", "--evaluate.final_episodes", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run `runs/short` has been trained from the command line."""
    folder = tmp_path_factory.mktemp("place")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert cli.main(["train", "tiny", "--name", "short", "--seed", "3", "--log.to", "tensorboard", *SHORT]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


# -- what works -------------------------------------------------------------------------------------------------------


def test_train_writes_a_run(here: Path) -> None:
    folder = Path("runs/short")
    assert {
        "config.yaml",
        "environment.txt",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "replay",
        "summary.json",
    } <= {path.name for path in folder.iterdir()}
    environment = (folder / "environment.txt").read_text()
    assert "torch: " in environment and "python: 3." in environment and "commit: " in environment
    summary = json.loads((folder / "summary.json").read_text())
    assert {
        "return_mean",
        "return_std",
        "return_ci95",
        "episodes",
        "random_mean",
        "without_memory_mean",
    } <= summary.keys()
    assert summary["env"] == "longdream/Recall-v0" and summary["seed"] == 3 and summary["episodes"] == 2
    assert summary["env_steps"] >= 80 and summary["updates"] > 0 and summary["wall_s"] > 0
    assert run_folder.open_run(folder).config.learn.steps == 80


def test_evaluate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "runs/short", "--episodes", "3", "--json"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert printed.out.count("\n") == 1 and "playing 3 episodes" in printed.err
    assert {
        "return_mean",
        "return_std",
        "return_ci95",
        "episodes",
        "random_mean",
        "env",
        "env_steps",
        "seed",
    } <= summary.keys()
    assert summary["episodes"] == 3 and summary["env_steps"] == run_folder.open_run("runs/short").saved[1]
    assert cli.main(["evaluate", "runs/short", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    own = json.loads(Path("runs/short/summary.json").read_text())
    assert {key: own[key] for key in again} == again  # by default, the run's own evaluation


def test_evaluate_with_memory_erased(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--episodes", "4", "--copies", "4", "--forget-every", "1,6"]
    assert cli.main(["evaluate", "runs/short", *flags, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["erased"]) == ["1", "6"] and summary["episodes"] == 4
    assert summary["erased"]["1"]["return_mean"] == summary["without_memory_mean"]
    low, high = summary["erased"]["6"]["return_ci95"]
    assert low <= summary["erased"]["6"]["return_mean"] <= high
    assert cli.main(["evaluate", "runs/short", *flags]) == 0
    assert re.search(r"memory erased every 6  +[\d.-]+  +95% interval", capsys.readouterr().out)
    assert cli.main(["evaluate", "runs/short", "--forget-every", "0"]) == 2
    assert "--forget_every 0: must be at least 1" in capsys.readouterr().err


def test_evaluate_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--env.kwargs", '{"corridor": 5, "size": 16}', "--episodes", "2", "--seed", "9", "--json"]
    assert cli.main(["evaluate", "runs/short", *flags]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["seed"] == 9 and summary["length_mean"] >= 6


def test_arguments_of_the_environment_one_by_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--env.kwargs.KEY` in every command that takes an environment."""
    flags = ["--env.kwargs.corridor", "7", "--episodes", "2", "--json"]
    assert cli.main(["evaluate", "runs/short", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["length_mean"] >= 8  # the size stays that of the run
    assert (
        cli.main(["evaluate", "random", "--env", "longdream/Recall-v0", "--env.kwargs.corridor", "7", *flags[2:]]) == 0
    )
    assert json.loads(capsys.readouterr().out)["length_mean"] >= 8
    assert cli.main(["check-env", "longdream/Recall-v0", "--env.kwargs.size=24", "--steps", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    quick = ["--steps", "32", "--copies", "2", "--evaluate_every", "0", "--final_episodes", "2", "--name", "bounds"]
    small = ["--env.kwargs.corridor", "7", "--env.kwargs.size", "16", "--env-kwargs.doors", "2"]
    quick += ["--kwargs", '{"n_steps": 16, "batch_size": 16, "n_epochs": 1}']
    assert cli.main(["baseline", "--env", "longdream/Recall-v0", *small, *quick, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length_mean"] >= 8


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"longdream {__version__}\n"
    assert cli.main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": __version__}


MINE = """
import gymnasium as gym
import numpy as np


class Mine(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, 0.1 * self.t, np.float32), float(action), self.t >= 6, False, {}


gym.register("Mine-v0", entry_point="envs.mine:Mine")
"""


def test_a_users_own_folders_stay_theirs(tmp_path: Path) -> None:
    """Folders envs/, agent/ and runs/ in the working directory, with modules of the same names as ours among them."""
    for name in ("envs", "agent", "runs", "controller", "worldmodel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "make.py").write_text(f"WHOSE = '{name} of the user'\n")
    (tmp_path / "envs" / "mine.py").write_text(MINE)
    code = """
import longdream, longdream.agent.cli.main, longdream.envs.make
from envs import make, mine
import agent.make, runs.make, controller.make, worldmodel.make
assert make.WHOSE == "envs of the user" and agent.make.WHOSE == "agent of the user"
assert [m.make.WHOSE.split()[0] for m in (runs, controller, worldmodel)] == ["runs", "controller", "worldmodel"]
assert longdream.envs.make.__name__ == "longdream.envs.make" and hasattr(longdream.envs.make, "World")
print(mine.Mine.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "envs.mine\n"
    words = [sys.executable, "-P", "-m", "longdream", "check-env", "envs.mine:Mine-v0", "--steps", "30", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True and report["env"] == "envs.mine:Mine-v0"


def test_in_words(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "runs/short", "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "95% interval" in out and "random" in out and "real steps" in out


def test_envs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert {"longdream/Recall-v0", "longdream/Counting-v0"} <= set(known["own"]) and "CartPole-v1" in known["others"]


def test_the_program_itself(here: Path) -> None:
    """As a process: exit code, streams, and a controller of the user's own beside the current folder."""
    own = "class Mine(ActorCritic):\n    pass\n"
    Path("mine.py").write_text(
        f"from longdream.controller.actor_critic import ActorCritic\n\n\n{own}",
        encoding="utf-8",
    )
    flags = ["--controller.kind", "mine:Mine", "--name", "own", "--json", *SHORT]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "longdream", "train", "tiny", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("runs/own/summary.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == summary | {"run": "runs/own"}
    assert done.stdout.count("\n") == 1 and "step " in done.stderr
    assert json.loads(Path("runs/short/summary.json").read_text())["seed"] == 3


def test_a_run_can_be_run_again_from_its_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "runs/short/config.yaml", "--steps", "72", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 3
    again, before = run_folder.open_run("runs/short-s3-1").config, run_folder.open_run("runs/short").config
    assert options.update(again, {"learn.steps": 80}) == before


def test_what_a_resumed_run_may_change(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is over is not run again, but its flags are checked."""
    flags = ["--evaluate.episodes", "3", "--evaluate.log_every", "40", "--threads", "1", "--device", "cpu"]
    assert cli.main(["train", "--resume", "runs/short", *flags, "--json"]) == 0
    summary = json.loads(Path("runs/short/summary.json").read_text())
    assert json.loads(capsys.readouterr().out) == summary | {"run": "runs/short"}


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["train"],
        ["evaluate"],
        ["dream"],
        ["compare"],
        ["plot"],
        ["list"],
        ["sweep"],
        ["envs"],
        ["check-env"],
        ["collect"],
        ["doctor"],
        ["bench"],
        ["demo"],
        ["play"],
        ["watch"],
        *(["bench", b] for b in bench.BENCHES),
    ],
)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words if words in ([], ["--help"]) else [*words, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and len(printed.out) > 100
    if words:
        assert "usage: longdream" in printed.out or "longdream train PRESET" in printed.out


def test_help_on_train_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "quickstart", "--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in options.fields() if f"--{name}" not in out] == []
    assert all(name in out and text in out for name, text in options.presets().items())
    flat = " ".join(out.replace("│", " ").split())
    assert "Replayed rows learned from per real step. (default: 64.0)" in flat  # docstring, default
    assert "--learn.train_ratio FLOAT" in flat and "longdream train --resume runs/quickstart-s3-1" in out


# -- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("trian", "unknown command 'trian': did you mean train?"),
    ("train", "Name a preset, one of cartpole"),
    ("train quickstrt", "unknown preset 'quickstrt': did you mean quickstart?"),
    ("train zzz", "unknown preset 'zzz': there are cartpole"),
    ("train nothing.yaml", "nothing.yaml: there is no such file"),
    ("train tiny quickstart", "unexpected 'quickstart': one preset at a time"),
    ("train tiny --worldmodl.layers 2", "unknown flag --worldmodl.layers: did you mean --worldmodel.layers"),
    ("train tiny --layers 2", "unknown flag --layers: did you mean --worldmodel.layers or --controller.layers?"),
    ("train tiny --sed 2", "unknown flag --sed: did you mean --seed?"),
    ("train tiny --xyzzy 2", "unknown flag --xyzzy: longdream train --help lists them all"),
    ("train tiny --worldmodel 2", "--worldmodel is a group of settings: name one of --worldmodel.mixer"),
    ("train tiny -s 2", "unknown flag -s: flags have two dashes"),
    ("train tiny --seed", "--seed needs a value"),
    ("train tiny --seed --json", "--seed needs a value"),
    ("train tiny --seed x", "--seed 'x': should be a valid integer"),
    ("train tiny --seed 1.5", "--seed '1.5': should be a valid integer"),
    ("train tiny --seed -1", "--seed '-1': must be at least 0"),
    ("train tiny --steps 10", "learn.steps = 10: nothing is learned before step 60"),
    ("train tiny --worldmodel.layers 0", "--worldmodel.layers '0': must be at least 1"),
    ("train tiny --worldmodel.num_heads 3", "worldmodel.num_heads = 3 does not divide worldmodel.width = 16"),
    ("train tiny --worldmodel.mixer transformer", "worldmodel.mixer = transformer: use one of hybrid, ssm, ssm+local"),
    ("train tiny --device gpu", "--device 'gpu': should be 'auto', 'cpu' or 'cuda': did you mean cpu?"),
    ("train tiny --env.kwargs {", "--env.kwargs {: cannot be read; write it like"),
    ("train tiny --env.kwargs 3", "--env.kwargs 3: should be a valid dictionary"),
    ("train tiny --env.kwargs.corridr 3", "cannot be made with corridor=3, size=16, corridr=3"),
    ("train tiny --env Recall-v0", "did you mean"),
    ("train tiny --env nowhere:Env-v0", "cannot import module 'nowhere'"),
    ("train tiny --env.kwargs.corridor 0", "it needs a corridor of at least 1"),
    (
        "train tiny --video.context 3",
        "--video.context means nothing to a run of kind online, only to video: name a preset",
    ),
    ("train tiny --learn.updates 3", "--learn.updates means nothing to a run of kind online, only to imagination and"),
    ("train tiny --evaluate.times 3", "--evaluate.times means nothing to a run of kind online"),
    ("train tiny --kind film", "--kind 'film': should be 'online', 'imagination' or 'video'"),
    ("train tiny --kind video", "learn from what? Name a folder of recordings: --data DIR"),
    ("train tiny --kind imagination", "kind = imagination and world = ''"),
    ("train tiny --controller.kwargs.elites 3", "controller.kwargs.elites: actor_critic has no settings of its own"),
    (
        "train tiny --controller.kind planner --controller.kwargs.elite 3",
        "controller.kwargs.elite: there is no such setting; there are method, candidates, elites",
    ),
    (
        "train tiny --controller.kind mine",
        "controller.kind = mine: use one of actor_critic, planner, tree, evolution or package.module:Class",
    ),
    ("train tiny --controller.kind nowhere:Mine", "No module named 'nowhere'; start in the folder where it lies"),
    (
        "train tiny --forcing.objective flwo",
        "forcing.objective = flwo: use one of flow, mask, prior, teacher or package.module:Class",
    ),
    ("train tiny --replay.capacity 10", "replay.capacity = 10"),
    ("train tiny --replay.capacity 3", "replay capacity 3 is too small"),
    ("train tiny --encoder.grid 3", "encoder.grid = 3"),
    ("train tiny --name short", "runs/short is in use: --resume runs/short goes on with it; --name other starts"),
    ("train tiny --name ../up", "--name '../up' is no name for a folder"),
    ("train --resume runs/none", "runs/none: there is no such run"),
    ("train --resume runs/shrt", "runs/shrt: there is no such run: did you mean runs/short?"),
    ("train --resume runs", "runs is no run: it holds no config.yaml"),
    ("train --resume runs/short --seed 4", "--seed cannot change in a run that goes on"),
    ("train --resume runs/short --env.kwargs.corridor 4", "--env.kwargs.corridor cannot change in a run that goes on"),
    ("train --resume runs/short --evaluate.times 4", "--evaluate.times means nothing to a run of kind online"),
    ("train --resume runs/short --name other", "--name cannot change in a run that goes on"),
    ("train --resume runs/short tiny", "unexpected 'tiny': a run that is resumed has its settings already"),
    ("evaluate", "needs the folder of a run, runs/NAME"),
    ("evaluate runs/none", "runs/none: there is no such run"),
    ("evaluate runs/short more", "unexpected 'more'"),
    ("evaluate runs/short --episods 3", "unknown flag --episods: did you mean --episodes?"),
    ("evaluate runs/short --episodes 0", "--episodes 0: must be at least 1"),
    ("evaluate runs/short --episodes x", "--episodes 'x': should be a valid integer"),
    ("evaluate runs/short --env.kwargs.corridr 3", "cannot be made with corridor=3, size=16, corridr=3"),
    ("evaluate runs/short --env.kwargz.corridor 3", "unknown flag --env.kwargz.corridor"),
    ("baseline --env longdream/Recall-v0 --env.kwargs.corridr 3", "corridr"),
    ("check-env longdream/Recall-v0 --env.kwargs.corridr 3", "cannot be made with {'corridr': 3}"),
    ("check-env longdream/Recall-v0 --env.kwargs 3", "--env.kwargs 3: should be a valid dictionary"),
    ("evaluate runs/short --env CartPole-v1", "CartPole-v1 does not fit this agent: its 'obs' is a vector"),
    (
        "evaluate runs/short --env longdream:longdream/Recall-v0 --env.kwargs.corridr 3",
        "cannot be made with corridor=3, size=16, corridr=3",
    ),
    ("evaluate runs/short --env NoSuch-v0", "unknown environment 'NoSuch-v0'"),
    ("dream", "needs the folder of a run"),
    ("dream runs/none", "runs/none: there is no such run"),
    ("bench", "bench what? Name one of act"),
    ("bench lop", "unknown bench 'lop': did you mean loop?"),
    ("bench act --stps 3", "unknown flag --stps: did you mean --steps?"),
    ("envs everything", "unexpected 'everything'"),
    ("check-env", "longdream check-env needs the name of an environment, ID or module:ID"),
    ("check-env NoSuch-v0", "unknown environment 'NoSuch-v0'"),
    ("doctor now", "unexpected 'now'"),
    ("colect", "unknown command 'colect': did you mean collect?"),
    ("evaluate oracl", "oracl: there is no such run"),
]


@pytest.mark.parametrize(("line", "problem"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_in_one_line(line: str, problem: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path("runs").iterdir())
    assert cli.main(line.split(" ")) == 2
    shown = capsys.readouterr()
    # only what says how far it had come may stand before the one line
    *rest, last = shown.err.splitlines()
    assert [text for text in rest if not text.startswith("playing")] == []
    assert last.startswith("longdream: ") and problem in last
    assert sorted(Path("runs").iterdir()) == before


def test_a_mistake_with_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "quickstrt", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"error": "unknown preset 'quickstrt': did you mean quickstart?"}


def test_debug_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGDREAM_DEBUG", "1")
    assert cli.main(["train", "quickstrt"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "options.py" in err


def test_a_run_without_a_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder.create(Path("runs/empty"), options.load("tiny"))
    assert cli.main(["evaluate", "runs/empty"]) == 2
    assert "no checkpoint in runs/empty/checkpoints" in capsys.readouterr().err


def test_a_config_that_names_what_there_is_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder.create(Path("runs/old"), options.load("tiny"))
    config = Path("runs/old/config.yaml")
    config.write_text(config.read_text().replace("target_ema:", "how_slow:"))
    assert cli.main(["evaluate", "runs/old"]) == 2
    assert "runs/old/config.yaml: unknown setting controller.how_slow" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["evaluate", "runs/older"], ["dream", "runs/older"], ["train", "--resume", "runs/older"]]
)
def test_a_run_of_another_version(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("runs/older").exists():
        run_folder.create(Path("runs/older"), options.load("tiny"))
        config = Path("runs/older/config.yaml")
        config.write_text(config.read_text().replace(f"version: {__version__}", "version: 0.1.0\nhow_slow: 3"))
    assert cli.main(words) == 2
    problem = (
        f"runs/older/config.yaml was written by longdream 0.1.0, this is {__version__}: use that version to read it"
    )
    assert capsys.readouterr().err == f"longdream: {problem}\n"


def test_a_reader_who_has_read_enough_is_no_error() -> None:
    command = f"{sys.executable} -m longdream train --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.startswith("usage: longdream train")
    assert done.stdout.split()[-1] == "141"
