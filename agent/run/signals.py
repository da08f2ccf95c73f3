"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed): the run is saved before the program ends, and with it
end the processes that it has started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP was received."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """A context in which SIGINT, SIGTERM and SIGHUP take effect at the next `check`.

    A second signal has its usual effect, but for SIGHUP, of which a terminal that is closed may send several. SIGHUP
    stays ignored where it was, as under nohup. Signals are handled in the main thread. In another thread the context
    does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [n for n in NUMBERS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._came) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _came(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            if number == signal.SIGHUP:
                return
            self.__exit__()
            signal.raise_signal(number)
        self.number = number

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Processes started in this context ignore SIGINT, which a terminal sends to all processes."""
        if not self._before:
            yield
            return
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)


def end_with_parent() -> None:
    """Let this process, a worker, end when the one that has started it does, however that ended: it would wait for
    work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
