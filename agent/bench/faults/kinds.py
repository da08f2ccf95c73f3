"""What comes from outside, by its kind: how it is tampered with, and the code of this project that then reads it.

Each function takes a `Box` and a generator, writes the input into the working directory, and returns what is to be done
with it. That may end well, or in an exception that the command line explains in one line; anything else is a failure.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import socket
import struct
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longdream.agent.bench.faults import mutations
from longdream.agent.cli import main as cli
from longdream.agent.config import checks, options
from longdream.agent.data import npz_episodes
from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run_folder
from longdream.agent.run.logger import Logger
from longdream.envs.remote import RemoteEnv

Use = Callable[[], Any]
FOLDER = Path("input")
"""Where an input lies, below the working directory."""
PEER = """#!{python} -SE
# plays the other side of a remote environment: sends one answer for each request, and ends
import socket, struct, sys
answers = open({answers!r}, "rb").read()
sizes = [int(size) for size in open({sizes!r}).read().split()]
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[-1] + "/socket")
for size in sizes:
    head = peer.recv(4, socket.MSG_WAITALL)
    if len(head) == 4:
        peer.recv(struct.unpack("<I", head)[0], socket.MSG_WAITALL)
    peer.sendall(answers[:size])
    answers = answers[size:]
"""
BOX = {"array": ["<f4", [2], 0]}
ANSWERS: tuple[Any, ...] = (
    [
        "ok",
        [["Box", {"dict": {"low": BOX, "high": BOX, "dtype": "<f4"}}], ["Discrete", {"dict": {"n": 3, "start": 0}}]],
    ],
    ["ok", [BOX, {"dict": {"a": 1}}]],
    ["ok", [BOX, 0.5, False, False, {"dict": {}}]],
    ["ok", [BOX, 1.0, True, False, {"dict": {}}]],
    ["ok", None],
)
"""To make, reset, step, step and close."""


class Failure(Exception):
    """A command ended otherwise than in one line."""


class Refused(Exception):
    """A command ended in one line, as it should."""


@dataclass
class Box:
    """Good examples of every kind, in `base`, which inputs are made from."""

    base: Path

    def bytes(self, name: str) -> bytes:
        return (self.base / name).read_bytes()

    def run(self) -> Path:
        """A copy of a run that can go on, as the input."""
        return Path(shutil.copytree(self.base / "run", FOLDER, symlinks=True))


def command(*words: str) -> None:
    """Run a command in this process.

    Raises:
        Refused: it ended in one line. Failure: in something else.
    """
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        code = cli.main(list(words))
    if "Traceback" in err.getvalue() or code not in (0, 1, 2):
        raise Failure(f"exit code {code}: {err.getvalue()[-1500:]}")
    if code:
        raise Refused(err.getvalue()[-300:])


def _pieces(words: Any) -> list[str]:
    """Values as words of a command line, which has no NUL and no half of a pair of surrogates."""
    return [str(word).replace("\x00", "").replace("\ud800", "\udcff") for word in words]


# -- configurations ----------------------------------------------------------------------------------------------------


def config(box: Box, rng: random.Random) -> Use:
    text = box.bytes("run/config.yaml")
    if rng.random() < 0.5:
        tree = mutations.tree_of(rng, yaml.safe_load(text))
        text = json.dumps(tree, indent=rng.choice((None, 1, "\t")), default=str).encode()
        if rng.random() < 0.5:
            with suppress(yaml.YAMLError, UnicodeError):
                text = yaml.safe_dump(tree, allow_unicode=True).encode()
    else:
        text = mutations.bytes_of(rng, text)
    FOLDER.mkdir()
    path = FOLDER / "config.yaml"
    path.write_bytes(text)
    as_run = rng.random() < 0.5

    def use() -> None:
        if as_run:
            run_folder.open_run(FOLDER)
        else:
            checks.check(options.load(str(path)))

    return use


def flags(box: Box, rng: random.Random) -> Use:
    FOLDER.mkdir()
    words = []
    for _ in range(rng.choice((1, 2, 3))):
        name = rng.choice([*options.fields(), *options.SHORT, "name", "resume", "env.kwargs.corridor"])
        if rng.random() < 0.1:
            name = mutations.bytes_of(rng, name.encode()).decode("utf-8", "replace")
        value = rng.choice(mutations.INTERESTING)
        text = json.dumps(value) if rng.random() < 0.3 else str(value)
        words += [f"--{name}={text}"] if rng.random() < 0.5 else [f"--{name}", text]
    last = ["--learn.steps", "1"]  # which is too few: nothing is trained
    return lambda: command("train", "tiny", *_pieces(words), *last)


# -- recordings --------------------------------------------------------------------------------------------------------


def npz(box: Box, rng: random.Random) -> Use:
    name = rng.choice(("maze.npz", "teco.npz"))
    data = box.bytes(name)
    _recording(name, mutations.bytes_of(rng, data) if rng.random() < 0.4 else _one_entry(rng, data))
    if rng.random() < 0.2:
        return lambda: npz_episodes.read(FOLDER / name)
    return _learned_from(rng.choice(("actions", "pose")) if name == "maze.npz" else "actions")


def _one_entry(rng: random.Random, data: bytes) -> bytes:
    """The archive with one entry tampered with, whose checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(list(entries))
    head = entries[chosen][:128] if rng.random() < 0.7 else entries[chosen]
    entries[chosen] = mutations.bytes_of(rng, head) + entries[chosen][len(head) :]
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return blob.getvalue()


def npy(box: Box, rng: random.Random) -> Use:
    _recording("film.mp4", box.bytes("film.mp4"))
    data = box.bytes("film.npy")
    head = data[:128] if rng.random() < 0.7 else data
    _recording("film.npy", mutations.bytes_of(rng, head) + data[len(head) :])
    return _learned_from()


def mp4(box: Box, rng: random.Random) -> Use:
    name = rng.choice(("film.mp4", "film.mkv"))
    _recording(name, mutations.bytes_of(rng, box.bytes(name)))
    return _learned_from()


def jsonl(box: Box, rng: random.Random) -> Use:
    _recording("film.mp4", box.bytes("film.mp4"))
    text = box.bytes("film.jsonl")
    if rng.random() < 0.5:
        lines = [json.loads(line) for line in text.splitlines()]
        at = rng.randrange(len(lines))
        lines[at] = mutations.tree_of(rng, lines[at])
        _recording("film.jsonl", "\n".join(map(json.dumps, lines)).encode())
    else:
        _recording("film.jsonl", mutations.bytes_of(rng, text))
    return _learned_from()


def _recording(name: str, data: bytes) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_bytes(data)


def _learned_from(condition: Any = "actions") -> Use:
    def use() -> None:
        library = open_library(FOLDER, condition=condition)
        for recording in library.recordings:
            clip = min(4, recording.length)
            for start in (0, recording.length - clip):
                read_clip(library, recording, start, clip, 16)

    return use


# -- runs --------------------------------------------------------------------------------------------------------------


def metrics(box: Box, rng: random.Random) -> Use:
    FOLDER.mkdir()
    (FOLDER / "metrics.jsonl").write_bytes(mutations.bytes_of(rng, box.bytes("run/metrics.jsonl")))
    state = json.loads(box.bytes("logger.json"))

    def use() -> None:
        with Logger(FOLDER, console=False, sinks=()) as logger:
            logger.restore(state)
            logger.write(1000, {"x": 1.0})
        json.loads((FOLDER / "metrics.jsonl").read_bytes().splitlines()[-1])

    return use


def saved(box: Box, rng: random.Random) -> Use:
    """A checkpoint: its bytes; or its tree, signed again, as anybody can."""
    folder = checkpoint.latest(box.run() / "checkpoints")
    assert folder is not None
    name = rng.choice((*checkpoint.FILES, "state.json", "manifest.json"))
    path = folder / name
    if name == "state.json" and rng.random() < 0.8:
        path.write_text(json.dumps(mutations.tree_of(rng, json.loads(path.read_bytes()))))
    else:
        path.write_bytes(mutations.bytes_of(rng, path.read_bytes()))
    if name != "manifest.json" and rng.random() < 0.8:
        _sign(folder)
    if rng.random() < 0.5:
        return lambda: run_folder.load_agent(FOLDER)
    return lambda: command("train", "--resume", str(FOLDER), "--steps", "92")


def _sign(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in checkpoint.FILES:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = checkpoint.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run(box: Box, rng: random.Random) -> Use:
    """A folder: something in it is missing, damaged, or something else than a file or folder of the run."""
    folder = box.run()
    for _ in range(rng.choice((1, 1, 2))):
        paths = sorted(path for path in folder.rglob("*") if path.name != "config.yaml")
        if paths:
            _tamper(rng, rng.choice(paths))
    if rng.random() < 0.4:
        return lambda: command("evaluate", str(FOLDER), "--episodes", "1")
    return lambda: command("train", "--resume", str(FOLDER), "--steps", "92")


WAYS = ("lost", "fifo", "link", "loop", "hard link", "socket", "folder", "file", "bytes", "bytes", "renamed")


def _tamper(rng: random.Random, path: Path) -> None:
    how = rng.choice(WAYS)
    if how == "bytes" and path.is_file():
        path.write_bytes(mutations.bytes_of(rng, path.read_bytes()))
        return
    if how == "renamed":
        name = str(rng.choice(mutations.INTERESTING)).replace("/", "")[:99]
        path.rename(path.with_name(name.strip("\x00\ud800.") or "x"))
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    outside = Path("..", "outside")
    if how == "fifo":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to(outside.absolute() / rng.choice(("", "notes.txt", "nowhere")))
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "hard link":
        os.link(outside / "notes.txt", path)
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):
            listener.bind(str(path))
    elif how == "folder":
        path.mkdir()
    elif how == "file":
        path.write_bytes(rng.randbytes(rng.choice((0, 1, 1000))))


# -- the other side of a remote environment ----------------------------------------------------------------------------


def peer(box: Box, rng: random.Random) -> Use:
    chosen = rng.randrange(len(ANSWERS))
    messages = []
    for i, answer in enumerate(ANSWERS):
        tree = mutations.tree_of(rng, answer) if i == chosen and rng.random() < 0.6 else answer
        text = json.dumps(tree).encode()
        if i == chosen and tree is answer:
            text = mutations.bytes_of(rng, text)
        message = struct.pack("<I", len(text)) + text
        if i == chosen and rng.random() < 0.1:
            message = mutations.bytes_of(rng, message)
        messages.append(message)
    FOLDER.mkdir()
    answers = FOLDER / "answers"
    sizes = FOLDER / "sizes"
    program = Path("peer")
    answers.write_bytes(b"".join(messages))
    sizes.write_text(" ".join(str(len(message)) for message in messages))
    program.write_text(PEER.format(python=sys.executable, answers=str(answers.absolute()), sizes=str(sizes.absolute())))
    program.chmod(0o755)

    def use() -> None:
        env = RemoteEnv(str(program.absolute()), "Id", timeout_s=1.0, reset_timeout_s=5.0, restarts=0)
        try:
            env.reset(seed=0)
            env.step(1)
            env.step(2)
        finally:
            env.close()

    return use


KINDS: dict[str, tuple[Callable[[Box, random.Random], Use], int]] = {
    "config": (config, 5),
    "flags": (flags, 3),
    "npz": (npz, 2),
    "npy": (npy, 2),
    "mp4": (mp4, 2),
    "jsonl": (jsonl, 2),
    "metrics": (metrics, 1),
    "checkpoint": (saved, 1),
    "run": (run, 1),
    "socket": (peer, 1),
}
"""By name: the function, and how many of twenty inputs are of this kind."""
ORDER = [name for name, (_, share) in KINDS.items() for _ in range(share)]
