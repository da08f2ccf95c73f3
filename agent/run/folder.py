"""The folder of a run: creating it, locking it during training, opening it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from longdream.agent.config import flags, options
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.core.learner import Learner
from longdream.agent.run import checkpoint, trust
from longdream.agent.run.checkpoint import CheckpointError
from longdream.envs.contract import EnvSpec, UserError

PACKAGES = ("longdream", "torch", "gymnasium", "numpy", "safetensors", "pydantic", "PyYAML", "tensorboard", "av")


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    folder: Path
    config: Config

    @cached_property
    def saved(self) -> tuple[dict[str, Any], int]:
        """Content and step of the newest intact checkpoint. Raises CheckpointError."""
        return checkpoint.load(self.folder / "checkpoints")

    @property
    def spec(self) -> EnvSpec:
        """The agent's observations and actions."""
        return EnvSpec.from_json(self.saved[0]["spec"])


def unused(name: str | None, label: str, seed: int, root: Path | str = "runs") -> Path:
    """The folder of a new run: `root`/`name`, or `root`/LABEL-sSEED-1 (or -2, ...) without a name. Creates nothing.

    Raises:
        UserError: the folder exists, or the name is not valid.
    """
    root = Path(root)
    if name is None:
        k = 1
        while (root / f"{label}-s{seed}-{k}").exists():
            k += 1
        return root / f"{label}-s{seed}-{k}"
    if not name or name.startswith((".", "-")) or "/" in name:
        raise UserError(f"--name {name!r} is no name for a folder: use letters, digits, - and _")
    folder = root / name
    if folder.exists():
        raise _in_use(folder)
    return folder


def create(folder: Path, config: Config) -> Path:
    """Create the folder of a new run with config.yaml, which can be run again as it is, and environment.txt.

    Raises:
        UserError: the folder exists, or cannot be created.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError:
        raise _in_use(folder) from None
    except OSError as error:
        raise UserError(
            f"cannot make {folder} ({error.strerror}): choose another place or fix its permissions"
        ) from None
    write(folder / "environment.txt", _environment())
    write_config(folder, config)
    return folder


def write_config(folder: Path, config: Config) -> None:
    """Write config.yaml, which can be run again as it is. The run counts as trusted: it is being trained here."""
    write(folder / "config.yaml", "# longdream train config.yaml runs this again.\n" + options.dump(config))
    trust.remember(folder, config)


def _in_use(folder: Path) -> UserError:
    hint = f"--resume {folder} goes on with it" if (folder / "config.yaml").exists() else "it holds no run"
    return UserError(f"{folder} is in use: {hint}; --name other starts a new one")


def write(path: Path, text: str) -> None:
    """Write a small file atomically.

    Raises:
        DiskFull: the disk is full; the previous file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in checkpoint.NO_ROOM:
            raise checkpoint.DiskFull(path.parent, len(text), error) from error
        raise


def to_json(values: Any, indent: int | None = None) -> str:
    """Standard JSON: numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), indent=indent, allow_nan=False)


def _environment() -> str:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=here, capture_output=True, text=True
        )
        commit = result.stdout.strip() or "none"
    except OSError:
        commit = "none"
    lines = {
        "command": " ".join(sys.argv),
        "commit": commit,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **{package: version(package) for package in PACKAGES},
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def open_run(folder: Path | str) -> Run:
    """The run in `folder`.

    Raises:
        UserError: there is no run, its config.yaml cannot be used, or it names code that the user has not consented to.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        if not folder.is_dir():
            root = folder.parent if folder.parent.name else Path("runs")
            runs = [str(path.parent) for path in root.glob("*/config.yaml")]
            raise UserError(f"{folder}: there is no such run" + flags.suggest(str(folder), runs))
        raise UserError(f"{folder} is no run: it holds no config.yaml; give a folder such as runs/quickstart-s1-1")
    config = options.load(str(folder / "config.yaml"))
    trust.require(folder, config)
    return Run(folder, config)


def load_agent(
    folder: Path | str, device: Literal["auto", "cpu", "cuda"] | None = None
) -> tuple[Agent, Config, EnvSpec, int]:
    """The agent of a run as last saved, with its config, its spec, and the steps that it was trained for.

    Raises:
        UserError: there is no such run, or it was trained on video and has no agent.
        CheckpointError: it has no checkpoint, or none that can be used.
    """
    run = open_run(folder)
    if run.config.kind == "video":
        raise UserError(
            f"{folder} was trained on video: there is nobody in it who acts; see its videos/ and summary.json"
        )
    tree, step = run.saved
    config = dataclasses.replace(run.config, device=device or run.config.device)
    agent = Agent(config, run.spec)
    fill(agent, tree, run.folder, weights_only=True)
    return agent, config, run.spec, step


def fill(agent: Learner, tree: dict[str, Any], folder: Path, weights_only: bool = False) -> None:
    """Load the checkpoint `tree` of the run in `folder` into the agent, or into a learner of V and M alone.

    Raises:
        CheckpointError: the checkpoint does not fit this configuration.
    """
    try:
        agent.load_state_dict(tree, weights_only)
    except (RuntimeError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint in {folder} is not of the agent that its config.yaml describes: put that file back as it "
            f"was, or use the program's version in environment.txt ({problem[:300]})"
        ) from None


def fill_model(agent: Agent, tree: dict[str, Any], folder: Path) -> None:
    """Load V and M from the checkpoint `tree` of the run in `folder`. C stays as it is.

    Raises:
        CheckpointError: V and M of the checkpoint do not fit the agent's configuration.
    """
    try:
        agent.model.load_state_dict(tree["weights"]["model"])
    except (RuntimeError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"V and M in {folder} are not those of its config.yaml ({problem[:300]})") from None


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of the run; None if there is no checkpoint yet.

    Raises:
        CheckpointError: none of its checkpoints can be used.
    """
    root = folder / "checkpoints"
    return checkpoint.load(root)[0] if checkpoint.latest(root) else None


def summary(folder: Path) -> dict[str, Any] | None:
    """The content of the run's summary.json, with NaN for null; None if there is no such file."""
    try:
        values = json.loads((folder / "summary.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return {key: math.nan if value is None else value for key, value in values.items()}


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the run for this process. The operating system releases the lock when the process ends.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / ".lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being trained by another process: wait for it or end it first") from None
        except OSError as error:
            raise UserError(f"{folder} cannot be written to ({error.strerror}): fix its permissions") from None
        yield
