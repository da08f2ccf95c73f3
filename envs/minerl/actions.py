"""Action sets for MineRL: `flat`, `factored` and `vpt`. Each represents ticks by discrete actions.

`decode` converts an action to the tick that is sent to the game. `encode` maps recorded ticks to the nearest actions.
Environments and recordings use the same action sets, so an action means the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
from gymnasium import spaces

from longdream.envs.contract import UserError
from longdream.envs.minerl.controls import NONE, Controls

Kind = Literal["flat", "factored", "vpt"]

CAMERA_BINS = 11
CAMERA_MAX = 10.0
CAMERA_MU = 10.0
"""The camera of Video PreTraining (Baker et al. 2022, arXiv 2206.11795): 11 bins per axis with mu-law spacing, up to 10
degrees per tick."""
TURN = 15.0
"""Degrees that a look action of the flat set turns the camera."""
HOTBAR = tuple(f"hotbar.{i}" for i in range(1, 10))


class ActionSet(Protocol):
    """A discrete representation of ticks.

    Attributes:
        space: Discrete or MultiDiscrete.
        names: for each factor (a single one if Discrete), the names of its values.
    """

    space: spaces.Space
    names: list[list[str]]

    def decode(self, action: Any) -> dict[str, Any]:
        """The complete tick of an action."""
        ...

    def encode(self, ticks: Mapping[str, Any]) -> np.ndarray:
        """The nearest actions, `(T,)` or `(T, factors)` int64, to a sequence of ticks (see envs/minerl/controls.py).

        Raises:
            UserError: the ticks are invalid.
        """
        ...


def action_set(kind: str, controls: Controls, task: str = "") -> ActionSet:
    """The action set of this kind for a task with these controls.

    Raises:
        UserError: the kind does not exist.
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
    """Convert degrees `(..., 2)` to bins, int64, by the mu-law. Bin 5 is no turn; degrees are clipped to CAMERA_MAX."""
    ratio = np.clip(np.asarray(degrees, np.float64) / CAMERA_MAX, -1, 1)
    compressed = np.sign(ratio) * np.log1p(CAMERA_MU * np.abs(ratio)) / np.log1p(CAMERA_MU)
    return np.round((compressed + 1) * (CAMERA_BINS // 2)).astype(np.int64)


def camera_degrees(bins: np.ndarray) -> np.ndarray:
    """Convert bins to the degrees of their centres, float32: the inverse of `camera_bins`."""
    compressed = np.asarray(bins, np.float64) / (CAMERA_BINS // 2) - 1
    expanded = np.expm1(np.abs(compressed) * np.log1p(CAMERA_MU))
    return (CAMERA_MAX * np.sign(compressed) * expanded / CAMERA_MU).astype(np.float32)


# -- flat: one Discrete -----------------------------------------------------------------------------------------------

PartialTick = dict[str, Any]
"""The entries of a tick that differ from the tick without effect."""
MOVES: dict[str, PartialTick] = {
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
KEYS: dict[str, PartialTick] = {key: {key: 1} for key in ("use", "drop", "inventory", *HOTBAR)}


def _choice_actions(choice: str, *words: str) -> dict[str, PartialTick]:
    return {f"{choice}_{word}": {choice: word} for word in words}


FLAT: dict[str, dict[str, PartialTick]] = {
    "Treechop": {"forward_attack": {"forward": 1, "attack": 1}},
    "NavigateDense": {"jump_place_dirt": {"jump": 1, "place": "dirt"}},
    "ObtainDiamond": {
        "jump_place_dirt": {"jump": 1, "place": "dirt"},
        **_choice_actions("craft", "planks", "stick", "crafting_table"),
        **_choice_actions("place", "crafting_table", "furnace"),
        **_choice_actions("nearbyCraft", "wooden_pickaxe", "stone_pickaxe", "iron_pickaxe", "furnace"),
        **_choice_actions("equip", "wooden_pickaxe", "stone_pickaxe", "iron_pickaxe"),
        **_choice_actions("nearbySmelt", "iron_ingot"),
    },
    "ObtainDiamondShovel": KEYS,
    "BasaltFindCave": {**_choice_actions("equip", "snowball"), **KEYS, "ESC": {"ESC": 1}},
}
"""The actions that a task adds to MOVES, if it has the controls. In MineRL 1.0, ESC ends a BasaltFindCave episode."""


class Flat:
    """A Discrete space: MOVES, and the actions that FLAT adds for the task."""

    def __init__(self, controls: Controls, task: str):
        self.controls = controls
        all_actions = MOVES | FLAT.get(task, {})
        self.table = {
            name: partial
            for name, partial in all_actions.items()
            if all(_has_control(controls, key, value) for key, value in partial.items())
        }
        self.names = [list(self.table)]
        self.space: spaces.Space = spaces.Discrete(len(self.table))
        ticks = [self.decode(number) for number in range(len(self.table))]
        self._features = self._features_of({key: np.stack([tick[key] for tick in ticks]) for key in ticks[0]})

    def decode(self, action: Any) -> dict[str, Any]:
        partial = self.table[self.names[0][int(action)]]
        tick = self.controls.rest() | partial
        return tick | {"camera": np.asarray(tick["camera"], np.float32)}

    def encode(self, ticks: Mapping[str, Any]) -> np.ndarray:
        features = self._features_of(ticks)
        distance = ((features[:, None] - self._features) ** 2).sum(-1)
        return distance.argmin(1)

    def _features_of(self, ticks: Mapping[str, Any]) -> np.ndarray:
        """Feature vectors `(T, n)` of ticks, whose Euclidean distance measures how different the ticks are.

        Choices and keys are rare and have the largest weights, so they decide alone. Attack has a larger weight than
        walking; a turn by half of TURN has the same weight as walking."""
        ticks = self.controls.completed(ticks)
        weight = {"attack": 1.5} | dict.fromkeys(KEYS, 4.0) | {"ESC": 4.0}
        columns = [ticks[name] * weight.get(name, 1.0) for name in self.controls.buttons]
        columns += [*(2 * np.clip(ticks["camera"] / TURN, -1, 1).T)]
        for name, words in self.controls.choices.items():
            columns += [(ticks[name] == word) * 10.0 for word in words if word != NONE]
        return np.stack(columns, 1).astype(np.float32)


def _has_control(controls: Controls, name: str, value: Any) -> bool:
    return name == "camera" or name in controls.buttons or value in controls.choices.get(name, ())


# -- factored and vpt: one MultiDiscrete -------------------------------------------------------------------------------


class Group:
    """A categorical factor for buttons of which at most one is pressed: 0 for none, then one value for each button.

    If a tick presses several, the last one in the group counts; opposite directions cancel each other."""

    def __init__(self, name: str, *buttons: str):
        self.name = name
        self.buttons = buttons
        self.opposite = buttons in (("forward", "back"), ("left", "right"))

    def encode(self, ticks: Mapping[str, np.ndarray]) -> np.ndarray:
        pressed = np.stack([ticks[button] for button in self.buttons], 1)
        number = (pressed * np.arange(1, len(self.buttons) + 1)).max(1)
        return np.where(pressed.all(1), 0, number) if self.opposite else number

    def decode(self, number: int) -> PartialTick:
        return {self.buttons[number - 1]: 1} if number else {}


def groups(controls: Controls, candidates: Sequence[Group]) -> list[Group]:
    """The groups reduced to the buttons that the task has; groups without buttons are dropped."""
    available = [(group.name, [b for b in group.buttons if b in controls.buttons]) for group in candidates]
    return [Group(name, *buttons) for name, buttons in available if buttons]


class Factored:
    """A MultiDiscrete space: a factor for each group of buttons, for pitch, for yaw, and for each choice."""

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
    """The actions of Video PreTraining's policies: a factor for all buttons jointly, one for the camera, and one for
    each choice.

    The joint factor enumerates hotbar, forward and back, left and right, sprint and sneak, use, drop, attack, jump, and
    whether the camera moves; the last varies fastest. `inventory` cannot be combined and has the last value. With the
    controls HUMAN, the factors have the 8,641 and 121 values of the published policies, in the same order.
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
        joint, camera, *choice_numbers = (int(number) for number in action)
        buttons, camera_moves = self._buttons(joint)
        tick = self.controls.rest() | buttons
        if camera_moves:
            tick["camera"] = camera_degrees(np.array(divmod(camera, CAMERA_BINS)))
        words = zip(self.controls.choices, self.names[2:], choice_numbers, strict=True)
        return tick | {choice: names[number] for choice, names, number in words}

    def encode(self, ticks: Mapping[str, Any]) -> np.ndarray:
        ticks = self.controls.completed(ticks)
        bins = camera_bins(ticks["camera"])
        inventory = ticks["inventory"] if self.inventory else np.zeros(len(bins), bool)
        bins[inventory] = CAMERA_BINS // 2
        camera_moves = (bins != CAMERA_BINS // 2).any(1)
        numbers = [*(group.encode(ticks) for group in self.groups), camera_moves]
        joint = np.zeros(len(bins), np.int64)
        for size, number in zip(self.sizes, numbers, strict=True):
            joint = joint * size + number
        columns = [np.where(inventory, self.joint, joint), bins[:, 0] * CAMERA_BINS + bins[:, 1]]
        columns += [_numbers(words, ticks[name]) for name, words in self.controls.choices.items()]
        return np.stack(columns, 1).astype(np.int64)

    def _buttons(self, joint: int) -> tuple[PartialTick, bool]:
        """The buttons of a value of the joint factor, and whether the camera moves."""
        if joint == self.joint:
            return {"inventory": 1}, False
        numbers = [int(number) for number in np.unravel_index(joint, self.sizes)]
        tick: PartialTick = {}
        for group, number in zip(self.groups, numbers, strict=False):
            tick |= group.decode(number)
        return tick, bool(numbers[-1])

    def _name(self, joint: int) -> str:
        buttons, camera_moves = self._buttons(joint)
        return "+".join([*buttons, *(["camera"] if camera_moves else [])]) or NONE


def _none_first(words: Sequence[str]) -> list[str]:
    return [NONE, *(word for word in words if word != NONE)]


def _numbers(words: Sequence[str], values: np.ndarray) -> np.ndarray:
    """The indices of these words in the order of `_none_first`."""
    order = np.array(_none_first(words))
    return (values[:, None] == order).argmax(1)
