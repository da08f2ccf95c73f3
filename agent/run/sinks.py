"""Where metrics are shown beside metrics.jsonl, which is the record: TensorBoard, Weights & Biases, MLflow, or a class
of one's own (`log.to`).

A sink only shows what is recorded elsewhere. One that fails is dropped with a warning, and the run goes on.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from longdream.agent.run.files import read_text
from longdream.envs.contract import UserError
from longdream.worldmodel.types import class_by_name

IDS = "sinks.json"
"""File of a run with the names that its sinks know it by, so that a run that is resumed goes on in the same place."""
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow"}
"""The package that a sink needs, and the extra that brings it."""


class Sink(Protocol):
    """Takes metrics as they are written. A class is one if it is made as `Class(folder, first_step, settings)`: the
    run's folder, the first step that will be written (0, or where a resumed run goes on), and every setting by its
    dotted name."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers at a step, which does not decrease; several calls may have the same one."""
        ...

    def flush(self) -> None:
        """Called when the run saves a checkpoint."""
        ...

    def close(self) -> None:
        """Called once, at the end of the run or of its session."""
        ...


class Drawn(NamedTuple):
    """A picture as a PNG, or moving pictures as a GIF, and its size in pixels."""

    data: bytes
    height: int
    width: int


@runtime_checkable
class Drawing(Protocol):
    """A sink that also shows pictures."""

    def draw(self, step: int, pictures: dict[str, Drawn]) -> None:
        """Pictures by name, at a step."""
        ...


@runtime_checkable
class Warned(Protocol):
    """A sink that also shows warnings."""

    def warn(self, step: int, text: str) -> None:
        """A warning in one line, at a step."""
        ...


Factory = Callable[[Path, int], Sink]


class TensorBoard:
    """Event files in `folder`/tensorboard. Of a resumed run, what was written after its checkpoint is hidden."""

    def __init__(self, folder: Path, first_step: int, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

        _silence_writers()
        self.writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step or None)

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def draw(self, step: int, pictures: dict[str, Drawn]) -> None:
        """Pictures under Images. GIFs are written as such: what `add_video` needs to make them of frames (MoviePy) is
        not installed with the project, and its version 2 makes none, without an error."""
        from tensorboard.compat.proto import summary_pb2

        summary: Any = summary_pb2  # made by protobuf, which type checkers cannot read
        values = []
        for name, (data, height, width) in pictures.items():
            image = summary.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            values.append(summary.Summary.Value(tag=f"pictures/{name}", image=image))
        self.writer._get_file_writer().add_summary(summary.Summary(value=values), step)

    def warn(self, step: int, text: str) -> None:
        self.writer.add_text("warnings", text, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run in Weights & Biases, project longdream or WANDB_PROJECT. What its package reads from the environment holds:
    WANDB_MODE=offline needs no account, and `wandb sync` uploads such a run later."""

    def __init__(self, folder: Path, first_step: int, settings: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "longdream"),
            name=folder.name,
            id=_identity(folder, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            config=settings,
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run in MLflow, experiment longdream or MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI; without that, in files
    in ./mlruns."""

    def __init__(self, folder: Path, first_step: int, settings: dict[str, Any]) -> None:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"file:{Path('mlruns').absolute()}"))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "longdream")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        self.run = _identity(
            folder, "mlflow", lambda: self.client.create_run(experiment, run_name=folder.name).info.run_id
        )
        if first_step == 0:
            for key, value in settings.items():
                self.client.log_param(self.run, key, value)

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def flush(self) -> None: ...

    def close(self) -> None:
        self.client.set_terminated(self.run)


SINKS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": Mlflow}


def find(names: Sequence[str], settings: dict[str, Any]) -> list[Factory]:
    """What makes the sinks of these names, words or dotted paths `package.module:Class`.

    Raises:
        UserError: there is no such sink, or its package is not installed.
    """
    factories = []
    for name in names:
        if name in EXTRAS and find_spec(name) is None:
            raise UserError(f"log.to: {name} is not installed: pip install 'longdream[{EXTRAS[name]}]'")
        try:
            kind = class_by_name("log.to", name, SINKS)
        except ValueError as error:
            raise UserError(str(error)) from None
        factories.append(partial(kind, settings=settings))
    return factories


def _identity(folder: Path, sink: str, make: Callable[[], str]) -> str:
    """The name that a sink knows the run in `folder` by, made when it is first asked for."""
    path = folder / IDS
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(read_text(path)))
    if sink not in known:
        known[sink] = make()
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known[sink]


def _silence_writers() -> None:
    """An OSError in the thread that writes TensorBoard's files is raised at the next call, too: print no traceback."""
    hook = threading.excepthook
    if getattr(hook, "of_writers", False):
        return

    def quiet(problem: Any) -> None:
        if type(problem.thread).__name__ != "_AsyncWriterThread" or not isinstance(problem.exc_value, OSError):
            hook(problem)

    quiet.of_writers = True  # type: ignore[attr-defined]
    threading.excepthook = quiet
