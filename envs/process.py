"""What environments in this process may not do to the rest of it: end it, move it to another folder, or change the
global settings of torch and numpy that it computes with."""

from __future__ import annotations

import dis
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_IMPORTED_IN = os.getpid()
RANDOM = "random numbers of torch"
OURS = ("handler", "inference", "stream")
"""Beginnings of the names of settings that environments do not get back: a signal always reaches us, as it saves the
run; inference mode cannot be left and entered again; and what we have to say is always said."""
EXITS = ("_exit", "abort")
"""Functions of os that end the process at once: no handler, and no `finally`, sees it."""


def stops_the_program(error: BaseException) -> bool:
    """Whether an exception that came out of an environment is the user's Ctrl-C, and no failure of the environment.

    Python calls the handler of a signal between two instructions, wherever it is. A KeyboardInterrupt whose innermost
    instruction is a `raise` was raised by the environment."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] != "RAISE_VARARGS"


def forked() -> bool:
    """Whether this process was forked from one that had imported this module, and may have used threads of torch."""
    return os.getpid() != _IMPORTED_IN


class _Environments:
    """The environments' own values of the settings of this process.

    Attributes:
        kept: their value of each setting that they have changed, beside ours at that time.
        inside: whether it is their turn.
    """

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, Any]] = {}
        self.inside = False

    def enter(self) -> dict[str, Any]:
        """Put their values in place. Returns ours."""
        settings = _settings()
        ours = {name: read() for name, (read, _) in settings.items()}
        for name, (theirs, before) in list(self.kept.items()):
            if name == RANDOM or _equal(ours[name], before):
                _write(settings[name][1], theirs)
            else:  # we have changed it since: our value holds for both
                del self.kept[name]
        return ours

    def leave(self, ours: dict[str, Any]) -> None:
        """Keep what they have changed, and put ours back."""
        for name, (read, write) in _settings().items():
            if name not in ours:
                ours[name] = _initial(name, read)
            theirs = read()
            if _equal(theirs, ours[name]):
                self.kept.pop(name, None)
                continue
            if not name.startswith(OURS):
                self.kept[name] = (theirs, ours[name])
            _write(write, ours[name])
        fill_gaps()


_ENVIRONMENTS = _Environments()
_GUARDS: list[Any] = []


@contextmanager
def environments_turn() -> Iterator[None]:
    """Around calls of environments in this process.

    They find the process as they left it: the working directory, the global settings of torch and numpy, torch's random
    numbers. Afterwards it is as it was before, so that neither relative paths nor what we compute has changed.
    Handlers of SIGINT and SIGTERM that they set are removed. `os._exit` and `os.abort`, which would end the program
    without a word, raise SystemExit."""
    if _ENVIRONMENTS.inside:  # an environment that wraps another
        yield
        return
    ours = _ENVIRONMENTS.enter()
    _ENVIRONMENTS.inside = True
    exits = {name: getattr(os, name) for name in EXITS}
    for name, real in exits.items():
        setattr(os, name, _raising(name, real))
    try:
        yield
    finally:
        for name, real in exits.items():
            setattr(os, name, real)
        _ENVIRONMENTS.inside = False
        _ENVIRONMENTS.leave(ours)


def _raising(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """os._exit or os.abort as environments in this process find it. A process that they have forked ends by it, and so
    does this one if they keep it for later."""
    ours = os.getpid()

    def exits(*status: Any) -> None:
        if os.getpid() != ours or not _ENVIRONMENTS.inside:
            real(*status)
        raise SystemExit(f"os.{name}({', '.join(map(repr, status))})")

    return exits


Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _settings() -> dict[str, Setting]:
    """By name how a setting is read and how it is written. Nothing is imported here."""
    settings: dict[str, Setting] = {
        "folder": (_folder, os.chdir),
        "limit of recursion": (sys.getrecursionlimit, sys.setrecursionlimit),
        "stream stdout": (lambda: sys.stdout, lambda value: setattr(sys, "stdout", value)),
        "stream stderr": (lambda: sys.stderr, lambda value: setattr(sys, "stderr", value)),
    }
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        settings["errors of numpy"] = (numpy.geterr, lambda value: numpy.seterr(**value))
    if threading.current_thread() is threading.main_thread():
        settings["handler of SIGINT"] = _handler(signal.SIGINT)
        settings["handler of SIGTERM"] = _handler(signal.SIGTERM)
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_default_device"):  # (it may be half imported)
        settings["dtype of torch"] = (torch.get_default_dtype, torch.set_default_dtype)
        settings["device of torch"] = (lambda: str(torch.get_default_device()), _default_device(torch))
        settings["gradients of torch"] = (torch.is_grad_enabled, torch.set_grad_enabled)
        settings["determinism of torch"] = (
            torch.are_deterministic_algorithms_enabled,
            torch.use_deterministic_algorithms,
        )
        settings["autocast of torch"] = (
            lambda: torch.is_autocast_enabled("cpu"),
            lambda value: torch.set_autocast_enabled("cpu", value),
        )
        settings["inference mode of torch"] = (torch.is_inference_mode_enabled, _set_inference_mode)
        settings["threads of torch"] = (torch.get_num_threads, torch.set_num_threads)
        settings[RANDOM] = (torch.get_rng_state, torch.set_rng_state)
    return settings


def _initial(name: str, read: Callable[[], Any]) -> Any:
    """Our value of a setting of a package that an environment imported before we did."""
    if name == "dtype of torch":
        return sys.modules["torch"].float32
    if name == "gradients of torch":
        return True
    if name in ("autocast of torch", "inference mode of torch", "determinism of torch"):
        return False
    return "cpu" if name == "device of torch" else read()


def _handler(number: signal.Signals) -> Setting:
    return lambda: signal.getsignal(number), lambda value: signal.signal(number, value)


def _default_device(torch: Any) -> Callable[[str], None]:
    # torch's own default is None: given "cpu", it would look at every call
    return lambda name: torch.set_default_device(None if name == "cpu" else name)


def _set_inference_mode(on: bool) -> None:
    import torch

    _GUARDS.append(torch._C._InferenceMode(on))  # it holds as long as this object


def fill_gaps() -> None:
    """Open the standard descriptors that were closed: a file of a run would get their numbers, and what is printed."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _write(write: Callable[[Any], Any], value: Any) -> None:
    if value is None:  # a handler that is not Python's, or a folder that was deleted
        return
    with suppress(OSError):  # a folder that was deleted
        write(value)


def _equal(a: Any, b: Any) -> bool:
    return bool(a.equal(b)) if hasattr(a, "equal") and hasattr(b, "equal") else a == b
