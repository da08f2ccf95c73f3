"""The folder of a run: creating it, locking it during training, opening it."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch

from longdream.agent.config import flags, options
from longdream.agent.config.schema import Config
from longdream.agent.run import checkpoint, export, files, trust
from longdream.agent.run.checkpoint import CheckpointError
from longdream.envs.contract import EnvError, EnvSpec, UserError

if TYPE_CHECKING:
    from longdream.agent.core.agent import Agent
    from longdream.agent.core.learner import Learner

T = TypeVar("T")
PACKAGES = ("longdream", "torch", "gymnasium", "numpy", "safetensors", "pydantic", "PyYAML", "tensorboard", "av")
PRETRAINED = Path(__file__).resolve().parents[2] / "runs" / "pretrained"
"""Folder of the exported agents that come with the program."""
SAVED = ".saved"
"""File of a run that has saved a checkpoint: where they are lost, it is not begun anew."""
LONGEST_NAME = 255
"""Bytes of the name of a folder, on common file systems."""
BEGUN = ".begun.json"
"""File of a run with its settings as this program wrote them into config.yaml. Each checkpoint has a copy, too."""


class InUse(UserError):
    """The folder of a new run exists already."""


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    folder: Path
    config: Config

    @cached_property
    def saved(self) -> tuple[dict[str, Any], int]:
        """Content and step of the newest intact checkpoint, with a warning where config.yaml is not that of it; of an
        exported agent, its weights alone.

        Raises CheckpointError."""
        if self.exported:
            return export.load(self.folder / export.WEIGHTS)
        tree, step = checkpoint.load(self.folder / "checkpoints", check_tree)
        warn_of_changes(self.folder, self.config, tree)
        return tree, step

    @property
    def exported(self) -> bool:
        """Whether this is an exported agent, which can act, dream and be trained further by --init."""
        return (self.folder / export.WEIGHTS).exists()

    @property
    def spec(self) -> EnvSpec:
        """The agent's observations and actions."""
        return EnvSpec.from_json(self.saved[0]["spec"])


def unused(name: str | None, label: str, seed: int, root: Path | str = "runs") -> Path:
    """The folder of a new run: `root`/`name`, or `root`/LABEL-sSEED-1 (or -2, ...) without a name. Creates nothing.

    Raises:
        InUse: the folder exists. UserError: the name is not valid.
    """
    root = Path(root)
    if name is not None and (not name or name.startswith((".", "-")) or re.search(r"[/\x00-\x1f\x7f]", name)):
        raise UserError(f"--name {flags.shown(repr(name))} is no name for a folder: use letters, digits, - and _")
    try:
        if name is None:
            k = 1
            while os.path.lexists(root / f"{label}-s{seed}-{k}"):
                k += 1
            folder = root / f"{label}-s{seed}-{k}"
        else:
            folder = root / name
        if len(os.fsencode(folder.name)) > LONGEST_NAME:  # (which is only seen where `root` exists)
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.lstat(folder)
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise _no_place(root / flags.shown(name or label), error) from None
    raise _in_use(folder)


def claim(choose: Callable[[], Path], start: Callable[[Path], T], fixed: bool) -> T:
    """What `start` returns for the folder of a new run, which it creates.

    Creating the folder is the claim to it. Where another process was quicker, `choose` is asked for the next one.

    Args:
        fixed: the user has named the folder, and takes no other.

    Raises:
        UserError: that folder exists, or as `choose` and `start` say.
    """
    while True:
        try:
            return start(choose())
        except InUse:
            if fixed:
                raise


def create(folder: Path, config: Config) -> Path:
    """Create the folder of a new run with config.yaml, which can be run again as it is, and environment.txt.

    Raises:
        InUse: the folder exists. UserError: it cannot be created.
    """
    make(folder)
    write(folder / "environment.txt", _environment())
    write_config(folder, config)
    return folder


def make(folder: Path) -> Path:
    """Create the empty folder of a new run; it is returned.

    Raises:
        InUse: the folder exists. UserError: it cannot be created.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        if not folder.parent.is_dir():
            raise _no_place(folder, error) from None
        raise _in_use(folder) from None
    except OSError as error:
        raise _no_place(folder, error) from None
    return folder


def write_config(folder: Path, config: Config) -> None:
    """Write config.yaml, which can be run again as it is. The run counts as trusted: it is being trained here."""
    write(folder / BEGUN, json.dumps(settings_of(config)) + "\n")
    write(folder / "config.yaml", "# longdream train config.yaml runs this again.\n" + options.dump(config))
    trust.remember(folder, config)


def _no_place(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot make {folder} ({error.strerror}): choose another place or name, or fix its permissions")


def _in_use(folder: Path) -> InUse:
    hint = f"--resume {folder} goes on with it" if (folder / "config.yaml").exists() else "it holds no run"
    return InUse(f"{folder} is in use: {hint}; --name other starts a new one")


def write(path: Path, text: str) -> None:
    """Write a small file atomically.

    Raises:
        DiskFull: the disk is full; the previous file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a run that was killed; or a link, which must not be written through
        with open(temporary, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno in checkpoint.NO_ROOM:
            raise checkpoint.DiskFull(path.parent, len(text), error) from error
        raise


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


def pretrained() -> list[str]:
    """Names of the agents that come with the program."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/config.yaml"))


def open_run(folder: Path | str) -> Run:
    """The run in `folder`, or the agent of that name that comes with the program.

    Raises:
        UserError: there is no run, its config.yaml cannot be used, or it names code that the user has not consented to.
    """
    folder = Path(folder)
    if str(folder) in pretrained() and not folder.exists():
        folder = PRETRAINED / folder
    try:
        is_run = (folder / "config.yaml").is_file()
        is_folder = folder.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"{flags.shown(folder)} cannot be opened ({error.strerror})") from None
    if not is_run:
        if not is_folder:
            root = folder.parent if folder.parent.name else Path("runs")
            runs = [*(str(path.parent) for path in root.glob("*/config.yaml")), *pretrained()]
            raise UserError(f"{folder}: there is no such run" + flags.suggest(str(folder), runs))
        raise UserError(f"{folder} is no run: it holds no config.yaml; give a folder such as runs/quickstart-s1-1")
    config = options.load(str(folder / "config.yaml"))
    trust.require(folder, config)
    return Run(folder, config)


class Opened(NamedTuple):
    """The agent of a run as last saved, and the run. `agent.config` has the device that it was opened on."""

    agent: Agent
    run: Run


def load_agent(folder: Path | str, device: Literal["auto", "cpu", "cuda"] | None = None) -> Opened:
    """Open a run with its agent; device: where it computes (None: as in the run).

    Raises:
        UserError: there is no such run, or it was trained on video and has no agent.
        CheckpointError: it has no checkpoint, or none that can be used.
    """
    from longdream.agent.core.agent import Agent  # imported here: it takes as long as torch, and mistakes need none

    run = open_run(folder)
    if run.config.kind == "video":
        raise UserError(
            f"{folder} was trained on video: there is nobody in it who acts; see its videos/ and summary.json"
        )
    tree, _ = run.saved
    config = dataclasses.replace(run.config, device=device or run.config.device)
    with fitting(run.folder, tree):
        agent = Agent(config, run.spec)
    fill(agent, tree, run.folder, weights_only=True)
    return Opened(agent, run)


def fill(agent: Learner, tree: dict[str, Any], folder: Path, weights_only: bool = False) -> None:
    """Load the checkpoint `tree` of the run in `folder` into the agent, or into a learner of V and M alone.

    Raises:
        CheckpointError: the checkpoint does not fit this configuration.
    """
    try:
        agent.load_state_dict(tree, weights_only)
    except Exception as error:  # whatever it is that the tensors of another agent, or senseless ones, lead to
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
    except Exception as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"V and M in {folder} are not those of its config.yaml ({problem[:300]})") from None


@contextmanager
def fitting(folder: Path, saved: dict[str, Any] | None) -> Iterator[None]:
    """Around what is made of a checkpoint and of the configuration beside it; of nothing, if there is none.

    Raises:
        CheckpointError: in place of an error that values led to that no run of this program has.
    """
    try:
        yield
    except (UserError, EnvError, checkpoint.DiskFull, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if saved is None:
            raise
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"the newest checkpoint in {folder}, or its config.yaml, cannot be used ({flags.shown(problem)}): put back "
            f"what was there, or delete that checkpoint to go on from the one before"
        ) from error


def save(folder: Path, progress: int, state: dict[str, Any], config: Config) -> None:
    """Write a checkpoint of the run, with a copy of its configuration, and note that there is one.

    Raises:
        DiskFull: the disk has no room for it.
    """
    checkpoint.save(folder / "checkpoints", progress, state | {"config": settings_of(config)})
    if not (folder / SAVED).exists():
        write(folder / SAVED, "This run has saved checkpoints: without them, it is not begun anew.\n")


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of the run; None if it has not saved any yet, and can begin anew.

    Raises:
        CheckpointError: none of its checkpoints can be used, or they are lost: a run that began anew would discard its
            record.
    """
    root = folder / "checkpoints"
    if (folder / export.WEIGHTS).exists():
        raise UserError(f"{folder} is an exported agent, without optimizers: longdream train --init {folder}")
    if checkpoint.latest(root):
        tree, _ = checkpoint.load(root, check_tree_to_resume)
        warn_of_changes(folder, options.load(str(folder / "config.yaml")), tree)
        return tree
    if (folder / SAVED).exists() or (folder / "summary.json").exists():
        raise CheckpointError(
            f"{root} holds no checkpoint, and this run has saved some: put them back, or begin another run with "
            f"longdream train {folder}/config.yaml; begun anew, this one would lose {_record(folder)}"
        )
    if saved := _read_json(folder / BEGUN):
        _warn_of_changes(folder, options.load(str(folder / "config.yaml")), saved, "the run began")
    return None


def _record(folder: Path) -> str:
    """What a run has recorded, in words."""
    metrics = folder / "metrics.jsonl"
    parts = []
    if metrics.is_file():
        with files.opened(metrics) as (file, size):
            parts.append(f"metrics.jsonl ({sum(1 for _ in file):,} lines, {size:,} bytes)")
    if (folder / "replay").is_dir():
        parts.append(f"replay/ ({len([*(folder / 'replay').iterdir()]):,} files)")
    parts += ["summary.json"] if (folder / "summary.json").exists() else []
    return ", ".join(parts) or "its place"


def check_tree(tree: dict[str, Any]) -> None:
    """Check that a checkpoint is one of a run: an agent or a model can be made of it.

    Raises:
        ValueError: it is not.
    """
    _check_kinds(tree, {"spec": dict, "weights": dict})
    EnvSpec.from_json(tree["spec"])


def check_tree_to_resume(tree: dict[str, Any]) -> None:
    """As `check_tree`, and that training can go on from it."""
    check_tree(tree)
    _check_kinds(tree, {"progress": int, "logger": dict, "averages": dict, "count": dict, "random": dict})
    _check_kinds(tree["logger"], {"bytes": int, "step": int, "nonfinite": int, "shown": dict})
    _check_kinds(tree["averages"], {"sums": dict, "numbers": dict})
    _check_kinds(tree["random"], {"torch": torch.Tensor})
    for key, value in tree["count"].items():
        if not (value is None or isinstance(value, int | float)):
            raise ValueError(f"count.{key} is no number")
    if min(tree["progress"], tree["logger"]["bytes"]) < 0:
        raise ValueError("it is of a negative step")


def _check_kinds(tree: dict[str, Any], kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if key not in tree:
            raise ValueError(f"it has no {key!r}")
        if type(tree[key]) is not kind:
            raise ValueError(f"{key!r} is a {type(tree[key]).__name__}")


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON keeps it."""
    values = {name: options.field_value(config, name) for name in options.fields()}
    return json.loads(json.dumps(values, default=str))


def warn_of_changes(folder: Path, config: Config, tree: dict[str, Any]) -> None:
    """Warn where config.yaml is not what the run was saved with: it was edited, or it is damaged."""
    saved = tree.get("config")
    if isinstance(saved, dict):  # (an older version kept no copy)
        _warn_of_changes(folder, config, saved, "the checkpoint")


def _warn_of_changes(folder: Path, config: Config, saved: dict[str, Any], since: str) -> None:
    given = settings_of(config)
    changes = [f"{key} = {given[key]}, was {saved[key]}" for key in given if key in saved and given[key] != saved[key]]
    if changes:
        warnings.warn(
            f"{folder / 'config.yaml'} has changed since {since}: {flags.shown('; '.join(changes), 400)}",
            RuntimeWarning,
            stacklevel=3,
        )


def summary(folder: Path) -> dict[str, Any] | None:
    """The content of the run's summary.json, with NaN for null; None if there is no such file, or not one of ours."""
    values = _read_json(folder / "summary.json")
    return values and {key: math.nan if value is None else value for key, value in values.items()}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a small JSON file; None if there is no such file, or something else in it."""
    try:
        values = json.loads(files.read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the run for this process. The operating system releases the lock when the process ends.

    Raises:
        UserError: another process holds the lock, the folder cannot be written to, or something in it is not its own
            file or folder, and would be written through.
    """
    with ExitStack() as stack:
        try:
            files.check_own(folder)
            how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = stack.enter_context(open(os.open(folder / ".lock", how, 0o644), "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being trained by another process: wait for it or end it first") from None
        except OSError as error:
            raise UserError(f"{folder} cannot be written to ({error.strerror}): fix its permissions") from None
        yield
