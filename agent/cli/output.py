"""What the command line says, and how it ends: consoles that may be gone, the JSON, errors in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

from longdream.envs.contract import EnvError, UserError
from longdream.envs.process import fill_gaps

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Errors of a stream whose reader has ended, or whose terminal was closed."""
NO_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP,
    errno.ENXIO, errno.EINVAL,
)  # fmt: skip
"""Errors of a path that the user can put right."""


class Lasting:
    """A text stream that is only silent once nobody reads it: a console that was closed is no reason to end a run.

    What cannot be encoded is written with backslashes.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.gone = False

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            coding = self.stream.encoding
            self.stream.write(text.encode(coding, "backslashreplace").decode(coding))
        except (OSError, ValueError) as error:
            self._silence(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._silence(error)

    def _silence(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in (*GONE, errno.ENOSPC):
            raise error
        self.gone = True
        with contextlib.suppress(OSError, ValueError):  # a ValueError is that of a closed stream
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Console:
    """Standard output and error of a command, and the place for its JSON, which ends standard output.

    Args:
        as_json: all but the JSON goes to stderr.
        program: this process is nothing but this command. What is printed below Python (by libraries, worker processes,
            at exit) then counts, too: file descriptor 1 is stderr from now on, and the JSON goes to a copy of stdout.
    """

    def __init__(self, as_json: bool, program: bool) -> None:
        self.as_json = as_json
        self.program = program
        self.copy: int | None = None

    def __enter__(self) -> Console:
        if self.program:
            self._fill_gaps()
        self.before = (sys.stdout, sys.stderr)
        self.stdout = Lasting(sys.stdout)
        self.stderr = Lasting(sys.stderr)
        if self.as_json and self.program:
            self.stdout.flush()
            self.copy = os.dup(1)
            os.dup2(2, 1)
        stdout: Any = self.stderr if self.as_json else self.stdout
        stderr: Any = self.stderr
        sys.stdout = stdout
        sys.stderr = stderr
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            stream.flush()
        if not self.program:
            sys.stdout, sys.stderr = self.before

    @staticmethod
    def _fill_gaps() -> None:
        """Open what was closed at the start."""
        fill_gaps()
        for name, number in (("stdout", 1), ("stderr", 2)):
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 (as long as the process)

    def end(self, text: str) -> None:
        """Print the JSON, as the last line of standard output."""
        self.stdout.flush()
        self.stderr.flush()
        if self.copy is None:
            self.stdout.write(text + "\n")
            self.stdout.flush()
            return
        with contextlib.suppress(OSError), open(self.copy, "w") as file:
            self.copy = None
            file.write(text + "\n")


def print_warning(message: Warning | str, *_: object) -> None:
    """A warning in one line, for warnings.showwarning."""
    print(f"warning: {_printable(message)}", file=sys.stderr)


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of an error whose cause lies outside this program; None for one of ours."""
    notes = [*getattr(error, "__notes__", ())]
    if isinstance(error, UserError):
        return 2, "\n".join([_printable(error), *notes])
    if isinstance(error, EnvError):
        return 1, "\n".join([str(error), *notes])
    from longdream.agent.core.actor import NotFinite
    from longdream.agent.core.ranks import RankFailed
    from longdream.agent.run.checkpoint import NO_ROOM, DiskFull
    from longdream.agent.run.signals import Interrupted

    if isinstance(error, NotFinite | DiskFull | RankFailed):
        return 1, "; ".join([str(error), *notes])
    if isinstance(error, Interrupted):
        return 128 + error.number, "; ".join([str(error), *notes])
    if isinstance(error, OSError) and error.filename is not None:
        place = _printable(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename)
        if error.errno in NO_ROOM:
            return 1, "; ".join([f"disk full: {place} cannot be written ({error.strerror}): free some space", *notes])
        if error.errno in NO_PLACE:
            fix = "choose another place or name, or fix its permissions"
            code = 1 if notes else 2  # a note says how to go on with a run that has begun
            return code, "; ".join([f"{place} cannot be used ({error.strerror}): {fix}", *notes])
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return 1, "; ".join([f"not enough memory: {_printable(error)[:300]}", *notes])
    return None


def _printable(text: object) -> str:
    """In one line, without the control characters that a file of a stranger might put into it."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
