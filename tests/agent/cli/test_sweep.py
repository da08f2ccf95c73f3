"""A search for settings: it finds, goes on after it was stopped, and says what is wrong with its file."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longdream.agent.cli import main as cli

pytest.importorskip("optuna")

FILE = """
train: tiny
settings: {learn.steps: 60, learn.prefill: 40, evaluate.every: 0, evaluate.final_episodes: 2, learn.warmup: 1}
search:
  learn.model_rate: {low: 1e-4, high: 1e-2, log: true}
  worldmodel.mixer: [hybrid, window]
"""


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rates.yaml").write_text(FILE + "metric: updates\n")
    command = [sys.executable, "-m", "longdream", "sweep", "rates.yaml", "--trials", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # once the second trial's run trains
            if "t1-s0] training" in line:
                process.send_signal(signal.SIGTERM)
                break
        process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    began = json.loads((Path("runs") / "rates-t0-s0" / "summary.json").read_text())
    assert cli.main(["sweep", "rates.yaml", "--trials", "2", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert "no figure of importance" in said.err and result["figure"] is None  # both are worth the same
    assert [row["runs"] for row in result["trials"]] == [["runs/rates-t0-s0"], ["runs/rates-t1-s0"]]
    assert [row["trial"] for row in result["trials"]] == [0, 1] and result["trials"][0]["value"] == began["updates"]
    assert len({row["settings"]["learn.model_rate"] for row in result["trials"]}) == 2
    assert sorted(path.name for path in Path("runs").iterdir()) == ["rates", "rates-t0-s0", "rates-t1-s0"]
    config = (Path("runs") / "rates-t1-s0" / "config.yaml").read_text()
    assert f"mixer: {result['trials'][1]['settings']['worldmodel.mixer']}" in config
    Path("rates.yaml").write_text(FILE.replace("1e-2", "2e-2") + "metric: updates\n")
    assert cli.main(["sweep", "rates.yaml"]) == 2
    assert "runs/rates holds a search with another plan" in capsys.readouterr().err


def test_the_best_and_what_mattered_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With the training, which the other test does, replaced by what it would bring."""
    monkeypatch.chdir(tmp_path)
    Path("rates.yaml").write_text(FILE + "trials: 30\n")

    def worth(runs: list, jobs: int) -> list[dict]:
        return [{"return_mean": -abs(config.learn.model_rate - 1e-3)} for config, _ in runs]

    monkeypatch.setattr("longdream.agent.cli.seeds.train_all", worth)
    assert cli.main(["sweep", "rates.yaml", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["trials"]) == 30
    assert abs(result["best"]["settings"]["learn.model_rate"] - 1e-3) < 5e-4
    importance = result["importance"]
    assert importance["learn.model_rate"] > importance["worldmodel.mixer"]
    assert Path(result["figure"]).read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: tiny", "must say what to train and what to search"),
        (FILE + "trails: 3", "unknown 'trails': did you mean trials"),
        (FILE + "direction: maximise", "did you mean maximize"),
        (FILE + "seeds: [1, 1]", "different seeds"),
        (FILE + "trials: many", "trials 'many'"),
        ("train: tiny\nsearch: {learn.rate: [1]}", "unknown setting learn.rate"),
        ("train: tiny\nsearch: {learn.model_rate: {low: 1, high: 1}}", "low must be less than high"),
        ("train: tiny\nsearch: {learn.model_rate: {low: 0, high: 1, log: true}}", "positive with log"),
        ("train: tiny\nsearch: {learn.model_rate: 3}", "give a list of choices"),
        ("train: tiny\nsearch: {precision: [tf32, tf23]}", "did you mean tf32"),
        ("train: tny\nsearch: {seed: [1]}", "unknown preset 'tny': did you mean tiny"),
        ("[", "is no YAML file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(text)
    assert cli.main(["sweep", "s.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("runs").exists()


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["sweep", "s.yaml"]) == 2
    assert "pip install 'longdream[sweep]'" in capsys.readouterr().err
