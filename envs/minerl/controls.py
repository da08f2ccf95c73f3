"""What MineRL's tasks can be told each tick, and what of it our action sets name.

A *tick* is MineRL's own action: a dict with 0 or 1 for each button, degrees of pitch and yaw (down and right are
positive) for `camera`, and a word for each choice, such as what to craft. Many ticks are a dict of arrays, time first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from longdream.envs.contract import UserError
from longdream.envs.remote import Enum

NONE = "none"
"""The word of a choice that does nothing."""


@dataclass(frozen=True)
class Controls:
    """buttons: names, sorted. choices: for each choice its words. Every task has a camera besides."""

    buttons: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, space: spaces.Space) -> Controls:
        """Those of an action space as it came from the other interpreter.

        Raises:
            UserError: it is none of MineRL's.
        """
        told = space.spaces if isinstance(space, spaces.Dict) else {}
        buttons = tuple(key for key, each in sorted(told.items()) if each == spaces.Discrete(2))
        choices = {key: each.values for key, each in sorted(told.items()) if isinstance(each, Enum)}
        rest = [key for key in told if key not in buttons and key not in choices]
        if rest != ["camera"] or told["camera"].shape != (2,) or any(NONE not in words for words in choices.values()):
            raise UserError(f"this is no action space of a MineRL task with buttons, choices and a camera: {space}")
        return cls(buttons, choices)

    def rest(self) -> dict[str, Any]:
        """The tick that does nothing."""
        tick: dict[str, Any] = dict.fromkeys(self.buttons, 0)
        return tick | {"camera": np.zeros(2, np.float32)} | dict.fromkeys(self.choices, NONE)

    def completed(self, ticks: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Many ticks in full: buttons (T,) bool, camera (T, 2) float32, choices (T,) of words; what they lack is not
        pressed, and words that this task does not know are `none`.

        Raises:
            UserError: there is no camera, or entries of other lengths or kinds.
        """
        camera = np.asarray(ticks.get("camera", ()), np.float32)
        if camera.ndim != 2 or camera.shape[1] != 2:
            raise UserError(f"ticks need a camera of shape (T, 2), in degrees; it has {camera.shape}")
        if not np.isfinite(camera).all():
            raise UserError("a camera turned by degrees that are not finite")
        length = len(camera)
        found: dict[str, np.ndarray] = {"camera": camera}
        for name in self.buttons:
            found[name] = np.asarray(ticks.get(name, np.zeros(length))) != 0
        for name, words in self.choices.items():
            told = np.asarray(ticks.get(name, np.full(length, NONE)))
            if told.dtype.kind not in "US":
                raise UserError(f"{name!r} is told by {told.dtype}, not by words such as {', '.join(words[:3])}")
            told = told.astype(str)
            found[name] = np.where(np.isin(told, words), told, NONE)
        wrong = [f"{name!r} {value.shape}" for name, value in found.items() if value.shape[:1] != (length,)]
        if wrong:
            raise UserError(f"the camera has {length} ticks, but {', '.join(wrong)}")
        return found


SIMPLE = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
TOOLS = ("iron_axe", "iron_pickaxe", NONE, "stone_axe", "stone_pickaxe", "wooden_axe", "wooden_pickaxe")
HUMAN = Controls(
    tuple(
        sorted(
            [
                *SIMPLE,
                "ESC",
                "drop",
                "inventory",
                "pickItem",
                "swapHands",
                "use",
                *(f"hotbar.{i}" for i in range(1, 10)),
            ]
        )
    )
)
"""Keyboard and mouse, as MineRL 1.0's tasks and the recordings of Video PreTraining have them."""

CONTROLS = {
    "Treechop": Controls(SIMPLE),
    "NavigateDense": Controls(SIMPLE, {"place": ("dirt", NONE)}),
    "ObtainDiamond": Controls(
        SIMPLE,
        {
            "craft": ("crafting_table", NONE, "planks", "stick", "torch"),
            "equip": ("air", *TOOLS),
            "nearbyCraft": ("furnace", *TOOLS),
            "nearbySmelt": ("coal", "iron_ingot", NONE),
            "place": ("cobblestone", "crafting_table", "dirt", "furnace", NONE, "stone", "torch"),
        },
    ),
    "ObtainDiamondShovel": HUMAN,
    "BasaltFindCave": Controls(
        tuple(sorted([*SIMPLE, "use"])),
        {
            "equip": (
                *("air", "bucket", "carrot", "cobblestone", "fence", "fence_gate", NONE, "other", "snowball"),
                *("stone_pickaxe", "stone_shovel", "water_bucket", "wheat", "wheat_seeds"),
            )
        },
    ),
}
"""Of each task in MineRL 0.4.4, and of ObtainDiamondShovel in 1.0. BasaltFindCave has HUMAN in 1.0."""
