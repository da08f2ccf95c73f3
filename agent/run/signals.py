"""Ctrl-C and friendly kills: the run saves itself first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """While entered, SIGINT and SIGTERM wait for `check`; a second one ends the program at once, as it would have.

    Signals belong to the main thread; entered in another one, this does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._came) for number in NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _came(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            self.__exit__()
            signal.raise_signal(number)
        self.number = number

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Processes started inside never see SIGINT, which a terminal sends to all of them."""
        if not self._before:
            yield
            return
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
