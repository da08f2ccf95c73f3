"""Atomic checkpoints. Loading one executes no code from it.

A checkpoint is a folder `step_000000012345` that contains

    weights.safetensors   the tensors under the top-level key "weights"
    state.safetensors     every other tensor and array (optimizer moments, recurrent states, random state ...)
    state.json            the tree itself: structure, numbers, strings, and the names of the tensors above
    manifest.json         format version, step, SHA-256 and size of each file

It is written under a temporary name, synced to disk and then renamed. The newest folder with such a name is therefore
always a complete checkpoint. Older ones are deleted only after the rename.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from longdream.agent.config.flags import shown
from longdream.agent.run import files
from longdream.envs.contract import UserError

FORMAT = 1
FILES = ("weights.safetensors", "state.safetensors", "state.json")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file size limit
MANIFEST_BYTES = 1 << 20  # size of a manifest, at most
TAG = "$"  # marks a JSON object that encodes a value that JSON lacks


class CheckpointError(UserError):
    """A checkpoint cannot be used. The message names the file, what is wrong with it and what to do."""


class NewerFormat(CheckpointError):
    """A checkpoint of a later version of this program. It is intact, so no older one is loaded in its place."""


class DiskFull(RuntimeError):
    """The disk is full. Everything that was saved before is intact."""

    def __init__(self, folder: Path, needed: int, cause: OSError):
        super().__init__(
            f"disk full: {needed:,} bytes are needed in {folder} ({cause.strerror}); "
            f"free some space there and resume: what was saved before is intact"
        )
        self.folder = Path(folder)
        self.needed = needed


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save(root: Path, step: int, tree: dict, keep: int = 2) -> Path:
    """Write `tree` as the checkpoint of `step` below `root` and return its folder.

    `load` returns the tree exactly, with tensors on the CPU and dict subclasses as dict. A tensor that occurs several
    times is stored once and loaded as one tensor. Afterwards the `keep` newest checkpoints up to this step remain.
    Later ones are deleted: the run has gone back to an earlier step.

    Args:
        tree: nested dict / list / tuple of tensors, NumPy arrays and scalars, int, float, bool, str and None.

    Raises:
        TypeError: the tree contains anything else; the message names the place.
        DiskFull: the disk has no room for it.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):  # of a run that was killed while saving
        _delete(leftover)

    packer = _Packer()
    structure = packer.encode(tree, ())
    blobs = {
        "weights.safetensors": safetensors.torch.save(packer.tensors["weights"]),
        "state.safetensors": safetensors.torch.save(packer.tensors["state"]),
        "state.json": json.dumps(structure, allow_nan=False, separators=(",", ":")).encode(),
    }
    manifest = {
        "format": FORMAT,
        "step": int(step),
        "files": {name: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for name, b in blobs.items()},
    }
    manifest["sha256"] = digest(manifest)
    blobs["manifest.json"] = json.dumps(manifest, indent=1).encode()

    older = [path for path in _all(root) if _order(path)[0] <= step]
    temporary = root / f".tmp-{step}-{os.getpid()}"
    try:
        temporary.mkdir()
        for name, blob in blobs.items():
            with open(temporary / name, "wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(temporary)
        # The same step may be saved twice (periodically, then at the end). A folder cannot be replaced atomically, so
        # the second gets another name, which sorts after the first.
        repeats = [_order(path)[1] for path in older if _order(path)[0] == step]
        final = root / (f"step_{step:012d}" + (f".{max(repeats) + 1}" if repeats else ""))
        temporary.rename(final)
        _sync_folder(root)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(root, sum(map(len, blobs.values())), error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    survivors = sorted([*older, final], key=_order)[-max(keep, 1) :]
    for path in _all(root):
        if path not in survivors:
            _remove(path)
    return final


def _remove(path: Path) -> None:
    # Renamed first: a process killed during the deletion must not leave an incomplete checkpoint under a proper name.
    doomed = path.with_name(f".tmp-old-{path.name}")
    path.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a folder and what is in it, or anything else that has its name; what a link leads to stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Packer:
    """Converts a tree to JSON values and collects its tensors under readable names."""

    def __init__(self) -> None:
        self.tensors: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "state": {}}
        self.seen: dict[tuple, dict] = {}
        self.alive: list[torch.Tensor] = []  # keeps the addresses in `seen` from being reused by other tensors

    def encode(self, value: Any, path: tuple) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            if math.isfinite(value):
                return value
            sign = "-" if math.copysign(1, value) < 0 else ""  # NaN has a sign, too
            return {TAG: "float", "v": sign + repr(abs(value))}
        if isinstance(value, dict):
            if all(type(key) is str for key in value) and TAG not in value:
                return {key: self.encode(item, (*path, key)) for key, item in value.items()}
            pairs = [[self.encode(key, path), self.encode(item, (*path, key))] for key, item in value.items()]
            return {TAG: "dict", "v": pairs}
        if type(value) in (list, tuple):
            items = [self.encode(item, (*path, i)) for i, item in enumerate(value)]
            return items if type(value) is list else {TAG: "tuple", "v": items}
        if isinstance(value, torch.Tensor):
            return self.store("tensor", value.detach(), path)
        if isinstance(value, np.ndarray | np.generic):
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            try:
                return self.store(kind, torch.from_numpy(np.array(value, order="C")), path)
            except TypeError:
                raise TypeError(f"a checkpoint cannot hold an array of {value.dtype}: {_name(path)}") from None
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {_name(path)}")

    def store(self, kind: str, tensor: torch.Tensor, path: tuple) -> dict:
        identity = (kind, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and identity in self.seen:
            return self.seen[identity]
        self.alive.append(tensor)
        part = "weights" if path[:1] == ("weights",) else "state"
        names = self.tensors[part]
        name = _name(path[1:] if part == "weights" else path)
        while name in names:  # {"a.b": ...} beside {"a": {"b": ...}}
            name += "'"
        names[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        entry = {TAG: kind, "in": part, "name": name}
        self.seen[identity] = entry
        return entry


def to_bytes(tree: dict) -> bytes:
    """A tree as `save` takes it, in one piece."""
    packer = _Packer()
    structure = json.dumps(packer.encode({"tree": tree}, ()), allow_nan=False).encode()
    text = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
    return safetensors.torch.save({**packer.tensors["state"], TAG: text})


def from_bytes(blob: torch.Tensor) -> dict:
    """The tree that `to_bytes` packed, from its bytes as a tensor.

    Raises:
        ValueError: it is something else.
    """
    try:
        tensors = safetensors.torch.load(blob.numpy().tobytes())
        return _decode(json.loads(tensors.pop(TAG).numpy().tobytes()), {"state": tensors})["tree"]
    except Exception as error:  # whatever it is that bytes without sense lead to
        raise ValueError(f"the part of a rank makes no sense ({shown(error)})") from None


def _name(path: tuple) -> str:
    return ".".join(map(str, path)) or "value"


def digest(manifest: dict) -> str:
    """The SHA-256 that a manifest has of itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def latest(root: Path) -> Path | None:
    """The newest checkpoint folder below `root`, not verified; None if there is none."""
    return max(_all(Path(root)), key=_order, default=None)


def load(path: Path, check: Callable[[dict], None] | None = None) -> tuple[dict, int]:
    """Read a checkpoint and return `(tree, step)`.

    Every file is verified by its SHA-256 before it is decoded. As anybody can write a matching SHA-256, what is decoded
    is not trusted either.

    Args:
        path: the folder of one checkpoint, or the folder of all. Then the newest intact one is read, with a warning
            for each damaged one that is skipped.
        check: raises ValueError where a tree cannot be that of a checkpoint, which counts as damaged then.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its format is newer than this program.
    """
    path = Path(path)
    if _order(path) != (-1, -1) or (path / "manifest.json").exists():
        return _read(path, check)
    first: CheckpointError | None = None
    for candidate in sorted(_all(path), key=_order, reverse=True):
        try:
            tree, step = _read(candidate, check)
        except NewerFormat:
            raise
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", RuntimeWarning, stacklevel=2)
            first = first or error
        else:
            return tree, step
    if first is not None:
        raise CheckpointError(f"no intact checkpoint in {path}; the newest one: {first}")
    raise CheckpointError(f"no checkpoint in {path}: give a run that has saved one, or start a new run")


def _all(root: Path) -> list[Path]:
    return [path for path in root.glob("step_*") if _order(path) != (-1, -1)]


def _order(path: Path) -> tuple[int, int]:
    """(step, repeat) of a checkpoint's name; (-1, -1) for any other name."""
    match = re.fullmatch(r"step_(\d{12,})(?:\.(\d+))?", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, -1)


def _read(folder: Path, check: Callable[[dict], None] | None = None) -> tuple[dict, int]:
    hint = "delete this folder to go on from an older checkpoint"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint")
    path = folder / "manifest.json"
    try:
        manifest = json.loads(files.read_text(path, MANIFEST_BYTES))
        version = manifest["format"]
        step = manifest["step"]
        sizes = {name: manifest["files"][name]["bytes"] for name in FILES}
        sums = {name: manifest["files"][name]["sha256"] for name in FILES}
        expected = digest(manifest)
    except OSError as error:
        raise CheckpointError(f"{_unreadable(path, error)}; {hint}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is damaged (not a manifest); {hint}") from None
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(
            f"{folder} has checkpoint format {version}, this program reads up to {FORMAT}: update the program"
        )
    if manifest.get("sha256") != expected:
        raise CheckpointError(f"{path} is damaged (checksum differs); {hint}")
    if type(step) is not int or _order(folder)[0] not in (-1, step):
        raise CheckpointError(f"{path} is damaged (it is of step {step!r:.40}, its folder of another); {hint}")

    blobs = {name: _verified(folder / name, sizes[name], sums[name], hint) for name in FILES}
    try:
        tensors = {part: safetensors.torch.load(blobs.pop(f"{part}.safetensors")) for part in ("weights", "state")}
        tree = _decode(json.loads(blobs["state.json"]), tensors)
        if type(tree) is not dict:
            raise ValueError(f"it holds a {type(tree).__name__}")
        if check is not None:
            check(tree)
    except Exception as error:  # whatever it is that intact files without sense lead to
        reason = shown(error)
        raise CheckpointError(f"{folder} is damaged (its files make no sense: {reason}); {hint}") from None
    return tree, step


def _verified(path: Path, size: Any, checksum: Any, hint: str) -> bytes:
    """The content of a file of that size and SHA-256. Not a byte is read of one that has another size."""
    try:
        with files.opened(path) as (file, actual):
            if actual != size:
                expected = f"{size:,}" if isinstance(size, int) else "senseless"
                raise CheckpointError(f"{path} is damaged ({actual:,} of {expected} bytes); {hint}")
            blob = file.read(actual)
    except OSError as error:
        raise CheckpointError(f"{_unreadable(path, error)}; {hint}") from None
    except MemoryError:
        raise CheckpointError(f"{path} is damaged, or too large for this machine ({size:,} bytes); {hint}") from None
    if hashlib.sha256(blob).hexdigest() != checksum:
        raise CheckpointError(f"{path} is damaged (checksum differs); {hint}")
    return blob


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{path} is damaged ({error.strerror})"


def _decode(value: Any, tensors: dict[str, dict[str, torch.Tensor]]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(TAG)
    if kind is None:
        return {key: _decode(item, tensors) for key, item in value.items()}
    if kind == "float":
        return float(value["v"])
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in value["v"])
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["v"]}
    tensor = tensors[value["in"]][value["name"]]
    if kind == "tensor":
        return tensor
    return tensor.numpy() if kind == "array" else tensor.numpy()[()]
