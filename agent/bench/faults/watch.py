"""What a process does while it reads a foreign input, as Python's audit events say: unpickling, programs, writing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
CHANGES = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1, "os.utime": 1, "shutil.rmtree": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2,
}  # fmt: skip
"""Events that change files, and how many of their arguments are paths."""
DIR_FDS = {"os.remove": (1,), "os.rmdir": (1,), "os.mkdir": (2,), "os.rename": (2, 3)}
"""Where the folder is, as a number, that a relative path begins in."""


class Watch:
    """Notes what is not allowed while `on` is entered.

    Args:
        allowed: folders that may be written to.
        program: the only program that may be started.
    """

    def __init__(self, allowed: list[Path], program: str) -> None:
        self.allowed = [os.path.realpath(folder) for folder in allowed]
        self.program = program
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self) -> Iterator[list[str]]:
        """Within, what is not allowed is appended to the list."""
        self.seen = []
        self.active = True
        try:
            yield self.seen
        finally:
            self.active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.active = False  # resolving a path is no event of what is watched
        try:
            self._note(event, arguments)
        finally:
            self.active = True

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            self.seen.append(f"unpickled {arguments[0]}.{arguments[1]}")
        elif event in PROGRAMS:
            if str(arguments[0]) != self.program:
                self.seen.append(f"started {arguments[0]!s:.80}")
        elif event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & WRITES)
            if writes and not isinstance(path, int):
                self._check("wrote", os.path.realpath(os.fsdecode(path)))
        elif event in CHANGES:
            for i in range(CHANGES[event]):
                if not isinstance(arguments[i], int):
                    self._check(event, self._place(event, arguments, i))

    def _place(self, event: str, arguments: tuple[Any, ...], i: int) -> str:
        """The path that an event changes; a link is changed itself."""
        path = os.fsdecode(arguments[i])
        numbers = [arguments[at] for at in DIR_FDS.get(event, ()) if at < len(arguments)]
        if not os.path.isabs(path) and i < len(numbers) and isinstance(numbers[i], int) and numbers[i] >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{numbers[i]}"), path)
        folder, name = os.path.split(os.path.abspath(path))
        return os.path.join(os.path.realpath(folder), name)

    def _check(self, what: str, path: str) -> None:
        if path == os.devnull or "/longdream-" in path:  # (the folder of a remote environment's socket)
            return
        if not any(path == folder or path.startswith(folder + os.sep) for folder in self.allowed):
            self.seen.append(f"{what} {path[:120]}")
