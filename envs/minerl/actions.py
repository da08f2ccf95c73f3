"""Action sets for MineRL: `flat`, `factored` and `vpt`, each of them ticks under numbers.

`decode` turns an action into the tick that is sent; `encode` finds, for ticks that a player made, the nearest actions.
Environments and recordings share them, so what is learnt from recordings means the same in the game.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
from gymnasium import spaces

from longdream.envs.contract import UserError
from longdream.envs.minerl.controls import NONE, Controls

Kind = Literal["flat", "factored", "vpt"]

CAMERA_BINS, CAMERA_MAX, CAMERA_MU = 11, 10.0, 10.0
"""The camera of Video PreTraining (Baker et al. 2022, arXiv 2206.11795): 11 bins an axis, up to 10 degrees a tick,
finer around 0."""
TURN = 15.0
"""Degrees of a turn in the flat set."""
HOTBAR = tuple(f"hotbar.{i}" for i in range(1, 10))


class ActionSet(Protocol):
    """Ticks under numbers.

    space: Discrete or MultiDiscrete. names: for each factor (one, if Discrete) what its numbers mean.
    """

    space: spaces.Space
    names: list[list[str]]

    def decode(self, action: Any) -> dict[str, Any]:
        """The tick of one action, complete."""
        ...

    def encode(self, ticks: Mapping[str, Any]) -> np.ndarray:
        """The nearest actions `(T,)` or `(T, factors)`, int64, to many ticks (see envs/minerl/controls.py).

        Raises:
            UserError: ticks that are none.
        """
        ...


def action_set(kind: str, controls: Controls, task: str = "") -> ActionSet:
    """One of the three for what a task can be told.

    Raises:
        UserError: no such set.
    """
    match kind:
        case "flat":
            return Flat(controls, task)
        case "factored":
            return Factored(controls, task)
        case "vpt":
            return Vpt(controls)
    raise UserError(f"there is no action set {kind!r}: use {', '.join(get_args(Kind))}")


# -- the camera --------------------------------------------------------------------------------------------------------


def camera_bins(degrees: np.ndarray) -> np.ndarray:
    """Degrees `(..., 2)` to bins, int64; 5 is rest. More than CAMERA_MAX is CAMERA_MAX."""
    share = np.clip(np.asarray(degrees, np.float64) / CAMERA_MAX, -1, 1)
    bent = np.sign(share) * np.log1p(CAMERA_MU * np.abs(share)) / np.log1p(CAMERA_MU)
    return np.round((bent + 1) * (CAMERA_BINS // 2)).astype(np.int64)


def camera_degrees(bins: np.ndarray) -> np.ndarray:
    """The inverse: the middle of each bin, float32."""
    bent = np.asarray(bins, np.float64) / (CAMERA_BINS // 2) - 1
    return (CAMERA_MAX * np.sign(bent) * np.expm1(np.abs(bent) * np.log1p(CAMERA_MU)) / CAMERA_MU).astype(np.float32)


# -- one number for everything ----------------------------------------------------------------------------------------

Pressed = dict[str, Any]
MOVES: dict[str, Pressed] = {
    "noop": {},
    "forward": {"forward": 1},
    "back": {"back": 1},
    "left": {"left": 1},
    "right": {"right": 1},
    "forward_jump": {"forward": 1, "jump": 1},
    "forward_sprint": {"forward": 1, "sprint": 1},
    "attack": {"attack": 1},
    "look_up": {"camera": (-TURN, 0)},
    "look_down": {"camera": (TURN, 0)},
    "look_left": {"camera": (0, -TURN)},
    "look_right": {"camera": (0, TURN)},
}
KEYS: dict[str, Pressed] = {key: {key: 1} for key in ("use", "drop", "inventory", *HOTBAR)}


def _told(choice: str, *words: str) -> dict[str, Pressed]:
    return {f"{choice}_{word}": {choice: word} for word in words}


FLAT: dict[str, dict[str, Pressed]] = {
    "Treechop": {"forward_attack": {"forward": 1, "attack": 1}},
    "NavigateDense": {"jump_place_dirt": {"jump": 1, "place": "dirt"}},
    "ObtainDiamond": {
        "jump_place_dirt": {"jump": 1, "place": "dirt"},
        **_told("craft", "planks", "stick", "crafting_table"),
        **_told("place", "crafting_table", "furnace"),
        **_told("nearbyCraft", "wooden_pickaxe", "stone_pickaxe", "iron_pickaxe", "furnace"),
        **_told("equip", "wooden_pickaxe", "stone_pickaxe", "iron_pickaxe"),
        **_told("nearbySmelt", "iron_ingot"),
    },
    "ObtainDiamondShovel": KEYS,
    "BasaltFindCave": {**_told("equip", "snowball"), **KEYS, "ESC": {"ESC": 1}},
}
"""What a task adds to MOVES, where it can be told so; ESC ends an episode of BasaltFindCave in MineRL 1.0."""


class Flat:
    """MOVES and what FLAT adds for the task, one Discrete."""

    def __init__(self, controls: Controls, task: str):
        self.controls = controls
        wanted = MOVES | FLAT.get(task, {})
        self.table = {
            name: pressed for name, pressed in wanted.items() if all(_can(controls, *p) for p in pressed.items())
        }
        self.names = [list(self.table)]
        self.space: spaces.Space = spaces.Discrete(len(self.table))
        ticks = [self.decode(number) for number in range(len(self.table))]
        self._features = self._described({key: np.stack([tick[key] for tick in ticks]) for key in ticks[0]})

    def decode(self, action: Any) -> dict[str, Any]:
        pressed = self.table[self.names[0][int(action)]]
        tick = self.controls.rest() | pressed
        return tick | {"camera": np.asarray(tick["camera"], np.float32)}

    def encode(self, ticks: Mapping[str, Any]) -> np.ndarray:
        told = self._described(ticks)
        distance = ((told[:, None] - self._features) ** 2).sum(-1)
        return distance.argmin(1)

    def _described(self, ticks: Mapping[str, Any]) -> np.ndarray:
        """Many ticks as points `(T, n)`, near each other where they do much the same. Choices and keys are rare and
        decide alone; attack counts more than walking, and a turn of half of TURN as much as that."""
        ticks = self.controls.completed(ticks)
        weight = {"attack": 1.5} | dict.fromkeys(KEYS, 4.0) | {"ESC": 4.0}
        columns = [ticks[name] * weight.get(name, 1.0) for name in self.controls.buttons]
        columns += [*(2 * np.clip(ticks["camera"] / TURN, -1, 1).T)]
        for name, words in self.controls.choices.items():
            columns += [(ticks[name] == word) * 10.0 for word in words if word != NONE]
        return np.stack(columns, 1).astype(np.float32)


def _can(controls: Controls, name: str, value: Any) -> bool:
    return name == "camera" or name in controls.buttons or value in controls.choices.get(name, ())


# -- one number for each matter ----------------------------------------------------------------------------------------


class Group:
    """Buttons of which at most one is pressed: 0 for none, then one each. Of two that are pressed at once the later
    counts, but for opposite directions, which cancel."""

    def __init__(self, name: str, *buttons: str):
        self.name, self.buttons = name, buttons
        self.opposite = buttons in (("forward", "back"), ("left", "right"))

    def encode(self, ticks: Mapping[str, np.ndarray]) -> np.ndarray:
        pressed = np.stack([ticks[button] for button in self.buttons], 1)
        number = (pressed * np.arange(1, len(self.buttons) + 1)).max(1)
        return np.where(pressed.all(1), 0, number) if self.opposite else number

    def decode(self, number: int) -> Pressed:
        return {self.buttons[number - 1]: 1} if number else {}


def groups(controls: Controls, wanted: Sequence[Group]) -> list[Group]:
    """Those of whose buttons the task has some, with these."""
    kept = [(group.name, [b for b in group.buttons if b in controls.buttons]) for group in wanted]
    return [Group(name, *buttons) for name, buttons in kept if buttons]


class Factored:
    """A number for each group of buttons, for pitch and yaw (camera_bins) and for each choice, one MultiDiscrete."""

    def __init__(self, controls: Controls, task: str):
        self.controls = controls
        self.groups = groups(
            controls,
            [
                Group("forward_back", "forward", "back"),
                Group("left_right", "left", "right"),
                Group("jump", "jump"),
                Group("sneak_sprint", "sneak", "sprint"),
                Group("attack_use", "use", "attack"),
                Group("hotbar", *HOTBAR),
                Group("drop", "drop"),
                Group("inventory", "inventory"),
                *([Group("ESC", "ESC")] if "ESC" in FLAT.get(task, {}) else []),
            ],
        )
        degrees = [f"{degree:+.1f}" for degree in camera_degrees(np.arange(CAMERA_BINS))]
        self.names = [[NONE, *group.buttons] for group in self.groups] + [degrees, degrees]
        self.names += [_none_first(words) for words in controls.choices.values()]
        self.space: spaces.Space = spaces.MultiDiscrete([len(names) for names in self.names])

    def decode(self, action: Any) -> dict[str, Any]:
        numbers = [int(number) for number in action]
        tick = self.controls.rest()
        count = len(self.groups)
        for group, number in zip(self.groups, numbers, strict=False):
            tick |= group.decode(number)
        words = zip(self.controls.choices, self.names[count + 2 :], numbers[count + 2 :], strict=True)
        tick |= {choice: names[number] for choice, names, number in words}
        return tick | {"camera": camera_degrees(np.array(numbers[count : count + 2]))}

    def encode(self, ticks: Mapping[str, Any]) -> np.ndarray:
        ticks = self.controls.completed(ticks)
        columns = [group.encode(ticks) for group in self.groups] + [*camera_bins(ticks["camera"]).T]
        columns += [_numbers(words, ticks[name]) for name, words in self.controls.choices.items()]
        return np.stack(columns, 1).astype(np.int64)


class Vpt:
    """The actions of Video PreTraining's policies: one number for all buttons together, one for the camera, one for
    each choice.

    Buttons are counted in the order of hotbar, forward and back, left and right, sprint and sneak, use, drop, attack,
    jump, and whether the camera moves, the last running fastest; `inventory`, alone, comes last. With HUMAN controls
    these are the 8,641 and 121 numbers of the published policies, in their order.
    """

    def __init__(self, controls: Controls):
        self.controls = controls
        self.groups = groups(
            controls,
            [
                Group("hotbar", *HOTBAR),
                Group("forward_back", "forward", "back"),
                Group("left_right", "left", "right"),
                Group("sprint_sneak", "sprint", "sneak"),
                *(Group(key, key) for key in ("use", "drop", "attack", "jump")),
            ],
        )
        self.sizes = [1 + len(group.buttons) for group in self.groups] + [2]
        self.joint = int(np.prod(self.sizes))
        self.inventory = "inventory" in controls.buttons
        degrees = [f"{degree:+.1f}" for degree in camera_degrees(np.arange(CAMERA_BINS))]
        self.names = [
            [self._name(number) for number in range(self.joint + self.inventory)],
            [f"{pitch}, {yaw}" for pitch in degrees for yaw in degrees],
            *(_none_first(words) for words in controls.choices.values()),
        ]
        self.space: spaces.Space = spaces.MultiDiscrete([len(names) for names in self.names])

    def decode(self, action: Any) -> dict[str, Any]:
        joint, camera, *chosen = (int(number) for number in action)
        tick, moves = self._buttons(joint)
        tick = self.controls.rest() | tick
        if moves:
            tick["camera"] = camera_degrees(np.array(divmod(camera, CAMERA_BINS)))
        words = zip(self.controls.choices, self.names[2:], chosen, strict=True)
        return tick | {choice: names[number] for choice, names, number in words}

    def encode(self, ticks: Mapping[str, Any]) -> np.ndarray:
        ticks = self.controls.completed(ticks)
        bins = camera_bins(ticks["camera"])
        opened = ticks["inventory"] if self.inventory else np.zeros(len(bins), bool)
        bins[opened] = CAMERA_BINS // 2
        moves = (bins != CAMERA_BINS // 2).any(1)
        joint = np.zeros(len(bins), np.int64)
        for size, number in zip(self.sizes, [*(group.encode(ticks) for group in self.groups), moves], strict=True):
            joint = joint * size + number
        columns = [np.where(opened, self.joint, joint), bins[:, 0] * CAMERA_BINS + bins[:, 1]]
        columns += [_numbers(words, ticks[name]) for name, words in self.controls.choices.items()]
        return np.stack(columns, 1).astype(np.int64)

    def _buttons(self, joint: int) -> tuple[Pressed, bool]:
        if joint == self.joint:
            return {"inventory": 1}, False
        numbers = [int(number) for number in np.unravel_index(joint, self.sizes)]
        tick: Pressed = {}
        for group, number in zip(self.groups, numbers, strict=False):
            tick |= group.decode(number)
        return tick, bool(numbers[-1])

    def _name(self, joint: int) -> str:
        tick, moves = self._buttons(joint)
        return "+".join([*tick, *(["camera"] if moves else [])]) or NONE


def _none_first(words: Sequence[str]) -> list[str]:
    return [NONE, *(word for word in words if word != NONE)]


def _numbers(words: Sequence[str], told: np.ndarray) -> np.ndarray:
    order = np.array(_none_first(words))
    return (told[:, None] == order).argmax(1)
