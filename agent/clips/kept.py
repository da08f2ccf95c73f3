"""Recordings in memory: each is read whole when a clip of it is first asked for, and not again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agent.clips.reader import Recording, Rows


class Kept:
    """`Rows` that answer as others do, from arrays of whole recordings. Threads that ask for a new recording at the
    same time read it once each, and one of the arrays stays."""

    def __init__(self, rows: Rows):
        self.rows, self.action = rows, rows.action
        self.whole: dict[tuple[str, str, int], np.ndarray] = {}

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        read = lambda: self.rows.frames(recording, 0, recording.length, size)  # noqa: E731
        return self._of("frames", recording, size, read)[start:stop]

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        read = lambda: self.rows.actions(recording, 0, recording.length)  # noqa: E731
        return self._of("actions", recording, 0, read)[start:stop]

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        read = lambda: self.rows.rewards(recording, 0, recording.length)  # noqa: E731
        return self._of("rewards", recording, 0, read)[start:stop]

    def _of(self, what: str, recording: Recording, size: int, read: Callable[[], np.ndarray]) -> np.ndarray:
        key = (what, recording.name, size)
        if key not in self.whole:
            self.whole[key] = read()
        return self.whole[key]
