"""`longdream bench update` with a preset of kind online; test_world_model.py has kind video."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longdream.agent.bench.common import process_age
from longdream.agent.bench.model import update
from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.run import checkpoint
from longdream.agent.train.trainer import OnlineTrainer

KEYS = {
    "rows_per_s", "dreamt_steps_per_s", "env_steps_per_s", "ms", "updates", "rows_per_update",
    "dreamt_steps_per_update", "first_update_s", "first_full_update_s", "peak_bytes", "device", "preset",
}  # fmt: skip


def test_a_run_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    age = process_age()
    given = {"learn.warmup_model": 2, "learn.warmup": 3}
    flags = ["--preset", "tiny", "--repeats", "5", "--settings", json.dumps(given), "--device", "cpu", "--json"]
    assert cli.main(["bench", "update", *flags]) == 0
    wall = time.perf_counter() - began
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert "ms an update" in captured.err and "rows/s" in captured.err
    assert result.keys() == KEYS
    config = options.load("tiny")
    rows = config.replay.batch * config.replay.length
    dreamt = config.replay.batch * config.controller.imagination_starts * config.controller.horizon
    assert (result["rows_per_update"], result["dreamt_steps_per_update"]) == (rows, dreamt)
    assert result["rows_per_s"] == pytest.approx(rows / result["ms"] * 1e3)
    assert result["dreamt_steps_per_s"] == pytest.approx(dreamt / result["ms"] * 1e3)
    assert result["env_steps_per_s"] * config.learn.train_ratio == pytest.approx(result["rows_per_s"], rel=0.2)
    assert result["updates"] == 5 and 0 < result["ms"] < 1e3 * wall / 5
    assert age < result["first_update_s"] < result["first_full_update_s"] < age + wall + 1
    assert (result["preset"], result["device"], result["peak_bytes"]) == ("tiny", "cpu", None)


def test_a_turn_of_several_updates_is_not_cut_and_nothing_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    learn = OnlineTrainer.learn

    def watched(trainer: OnlineTrainer, stage: update.Stage) -> None:
        stages.append(stage)
        learn(trainer, stage)

    def refused(*_: object) -> None:
        raise AssertionError("a measurement neither evaluates nor writes checkpoints")

    monkeypatch.setattr(OnlineTrainer, "learn", watched)
    monkeypatch.setattr(OnlineTrainer, "evaluate", refused)
    monkeypatch.setattr(checkpoint, "save", refused)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    # three updates per turn of 4 copies; it ends after learn.steps
    given = {"learn.train_ratio": 24, "learn.warmup": 2, "learn.steps": 64, "evaluate.save_seconds": 0}
    result = update.measure("tiny", given, repeats=13, device="cpu")
    assert result["updates"] == 15
    assert stages == ["encoder"] * 2 + ["controller"] * (9 + 15)
    assert result["first_update_s"] == result["first_full_update_s"]  # M's first update is one of V, M and C
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clips", "2"], "--clips means nothing to a preset of kind online"),
        (["--frames", "8"], "--frames means nothing to a preset of kind online"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--settings", '{"learn.train_ratio": 0}'], "learn.train_ratio = 0"),
        (["--settings", '{"learn.stepps": 9}'], "unknown setting learn.stepps"),
        (["--settings", '{"kind": "imagination"}'], "--preset tiny is of kind imagination"),
    ],
)
def test_a_mistake_ends_in_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "update", "--preset", "tiny", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="known on Linux only")
def test_the_age_of_a_process_counts_from_its_start() -> None:
    script = "import time; time.sleep(0.5); from longdream.agent.bench.common import process_age; print(process_age())"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=os.getcwd())
    wall = time.perf_counter() - began
    assert 0.4 < float(done.stdout) < wall + 0.1
