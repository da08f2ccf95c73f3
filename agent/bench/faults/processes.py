"""longdream in processes of their own, each with a bound on its time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import longdream

BOUND_S = 180.0
"""Seconds that a command may take before it counts as hanging: some of them wait for a time limit of their own."""


class Ended(NamedTuple):
    """How a command ended. code: None if it had to be ended."""

    code: int | None
    out: str
    err: str

    @property
    def message(self) -> str:
        """Its last line on stderr that is a message of longdream."""
        lines = [line for line in self.err.splitlines() if line.startswith("longdream: ")]
        return lines[-1] if lines else ""


def environment(**more: str) -> dict[str, str]:
    """Variables of such a process: longdream is that of this process, on one thread, with a list of trust of its own
    in the working directory."""
    root = str(Path(longdream.__file__).resolve().parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": "config"} | more


def begin(words: Sequence[str], cwd: Path, **kwargs: Any) -> subprocess.Popen[str]:
    """Start `longdream WORDS`, in a session of its own."""
    command = [sys.executable, "-m", "longdream", *map(str, words)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    return subprocess.Popen(command, cwd=cwd, text=True, errors="replace", start_new_session=True, **(pipes | kwargs))


def end(process: subprocess.Popen[str], bound_s: float = BOUND_S) -> Ended:
    """Wait for a process, and end all that is left of its session."""
    try:
        out, err = process.communicate(timeout=bound_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        code = None
    kill(process)
    return Ended(code, out or "", err or "")


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a process and its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(words: Sequence[str], cwd: Path, bound_s: float = BOUND_S, **kwargs: Any) -> Ended:
    """Run `longdream WORDS` to its end."""
    return end(begin(words, cwd, **kwargs), bound_s)
