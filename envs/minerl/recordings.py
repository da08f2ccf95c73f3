"""Recorded actions as ticks, which action sets encode: of MineRL 0.4's data and of Video PreTraining's.

Only what says which keys were pressed is read here; pictures are another matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from longdream.envs.contract import UserError
from longdream.envs.minerl.controls import HUMAN

KEYBOARD = {
    "w": "forward",
    "a": "left",
    "s": "back",
    "d": "right",
    "space": "jump",
    "left.shift": "sneak",
    "left.control": "sprint",
    "q": "drop",
    "e": "inventory",
    "f": "swapHands",
    "escape": "ESC",
    **{str(i): f"hotbar.{i}" for i in range(1, 10)},
}
"""Keys, as the recordings name them after "key.keyboard.", and the buttons that they are."""
MOUSE = ("attack", "use", "pickItem")
DEGREES = 360 / 2400
"""Of a turn, for each unit that the mouse moved."""
FAR = 180.0
"""A turn by more than these degrees in a tick is a fault of the recording."""


def ticks_of_rendered(rendered: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The ticks of a `rendered.npz` of MineRL 0.4: its entries `action$NAME`, N of each.

    Raises:
        UserError: it holds no actions, or as many as will not do.
    """
    ticks = {key.removeprefix("action$"): rendered[key] for key in rendered if key.startswith("action$")}
    if "camera" not in ticks:
        raise UserError("there is no action$camera: this is no rendered.npz of MineRL 0.4")
    wrong = [f"{name!r} {value.shape}" for name, value in ticks.items() if len(value) != len(ticks["camera"])]
    if wrong:
        raise UserError(f"the camera has {len(ticks['camera'])} actions, but {', '.join(wrong)}")
    return ticks


def ticks_of_jsonl(lines: Iterable[str]) -> dict[str, np.ndarray]:
    """The ticks of a `.jsonl` of Video PreTraining's contractors, a line each.

    The hotbar is turned by the mouse's wheel too, which is not recorded: whenever another slot is selected than the
    line before, its key counts as pressed. Where attack was down from the first line on, it is taken for stuck until it
    is pressed anew.

    Raises:
        UserError: a line that is no such record, by its number.
    """
    ticks: dict[str, list[Any]] = {name: [] for name in (*HUMAN.buttons, "camera")}
    slot, stuck = 0, False
    for number, line in enumerate(filter(str.strip, lines)):
        try:
            told = json.loads(line)
            mouse, keys = told["mouse"], told["keyboard"]["keys"]
            pressed = {KEYBOARD.get(str(key).removeprefix("key.keyboard.")) for key in keys}
            down, new = list(mouse["buttons"]), list(mouse.get("newButtons", ()))
            camera = np.array([float(mouse["dy"]), float(mouse["dx"])]) * DEGREES
            selected = int(told.get("hotbar", slot))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"line {number + 1} is no tick of a recording ({type(error).__name__}: {error})") from error
        stuck = new == [0] if number == 0 else stuck and 0 not in new
        pressed |= {MOUSE[button] for button in down if button in range(len(MOUSE)) and not (stuck and button == 0)}
        if selected != slot:
            pressed.add(f"hotbar.{selected + 1}")
        slot = selected
        for name in HUMAN.buttons:
            ticks[name].append(name in pressed)
        ticks["camera"].append(np.where(np.abs(camera) > FAR, 0, camera))
    if not ticks["camera"]:
        raise UserError("there is no tick in it")
    return {name: np.array(value) for name, value in ticks.items()}
