"""Recordings cached in memory: each is read once, in full, when its first clip is requested."""

from __future__ import annotations

import numpy as np

from longdream.agent.data.video.reader import Recording, Rows


class Kept:
    """`Rows` that are served from arrays of whole recordings. Threads that request a new recording at the same time
    may each read it; one of the arrays is kept."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.action = rows.action
        self.whole: dict[tuple[str | int, ...], np.ndarray] = {}

    def frames(self, recording: Recording, start: int, stop: int, size: int) -> np.ndarray:
        return self._whole("frames", recording, size)[start:stop]

    def actions(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return self._whole("actions", recording)[start:stop]

    def rewards(self, recording: Recording, start: int, stop: int) -> np.ndarray:
        return self._whole("rewards", recording)[start:stop]

    def _whole(self, what: str, recording: Recording, *size: int) -> np.ndarray:
        key = (what, recording.name, *size)
        if key not in self.whole:
            self.whole[key] = getattr(self.rows, what)(recording, 0, recording.length, *size)
        return self.whole[key]
