"""Conversion of text in observations, such as a mission, to vectors that the encoder accepts."""

from __future__ import annotations

import re
from itertools import pairwise
from zlib import crc32

import numpy as np
from gymnasium import spaces

SIZE = 64


def embed(text: str) -> np.ndarray:
    """Signed feature hashing of a text (Weinberger et al. 2009, arXiv 0902.2206): `(SIZE,)` float32.

    The features are the words and the pairs of adjacent words, in lower case. A hash of each feature chooses an entry
    and a sign, and the sign is added to the entry. The result is the same in every process and on every machine. Texts
    with the same words in different orders differ in their pairs."""
    words = re.findall(r"\w+", text.lower())
    vector = np.zeros(SIZE, np.float32)
    for feature in (*words, *(f"{a} {b}" for a, b in pairwise(words))):
        number = crc32(feature.encode())
        vector[number % SIZE] += 1.0 if number & 1 << 31 else -1.0
    return vector


def is_text(space: spaces.Space) -> bool:
    """Whether the members of the space are strings: `Text`, or a custom space such as MiniGrid's."""
    return isinstance(space, spaces.Text) or (space.dtype is not None and space.dtype.kind == "U")
