"""Which keys mean which action, by what the environment says of its actions, or else by a map that is shown.

Keys have the names of `KeyboardEvent.code` in a browser, which do not depend on the layout of the keyboard.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longdream.envs.contract import ActionSpec
from longdream.envs.meaning import Meaning

IDLE = ("noop", "none", "nothing", "stay", "wait", "idle")
"""Names of an action that does nothing."""
WORDS: dict[str, tuple[str, ...]] = {
    "left": ("ArrowLeft",),
    "right": ("ArrowRight",),
    "up": ("ArrowUp",),
    "down": ("ArrowDown",),
    "forward": ("ArrowUp",),
    "backward": ("ArrowDown",),
    "move": (),
    "turn": (),
    "fire": ("Space",),
    "do": ("Space",),
    "toggle": ("Space",),
    "jump": ("Space",),
    "pickup": ("PageUp",),
    "drop": ("PageDown",),
    "done": ("Enter",),
    "sleep": ("KeyZ",),
}
"""The key for each word of an action's name; several words are a chord. Those of MiniGrid are its own."""
ATARI = ("upright", "upleft", "downright", "downleft", "uprightfire", "upleftfire", "downrightfire", "downleftfire")
TWINS = {"KeyW": "ArrowUp", "KeyA": "ArrowLeft", "KeyS": "ArrowDown", "KeyD": "ArrowRight"}
"""Keys and arrows that stand for each other, where only one of them has a meaning."""
PRINTED = (*(f"Digit{i}" for i in (*range(1, 10), 0)), *(f"Key{letter}" for letter in "QWERTYUIOPFGHJKLXCVBNM"))
"""Keys for actions of which nothing is said, in order."""
AXES = (("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowUp"), ("KeyA", "KeyD"), ("KeyS", "KeyW"), ("KeyQ", "KeyE"))
"""Keys for less and more of each number of a box."""


@dataclass(frozen=True)
class Binding:
    """Keys that are pressed together, and what they mean.

    part: the categorical factor, or the number of a box, that they set. value: the class, or a number in [-1, 1].
    """

    keys: frozenset[str]
    part: int
    value: float
    label: str


class Keys:
    """The keys of an environment, and the action that held keys give.

    bindings: in the order in which they are shown. mouse: whether the place of the mouse sets the first two numbers.
    idle: whether there is an action for when no key is held, so that time can go on by itself.
    """

    def __init__(self, spec: ActionSpec, meaning: Meaning = Meaning()) -> None:  # noqa: B008 (it is a constant)
        self.spec = spec
        self.names = meaning.names if spec.parts == (len(meaning.names),) else ()
        self.mouse = not spec.parts
        self.bindings = self._boxes() if self.mouse else self._factors(meaning)
        used = {key for binding in self.bindings for key in binding.keys}
        pairs = (*TWINS.items(), *((key, twin) for twin, key in TWINS.items()))
        self.twins = {twin: key for twin, key in pairs if key in used and twin not in used}
        nothing = next((i for i, name in enumerate(self.names) if name in IDLE), None)
        if len(spec.parts) == 1 and not self.names and self._is_own(meaning):
            nothing = next((action for keys, action in meaning.keys if not keys), None)
        self.idle = self.mouse or len(spec.parts) > 1 or nothing is not None
        self.nothing = nothing or 0

    def action(self, held: Iterable[str], mouse: tuple[float, float] | None = None) -> np.ndarray | None:
        """The encoded action `(1, A)` for these keys; None if they mean none and there is no idle one.

        Of chords that are held together, the one of most keys counts, and of these the last that was pressed.

        Args:
            held: from the first that was pressed to the last. mouse: its place on the picture, each number in [-1, 1].
        """
        order = {self.twins.get(key, key): i for i, key in enumerate(held)}
        now = [binding for binding in self.bindings if binding.keys <= order.keys()]
        now.sort(key=lambda binding: (len(binding.keys), max(order[key] for key in binding.keys)))
        if self.mouse:
            values = np.zeros((1, self.spec.size), np.float32)
            for i, place in enumerate((mouse or ())[: self.spec.size]):
                values[0, i] = place
            for binding in now:
                values[0, binding.part] = binding.value
            return values
        if not now and not self.idle:
            return None
        chosen = [self.nothing] * len(self.spec.parts)
        for binding in now:
            chosen[binding.part] = int(binding.value)
        return one_hots(self.spec, chosen)

    def label(self, action: np.ndarray) -> str:
        """An encoded action `(1, A)` in words."""
        if self.mouse:
            return ", ".join(f"{value:+.2f}" for value in action[0])
        parts = np.split(action[0], np.cumsum(self.spec.parts[:-1]))
        chosen = [int(part.argmax()) for part in parts]
        return self.names[chosen[0]] if self.names else ", ".join(map(str, chosen))

    def labels(self) -> list[list[str]]:
        """The names of the classes of each categorical factor; none of a box."""
        if self.names:
            return [list(self.names)]
        return [[str(i) for i in range(n)] for n in self.spec.parts]

    def to_json(self) -> dict[str, Any]:
        """For the page: the keys and what they mean, and whether the mouse means something."""
        shown = [{"keys": sorted(binding.keys), "label": binding.label} for binding in self.bindings]
        return {"bindings": shown, "mouse": self.mouse, "idle": self.idle, "twins": self.twins}

    def _is_own(self, meaning: Meaning) -> bool:
        """Whether the environment's own table of keys can be used."""
        actions = range(self.spec.parts[0]) if self.spec.parts else ()
        return bool(meaning.keys) and all(action in actions for _, action in meaning.keys)

    def _factors(self, meaning: Meaning) -> list[Binding]:
        if len(self.spec.parts) == 1 and self._is_own(meaning):
            bindings = []
            for letters, action in meaning.keys:
                keys = frozenset(code(letter) for letter in letters)
                label = self.names[action] if self.names else f"action {action}"
                bindings += [Binding(keys, 0, action, label)] if keys else []
            return bindings
        if self.names:
            return self._named()
        free = iter(PRINTED)
        bindings = []
        for part, n in enumerate(self.spec.parts):
            first = 0 if len(self.spec.parts) == 1 else 1  # of several factors, 0 is what no key gives
            for value, key in zip(range(first, n), free, strict=False):
                label = f"action {value}" if len(self.spec.parts) == 1 else f"{part}: {value}"
                bindings.append(Binding(frozenset({key}), part, value, label))
        return bindings

    def _named(self) -> list[Binding]:
        """Keys by the words of the names, and printed ones where words say nothing or mean the same keys."""
        chords: list[frozenset[str] | None] = []
        for name in self.names:
            words = name.split()
            words = _apart(name) if name in ATARI or name.endswith("fire") else words
            known = all(word in WORDS for word in words)
            keys = frozenset(key for word in words for key in WORDS[word]) if known else frozenset()
            chords.append(keys if keys and keys not in chords else None)
        taken = {key for keys in chords if keys for key in keys}
        free = iter(key for key in PRINTED if key not in taken)
        bindings = []
        for i, (name, keys) in enumerate(zip(self.names, chords, strict=True)):
            if name in IDLE:
                continue
            if keys is None:
                letter = next(free, None)
                if letter is None:
                    break
                keys = frozenset({letter})
            bindings.append(Binding(keys, 0, i, name))
        return bindings

    def _boxes(self) -> list[Binding]:
        bindings = []
        for part, (less, more) in zip(range(self.spec.size), AXES, strict=False):
            bindings.append(Binding(frozenset({less}), part, -1.0, f"{part}: −"))
            bindings.append(Binding(frozenset({more}), part, 1.0, f"{part}: +"))
        return bindings


def one_hots(spec: ActionSpec, chosen: list[int]) -> np.ndarray:
    """The encoded action `(1, A)` of one class per categorical factor."""
    action = np.zeros((1, spec.size), np.float32)
    for offset, value in zip(np.cumsum((0, *spec.parts[:-1])), chosen, strict=True):
        action[0, offset + value] = 1.0
    return action


def code(letter: str) -> str:
    """The browser's name of the key that writes a letter; of other keys the name that they have already."""
    special = {" ": "Space", "\r": "Enter", "\n": "Enter", "\t": "Tab", "\x1b": "Escape"}
    if letter in special:
        return special[letter]
    if len(letter) > 1:
        return letter
    return f"Digit{letter}" if letter.isdigit() else f"Key{letter.upper()}"


def _apart(name: str) -> list[str]:
    """An action of Atari as its words: "upleftfire" as up, left, fire."""
    words = []
    for word in ("up", "down", "left", "right", "fire"):
        if word in name:
            words.append(word)
    return words
