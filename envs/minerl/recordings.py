"""Recorded actions, read as ticks that action sets encode: the data of MineRL 0.4 and of Video PreTraining.

Only the actions are read here, not the frames.
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
"""The button of each key. Recordings name the keys with the prefix "key.keyboard."."""
MOUSE = ("attack", "use", "pickItem")
DEGREES_PER_UNIT = 360 / 2400
"""Degrees that the camera turns for each unit of mouse movement."""
MAX_TURN = 180.0
"""A turn by more degrees than this in a single tick is an error in the recording; it is replaced by 0."""


def ticks_of_rendered(rendered: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The ticks of a `rendered.npz` of MineRL 0.4: its entries `action$NAME`.

    Raises:
        UserError: it contains no actions, or the numbers of actions differ.
    """
    ticks = {key.removeprefix("action$"): rendered[key] for key in rendered if key.startswith("action$")}
    if "camera" not in ticks:
        raise UserError("there is no action$camera: this is no rendered.npz of MineRL 0.4")
    wrong = [f"{name!r} {value.shape}" for name, value in ticks.items() if len(value) != len(ticks["camera"])]
    if wrong:
        raise UserError(f"the camera has {len(ticks['camera'])} actions, but {', '.join(wrong)}")
    return ticks


def ticks_of_jsonl(lines: Iterable[str]) -> dict[str, np.ndarray]:
    """The ticks of a `.jsonl` file of Video PreTraining's contractors, one per line.

    The mouse wheel also selects the hotbar's slot, but it is not recorded. The key of a slot therefore counts as
    pressed whenever the selected slot differs from the previous line's. If attack is newly pressed in the first line,
    it is treated as stuck, and ignored, until it is pressed again.

    Raises:
        UserError: a line is not a record of this format; the message has its number.
    """
    ticks: dict[str, list[Any]] = {name: [] for name in (*HUMAN.buttons, "camera")}
    slot = 0
    stuck = False
    for number, line in enumerate(filter(str.strip, lines)):
        try:
            record = json.loads(line)
            mouse = record["mouse"]
            keys = record["keyboard"]["keys"]
            pressed = {KEYBOARD.get(str(key).removeprefix("key.keyboard.")) for key in keys}
            down = list(mouse["buttons"])
            new = list(mouse.get("newButtons", ()))
            camera = np.array([float(mouse["dy"]), float(mouse["dx"])]) * DEGREES_PER_UNIT
            selected = int(record.get("hotbar", slot))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"line {number + 1} is no tick of a recording ({type(error).__name__}: {error})") from error
        stuck = new == [0] if number == 0 else stuck and 0 not in new
        known = [int(button) for button in down if button in range(len(MOUSE))]  # (pandas writes 0 as 0.0)
        pressed |= {MOUSE[button] for button in known if not (stuck and button == 0)}
        if selected != slot:
            pressed.add(f"hotbar.{selected + 1}")
        slot = selected
        for name in HUMAN.buttons:
            ticks[name].append(name in pressed)
        ticks["camera"].append(np.where(np.abs(camera) > MAX_TURN, 0, camera))
    if not ticks["camera"]:
        raise UserError("the recording is empty: there is no tick in it")
    return {name: np.array(value) for name, value in ticks.items()}
