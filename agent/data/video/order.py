"""The order of clips: a pure function of seed and epoch, so that a run can resume at any position in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(lengths: Sequence[int], clip: int, batch: int, seed: int, epoch: int, carry: bool) -> np.ndarray:
    """The batches of an epoch of clips of `clip` rows, from recordings of these lengths.

    Each recording is cut into consecutive clips, from a first row that is random in each epoch; then the clips are
    shuffled. With `carry`, recordings are cut from their first rows and shuffled, and their clips stay in order: within
    a recording, clip b of a batch follows clip b of the batch before. An incomplete last batch is dropped. If there are
    fewer clips than a batch needs, they are repeated.

    Returns:
        `(batches, batch, 2)`: the number of each clip's recording, and its first row.
    """
    rng = np.random.default_rng((seed, epoch))
    rows = np.asarray(lengths)
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
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a clip within its recording
    slots = np.stack([fits[which], begin[which] + number * clip], 1)
    if not carry:
        rng.shuffle(slots)
    slots = np.resize(slots, (max(len(slots), batch), 2))
    slots = slots[: len(slots) // batch * batch]
    # with carry, each of the batch's clips walks through its own part of the sequence
    return slots.reshape(batch, -1, 2).swapaxes(0, 1) if carry else slots.reshape(-1, batch, 2)
