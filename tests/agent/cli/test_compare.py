"""Runs beside each other: train --seeds, compare, plot, list. The logger writes their records; seeds train for real."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.run.folder import create
from longdream.agent.run.logger import Logger

SHORT = ["--steps", "60", "--learn.prefill", "40", "--learn.warmup", "1", "--evaluate.every", "0"]
SHORT += ["--evaluate.final_episodes", "2"]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a run of `steps` steps that took `wall` seconds, and was worth `value` times its progress."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, value: float, steps: int = 100, wall: float = 10.0, **settings: object) -> Path:
        config = options.changed(options.load("tiny"), dict(settings))
        folder = create(tmp_path / "runs" / name, config)
        with Logger(folder, console=False, sinks=()) as logger:
            for step in range(0, steps + 1, steps // 10):
                done = step / steps
                logger.write(step, {"time/wall": wall * done, "count/updates": 2 * step})
                logger.write(step, {"evaluate/return_mean": value * done})
        return Path("runs") / name

    return make


def run(capsys: pytest.CaptureFixture, *words: object, code: int = 0) -> dict:
    assert cli.main([*map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_groups_are_compared_at_equal_steps_and_at_equal_time(record: Callable, capsys) -> None:
    a = [record(f"a-s{i}", value, seed=i) for i, value in enumerate((8, 9, 10, 11))]
    b = [record(f"b-s{i}-1", value, steps=50, wall=20, seed=i) for i, value in enumerate((4, 5, 6))]
    result = run(capsys, "compare", *a, *b)
    assert result["steps"] == 50 and result["wall_s"] == 10
    ours, theirs = result["groups"]["a"], result["groups"]["b"]
    assert [row["at_steps"] for row in ours["runs"]] == [4, 4.5, 5, 5.5] and [row["seed"] for row in ours["runs"]] == [
        0, 1, 2, 3,
    ]  # fmt: skip
    assert ours["at_steps"]["iqm"] == 4.75 and ours["last"]["iqm"] == 9.5 and ours["at_wall"]["iqm"] == 9.5
    assert theirs["at_steps"]["iqm"] == 5 and theirs["at_wall"]["mean"] == 2.5
    assert 4 <= ours["at_steps"]["ci95"][0] <= 4.75 <= ours["at_steps"]["ci95"][1] <= 5.5
    chances = {(row["of"], row["over"], row["at"]): row["probability"] for row in result["improvement"]}
    assert chances["a", "b", "at_wall"] == 1 and chances["b", "a", "at_wall"] == 0
    # of 12 pairs, ours is higher in 4.5, 5, 5.5 over 4 (3), 5.5 over 5 (1); ties at 4 and at 5
    assert chances["a", "b", "at_steps"] == pytest.approx(5 / 12)


def test_a_quoted_pattern_is_a_group(record: Callable, capsys) -> None:
    for name in ("x1", "x2", "other"):
        record(name, 1.0)
    assert {k: len(v["runs"]) for k, v in run(capsys, "compare", "runs/x*", "runs/other")["groups"].items()} == {
        "runs/x*": 2,
        "other": 1,
    }
    assert run(capsys, "compare", "runs/other")["groups"]["other"]["last"]["ci95"] is None
    capsys.readouterr()
    assert cli.main(["compare", "runs/x1", "runs/x2"]) == 0
    said = capsys.readouterr().out
    assert "interquartile mean [95%]" in said and "per seed" in said and "runs/x2" in said


def test_what_cannot_be_compared_is_one_line(record: Callable, capsys, tmp_path: Path) -> None:
    run_a, run_b = record("a-s1", 1.0), record("b-s1", 1.0, **{"env.id": "CartPole-v1"})
    old = record("old-s1", 1.0)
    text = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(text.replace("version: 0.3", "version: 0.2"))
    (tmp_path / "runs" / "empty").mkdir()
    for words, message in (
        ([run_a, run_b], "plays CartPole-v1: compare runs of one environment"),
        ([run_a, run_a], "runs/a-s1 is named twice"),
        ([run_a, old], "was written by longdream 0.2"),
        ([run_a, "--metric", "evaluate/returns"], "has no metric evaluate/returns: it has count/updates, evaluate/ret"),
        (["runs/empty"], "runs/empty is no run"),
        (["runs/z*"], "no run matches 'runs/z*'"),
        ([], "compare what?"),
    ):
        assert cli.main(["compare", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(("x", "suffix"), [("steps", "pdf"), ("wall", "png"), ("updates", "svg")])
def test_curves_are_drawn(record: Callable, capsys, x: str, suffix: str) -> None:
    words = [record(f"a-s{i}", i, seed=i, steps=100 + 10 * i) for i in range(3)] + [record("b-s1", 2.0)]
    result = run(capsys, "plot", *words, "--x", x, "--out", f"figures/one.{suffix}")
    assert Path(result["figure"]).stat().st_size > 5_000 and result["groups"] == {"a": 3, "b": 1}
    if suffix == "svg":
        text = Path(result["figure"]).read_text()
        assert "a (3 seeds)" in text and "b (1 seed)" in text
    assert cli.main(["plot", *map(str, words), "--out", "one.doc"]) == 2
    assert "figures are written as .pdf, .png, .svg" in capsys.readouterr().err


def test_runs_are_listed_with_what_has_become_of_them(record: Callable, capsys, tmp_path: Path) -> None:
    record("stopped", 1.0, seed=3)
    (record("complete", 2.0) / "summary.json").write_text("{}")
    (record("torn", 1.0) / "metrics.jsonl").open("ab").write(b'{"step": 1, "eva')
    (record("strange", 1.0) / "config.yaml").write_text("seed: much")
    (tmp_path / "runs" / "no run").mkdir()
    with open(record("training", 1.0) / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = {Path(row["run"]).name: row for row in run(capsys, "list")["runs"]}
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "stopped": "stopped", "complete": "complete", "torn": "stopped", "strange": "unreadable", "training": "training"
    }  # fmt: skip
    assert rows["stopped"]["steps"] == 100 and rows["stopped"]["return"] == 1 and rows["stopped"]["seed"] == 3
    assert "seed 'much'" in rows["strange"]["problem"] and rows["torn"]["steps"] == 100
    written = (tmp_path / "runs" / "complete" / "metrics.jsonl").stat().st_mtime
    assert rows["complete"]["written"] == pytest.approx(written, abs=1) and rows["complete"]["size"] > 1_000
    assert cli.main(["list"]) == 0 and "ago" in capsys.readouterr().out
    assert cli.main(["list", "nowhere"]) == 2 and "no such folder" in capsys.readouterr().err


def test_seeds_are_trained_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(capsys, "train", "tiny", "--seeds", "1,2,3", "--jobs", "2", "--name", "x", *SHORT)
    assert result["ok"] and [row["run"] for row in result["runs"]] == ["runs/x-s1", "runs/x-s2", "runs/x-s3"]
    assert [row["seed"] for row in result["runs"]] == [1, 2, 3] and result["return"]["ci95"] is not None
    alone = run(capsys, "train", "tiny", "--seed", "2", "--name", "alone", *SHORT)
    lines = [(Path("runs") / name / "metrics.jsonl").read_text().splitlines() for name in ("x-s2", "alone")]
    same = [[{k: v for k, v in json.loads(line).items() if "time/" not in k} for line in each] for each in lines]
    assert same[0] == same[1] and alone["return_mean"] == result["runs"][1]["return_mean"]
    for words, message in (
        (["--seeds", "3,4,2", "--name", "x"], "runs/x-s3, runs/x-s2 exist: leave these seeds out"),
        (["--seeds", "1,1"], "give different seeds"),
        (["--seeds", "one"], "--seeds 'one': give whole numbers"),
        (["--seeds", "1", "--seed", "2"], "give one of them"),
        (["--jobs", "2"], "--jobs goes with --seeds"),
        (["--seeds", "5", "--worldmodel.width", "7"], "does not divide"),
    ):
        assert cli.main(["train", "tiny", *words]) == 2
        assert message in capsys.readouterr().err
    assert not list(Path("runs").glob("x-s4*")) and not list(Path("runs").glob("tiny*"))


def test_a_seed_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import gymnasium as gym, numpy as np\nclass Breaks(gym.Env):\n"
    source += "    observation_space = gym.spaces.Box(-1, 1, (2,))\n    action_space = gym.spaces.Discrete(2)\n"
    source += "    def reset(self, *, seed=None, options=None):\n        super().reset(seed=seed)\n"
    source += "        return np.zeros(2, np.float32), {}\n"
    source += "    def step(self, action):\n        raise RuntimeError('broken')\n"
    source += "gym.register('Breaks-v0', entry_point=Breaks)\n"
    (tmp_path / "breaking.py").write_text(source)
    result = run(capsys, "train", "tiny", "--seeds", "1", "--env", "breaking:Breaks-v0", *SHORT, code=1)
    assert not result["ok"] and "raised in step: RuntimeError: broken" in result["runs"][0]["error"]


def test_a_signal_ends_all_seeds_which_have_saved_themselves(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longdream", "train", "tiny", "--seeds", "1,2", "--jobs", "2", "--name", "x"]
    with subprocess.Popen(
        [*command, "--steps", "100000"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = [tmp_path / "runs" / f"x-s{i}" / "metrics.jsonl" for i in (1, 2)]
        while not all(path.is_file() and path.stat().st_size for path in metrics):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "go on with: longdream train --resume runs/x-s1" in said and "--resume runs/x-s2" in said
    assert all(list((path.parent / "checkpoints").iterdir()) for path in metrics)
