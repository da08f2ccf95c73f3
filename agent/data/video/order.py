"""The order in which clips are drawn: a pure function of seed, epoch and position, so that it goes on from there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(lengths: Sequence[int], clip: int, batch: int, seed: int, epoch: int, carry: bool) -> np.ndarray:
    """An epoch's batches of clips of `clip` rows from recordings of these lengths: `(batches, batch, 2)`, the number of
    each clip's recording and its first row.

    Recordings are cut into clips one behind the other, from a first row that is drawn anew in each epoch, and these are
    shuffled. With `carry`, recordings are shuffled and their clips stay in line, from their first rows on: clip b of a
    batch is what follows clip b of the batch before, within a recording. What does not fill a batch is left out; where
    there are fewer clips than a batch has, they come again within it.
    """
    rng, rows = np.random.default_rng((seed, epoch)), np.asarray(lengths)
    fits = np.flatnonzero(rows >= clip)
    if not len(fits):
        return np.empty((0, batch, 2), np.int64)
    if carry:
        rng.shuffle(fits)
        begin = np.zeros(len(fits), np.int64)
    else:
        begin = rng.integers(rows[fits] % clip + 1)
    counts = rows[fits] // clip
    which = np.repeat(np.arange(len(fits)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the clip in its recording
    slots = np.stack([fits[which], begin[which] + number * clip], 1)
    if not carry:
        rng.shuffle(slots)
    slots = np.resize(slots, (max(len(slots), batch), 2))
    slots = slots[: len(slots) // batch * batch]
    # carried: each clip of a batch has a stretch of the line for itself
    return slots.reshape(batch, -1, 2).swapaxes(0, 1) if carry else slots.reshape(-1, batch, 2)
