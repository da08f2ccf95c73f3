"""The native actions of MineRL's tasks: buttons, choices and the camera.

A *tick* is MineRL's native action of one game tick: a dict with 0 or 1 for each button, degrees of pitch and yaw (down
and right are positive) for `camera`, and a word for each choice, such as the item to craft. A sequence of ticks is a
dict of arrays with time as the first axis.
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
"""The word of a choice that has no effect."""


@dataclass(frozen=True)
class Controls:
    """The buttons and choices of a task. Every task also has a camera.

    Attributes:
        buttons: names, sorted.
        choices: the words of each choice.
    """

    buttons: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, space: spaces.Space) -> Controls:
        """The controls of an action space that the other interpreter sent.

        Raises:
            UserError: it is not the action space of a MineRL task.
        """
        parts = space.spaces if isinstance(space, spaces.Dict) else {}
        buttons = tuple(key for key, part in sorted(parts.items()) if part == spaces.Discrete(2))
        choices = {key: part.values for key, part in sorted(parts.items()) if isinstance(part, Enum)}
        others = [key for key in parts if key not in buttons and key not in choices]
        has_camera = others == ["camera"] and parts["camera"].shape == (2,)
        if not has_camera or any(NONE not in words for words in choices.values()):
            raise UserError(f"this is no action space of a MineRL task with buttons, choices and a camera: {space}")
        return cls(buttons, choices)

    def rest(self) -> dict[str, Any]:
        """The tick that has no effect."""
        tick: dict[str, Any] = dict.fromkeys(self.buttons, 0)
        return tick | {"camera": np.zeros(2, np.float32)} | dict.fromkeys(self.choices, NONE)

    def completed(self, ticks: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Complete a sequence of ticks: buttons (T,) bool, camera (T, 2) float32, choices (T,) of words.

        A missing button is not pressed. A missing choice, or a word that the task does not have, becomes `none`.

        Raises:
            UserError: there is no camera, or an entry has the wrong length or type.
        """
        camera = np.asarray(ticks.get("camera", ()), np.float32)
        if camera.ndim != 2 or camera.shape[1] != 2:
            raise UserError(f"ticks need a camera of shape (T, 2), in degrees; it has {camera.shape}")
        if not np.isfinite(camera).all():
            raise UserError("the camera has values that are not finite: it must hold degrees of pitch and yaw")
        length = len(camera)
        complete: dict[str, np.ndarray] = {"camera": camera}
        for name in self.buttons:
            complete[name] = np.asarray(ticks.get(name, np.zeros(length))) != 0
        for name, words in self.choices.items():
            values = np.asarray(ticks.get(name, np.full(length, NONE)))
            if values.dtype.kind not in "US":
                raise UserError(f"{name!r} has dtype {values.dtype}: it must hold words such as {', '.join(words[:3])}")
            values = values.astype(str)
            complete[name] = np.where(np.isin(values, words), values, NONE)
        wrong = [f"{name!r} {value.shape}" for name, value in complete.items() if value.shape[:1] != (length,)]
        if wrong:
            raise UserError(f"the camera has {length} ticks, but {', '.join(wrong)}: all must have the same length")
        return complete


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
"""The keyboard and mouse of MineRL 1.0's tasks and of the Video PreTraining recordings."""

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
"""The controls of each task in MineRL 0.4.4, and of ObtainDiamondShovel in 1.0. In 1.0, BasaltFindCave has HUMAN."""
