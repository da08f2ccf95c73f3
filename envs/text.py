"""Text in observations, such as a mission, as numbers that V can take in."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from zlib import crc32

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SIZE = 64


def embed(text: str) -> np.ndarray:
    """`(SIZE,)` float32: words and pairs of neighbouring words, lower case, each added with a sign to the entry that a
    hash names (Weinberger et al. 2009, arXiv 0902.2206). Equal in every process and on every machine; two texts of the
    same words in another order differ in their pairs."""
    words = re.findall(r"\w+", text.lower())
    found = np.zeros(SIZE, np.float32)
    for piece in (*words, *(f"{a} {b}" for a, b in pairwise(words))):
        number = crc32(piece.encode())
        found[number % SIZE] += 1.0 if number & 1 << 31 else -1.0
    return found


def is_text(space: spaces.Space) -> bool:
    """Whether members are strings: `Text`, or a space of an environment's own, as MiniGrid has."""
    return isinstance(space, spaces.Text) or (space.dtype is not None and space.dtype.kind == "U")


def without_text(env: gym.Env) -> gym.Env:
    """The environment itself or, where it shows text at the top level of its observation, one that shows vectors in
    its place."""
    space = env.observation_space
    found = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    return TextAsVectors(env) if any(is_text(each) for each in found) else env


class TextAsVectors(gym.ObservationWrapper):
    """Shows `embed` of every text in the observation, and the rest as it is."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space, vector = env.observation_space, spaces.Box(-np.inf, np.inf, (SIZE,), np.float32)
        if isinstance(space, spaces.Dict):
            self.texts = [key for key, each in space.spaces.items() if is_text(each)]
            self.observation_space = spaces.Dict({**space.spaces, **dict.fromkeys(self.texts, vector)})
        else:
            self.texts, self.observation_space = None, vector

    def observation(self, observation: Any) -> Any:
        if self.texts is None:
            return embed(observation)
        return {**observation, **{key: embed(observation[key]) for key in self.texts}}
