"""Where metrics are shown: sinks get every number, and a run does without one that fails."""

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longdream.agent.cli import main as cli
from longdream.agent.run.logger import Logger
from longdream.agent.run.sinks import find

SHORT = ["--steps", "60", "--learn.prefill", "40", "--learn.warmup", "1", "--evaluate.every", "0"]
SHORT += ["--evaluate.final_episodes", "2", "--name", "x"]
OWN = """
import json
class Lines:
    def __init__(self, folder, first_step, settings):
        self.file = open(folder / "lines.txt", "a")
        self.write(first_step, {"seed": settings["seed"]})
    def write(self, step, values):
        self.file.write(json.dumps([step, values]) + "\\n")
    def flush(self):
        self.file.flush()
    def close(self):
        self.file.close()
class Broken(Lines):
    def write(self, step, values):
        if values:
            raise RuntimeError("no connection")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_sinks.py").write_text(OWN)
    sys.modules.pop("my_sinks", None)
    return tmp_path


def recorded(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The numbers of metrics.jsonl, line by line."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)} for line in lines]
    return [(line["step"], values) for line, values in zip(lines, numbers, strict=True)]


def test_a_sink_of_ones_own_gets_what_is_recorded_and_goes_on(here: Path, capsys) -> None:
    assert cli.main(["train", "tiny", "--log.to", "my_sinks:Lines", "--seed", "5", *SHORT]) == 0
    lines = [json.loads(line) for line in (here / "runs/x/lines.txt").read_text().splitlines()]
    assert lines[0] == [0, {"seed": 5}] and [tuple(line) for line in lines[1:]] == recorded(here / "runs/x")
    assert not (here / "runs/x/tensorboard").exists()
    assert cli.main(["train", "--resume", "runs/x", "--steps", "80"]) == 0
    lines = [json.loads(line) for line in (here / "runs/x/lines.txt").read_text().splitlines()]
    began = next(i for i, line in enumerate(lines) if i and "seed" in line[1])
    later = [tuple(line) for line in lines[began + 1 :]]
    assert lines[began][0] >= 60 and len(later) > 2 and later == recorded(here / "runs/x")[-len(later) :]


def test_the_run_goes_on_without_a_sink_that_fails(here: Path, capsys) -> None:
    assert cli.main(["train", "tiny", "--log.to", "my_sinks:Broken,tensorboard", *SHORT]) == 0
    said = capsys.readouterr().err
    assert said.count("warning: Broken cannot be written (no connection): the run goes on without") == 1
    assert list((here / "runs/x/tensorboard").iterdir())


def in_wandb(path: Path) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log format, in blocks of 32 KiB after a header of 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_weights_and_biases_gets_the_metrics_offline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(here))
    (factory,) = find(["wandb"], {"seed": 3, "worldmodel.mixer": "hybrid"})
    for steps in (range(3), range(3, 5)):  # the second session goes on in the same run
        with Logger(here / "runs/x", console=False, sinks=[factory]) as logger:
            for step in steps:
                logger.write(step, {"evaluate/return_mean": step / 2}, note="a text is no metric")
        time.sleep(1.1)  # wandb names a session's folder by the second, and writes into the one that is there
    found: dict[str, list] = {"runs": [], "returns": []}
    for path in sorted((here / "wandb").glob("offline-run-*/*.wandb")):
        for data in in_wandb(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                found["runs"].append((record.run.run_id, record.run.project, record.run.display_name))
            for item in record.history.item:
                if "evaluate/return_mean" in (item.key, *item.nested_key):
                    found["returns"].append(json.loads(item.value_json))
    identity = json.loads((here / "runs/x/sinks.json").read_text())["wandb"]
    assert set(found["runs"]) == {(identity, "longdream", "x")}
    assert found["returns"] == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_mlflow_gets_the_metrics_in_its_file_store(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (factory,) = find(["mlflow"], {"seed": 3, "env.kwargs": {"corridor": 3}})
    for steps in (range(3), range(3, 5)):
        with Logger(here / "runs/x", console=False, sinks=[factory]) as logger:
            if steps[0]:
                logger.restore(logger.state() | {"step": 2})
            for step in steps:
                logger.write(step, {"evaluate/return_mean": step / 2, "count/updates": step})
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{here / 'mlruns'}")
    (experiment,) = client.search_experiments(filter_string="name = 'longdream'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "x" and run.data.params["seed"] == "3" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "evaluate/return_mean")
    assert [(metric.step, metric.value) for metric in history] == [(i, i / 2) for i in range(5)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "wandb is not installed: pip install 'longdream[wandb]'"),
        ("mlflow", "mlflow is not installed: pip install 'longdream[mlflow]'"),
        ("csv", "log.to = csv: use one of tensorboard, wandb, mlflow or package.module:Class"),
        ("no_such_module:Sink", "log.to = no_such_module:Sink: No module named"),
    ],
)
def test_a_sink_that_is_missing_is_named_before_anything_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str, message: str
) -> None:
    real: Callable = __import__("importlib.util").util.find_spec
    absent = ("wandb", "mlflow")
    monkeypatch.setattr("longdream.agent.run.sinks.find_spec", lambda n: None if n in absent else real(n))
    assert cli.main(["train", "tiny", "--log.to", name, *SHORT]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (here / "runs").exists()
