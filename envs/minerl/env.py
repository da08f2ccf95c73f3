"""longdream/MineRL-*: a task of MineRL behind the plain Gymnasium interface.

Minecraft and MineRL run in an interpreter of their own (envs/remote.py). What this adds on our side: action sets,
pictures of one size, the rest of an observation as vectors, and what makes single ticks add up to something.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from longdream.envs.contract import UserError
from longdream.envs.images import resize_area
from longdream.envs.minerl.actions import action_set
from longdream.envs.minerl.controls import CONTROLS, Controls
from longdream.envs.remote import Enum, RemoteEnv

PYTHON = "LONGDREAM_MINERL_PYTHON"
"""The variable that names the interpreter which has MineRL."""

ITEMS: dict[str, tuple[str, ...]] = {
    "ObtainDiamondShovel": (
        *("dirt", "*_log", "*_planks", "stick", "crafting_table", "wooden_pickaxe", "cobblestone", "furnace", "coal"),
        *("torch", "stone_pickaxe", "iron_ore", "iron_ingot", "iron_pickaxe", "diamond", "diamond_shovel"),
    )
}
"""Items that are shown of an inventory that lists every item of the game; `*` sums over kinds."""

HELD = {"attack", "use", "forward", "back", "left", "right", "jump", "sneak", "sprint"}
"""Buttons that stay down while an action is repeated. Others are pressed once, and the camera turns once."""


class MineRLEnv(gym.Env):
    """A task of MineRL: image and vectors to see, one of three action sets to act with.

    Observations: `image` (size, size, 3) uint8, resized by area; and for everything else that the task shows, such as
    inventory, equipped_items, compass or life_stats, a float32 vector under its name: numbers as they are, words and
    buttons as one-hots, the compass' angle as sine and cosine. `names` says what stands where.

    Args:
        task: one of longdream.envs.minerl.controls.CONTROLS.
        python: the interpreter that has MineRL; "": the environment variable LONGDREAM_MINERL_PYTHON.
        actions: flat, factored or vpt (docs/minerl.md lists them).
        size: side of the image.
        repeat: ticks that an action lasts; rewards are summed.
        sticky_attack: ticks that attack stays down after an action that pressed it: a block takes many.
        sticky_jump: the same for jump.
        pitch: degrees up and down beyond which the camera does not turn; None: 60, but no bound where menus are worked
            with the mouse, as in MineRL 1.0.
        items: patterns of the inventory items to show; None: all, or ITEMS of the task.
        env: what to make there in the task's place, "module:callable" or "module:Id".
        kwargs, environ, timeout_s, reset_timeout_s, restarts, render_mode: of longdream/Remote-v0. A reset that fails
            or hangs is tried again in another process, `restarts` times.

    Raises:
        UserError: no interpreter, no such task or action set, numbers that make no sense, or an environment that is
            none of MineRL's.
        EnvError: (reset, step) a fault too many.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(
        self,
        task: str,
        python: str = "",
        actions: str = "flat",
        size: int = 64,
        repeat: int = 1,
        sticky_attack: int = 30,
        sticky_jump: int = 10,
        pitch: float | None = None,
        items: Sequence[str] | None = None,
        env: str = "",
        kwargs: dict[str, Any] | None = None,
        environ: dict[str, str] | None = None,
        timeout_s: float = 60.0,
        reset_timeout_s: float = 600.0,
        restarts: int = 5,
        render_mode: str | None = None,
    ) -> None:
        if task not in CONTROLS:
            raise UserError(f"there is no MineRL task {task!r}: use {', '.join(CONTROLS)}")
        if min(size, repeat) < 1 or min(sticky_attack, sticky_jump) < 0 or not (pitch is None or 0 < pitch <= 90):
            raise UserError(
                f"size={size}, repeat={repeat}, sticky_attack={sticky_attack}, sticky_jump={sticky_jump}, "
                f"pitch={pitch}: size and repeat from 1, sticky ticks from 0, pitch above 0 and at most 90"
            )
        python = python or os.environ.get(PYTHON, "")
        if not python:
            raise UserError(
                "MineRL runs in an interpreter of its own: name it by python=/path/to/python or by the variable "
                f"{PYTHON}; docs/minerl.md tells how to make one"
            )
        self.repeat, self.size = repeat, size
        self.sticky = {"attack": sticky_attack, "jump": sticky_jump}
        self.remote = RemoteEnv(
            python, env or f"minerl:MineRL{task}-v0", kwargs, environ, timeout_s, reset_timeout_s, restarts
        )
        try:
            self.controls = Controls.of(self.remote.action_space)
            self.actions = action_set(actions, self.controls, task)
            menus = "inventory" in self.controls.buttons
            self.pitch = pitch if pitch is not None else np.inf if menus else 60.0
            self._layout(ITEMS.get(task) if items is None else items)
        except UserError:
            self.remote.close()
            raise
        self.action_space = self.actions.space
        self.render_mode = render_mode
        self._picture: np.ndarray | None = None

    @property
    def faults(self) -> int:
        """Those that were survived; see RemoteEnv."""
        return self.remote.faults

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        obs, info = self.remote.reset(seed=seed, options=options)
        self._down = dict.fromkeys(self.sticky, 0)
        self._looks = 0.0  # every episode begins level
        return self._seen(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        told, total = self.actions.decode(action), 0.0
        obs: dict[str, Any] = {}
        terminated, truncated, info = False, False, {}
        for tick in range(self.repeat):
            now = told if tick == 0 else self._held(told)
            obs, reward, terminated, truncated, info = self.remote.step(self._sent(now))
            total += float(reward)
            if terminated or truncated:
                break
        return self._seen(obs), total, bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray | None:
        """The last picture, as large as the game draws it."""
        return self._picture if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.remote.close()

    def _held(self, tick: dict[str, Any]) -> dict[str, Any]:
        return self.controls.rest() | {button: tick[button] for button in HELD if button in tick}

    def _sent(self, tick: dict[str, Any]) -> dict[str, Any]:
        """The tick with sticky buttons and a camera that stays in its bounds, as the other side's spaces have it."""
        tick = dict(tick)
        for button, ticks in self.sticky.items():
            self._down[button] = ticks if tick[button] else max(0, self._down[button] - 1)
            tick[button] = int(tick[button] or self._down[button] > 0)
        turned = float(np.clip(self._looks + tick["camera"][0], -self.pitch, self.pitch))
        tick["camera"] = np.array([turned - self._looks, tick["camera"][1]], np.float32)
        self._looks = turned
        for choice in self.controls.choices:
            tick[choice] = self.remote.action_space[choice].values.index(tick[choice])  # type: ignore[index]
        return tick

    # -- observations -------------------------------------------------------------------------------------------------

    def _layout(self, items: Sequence[str] | None) -> None:
        space = self.remote.observation_space
        if not isinstance(space, spaces.Dict) or "pov" not in space.spaces:
            raise UserError(f"this is no observation space of a MineRL task, with a picture 'pov': {space}")
        self.items = items
        self.names: dict[str, list[str]] = {}
        told: dict[str, spaces.Space] = {"image": spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)}
        for key, each in space.spaces.items():
            if key != "pov":
                self.names[key] = [name for name, _ in self._entries(key, each, None)]
                told[key] = spaces.Box(-np.inf, np.inf, (len(self.names[key]),), np.float32)
        self.observation_space = spaces.Dict(told)

    def _seen(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        self._picture = picture = obs["pov"]
        seen = {"image": resize_area(picture, self.size, self.size)}
        for key, each in self.remote.observation_space.spaces.items():  # type: ignore[attr-defined]
            if key != "pov":
                seen[key] = np.array([value for _, value in self._entries(key, each, obs[key])], np.float32)
        return seen

    def _entries(self, key: str, space: spaces.Space, value: Any) -> list[tuple[str, float]]:
        """Names and numbers of what stands in a vector; a value of None: the names alone count."""
        if key == "inventory" and self.items is not None and isinstance(space, spaces.Dict):
            counts = {name: 0.0 if value is None else float(value[name]) for name in space.spaces}
            return [(item, sum(n for name, n in counts.items() if fnmatchcase(name, item))) for item in self.items]
        if isinstance(space, spaces.Dict):
            found = []
            for name, each in space.spaces.items():
                entries = self._entries(name, each, None if value is None else value[name])
                found += [(f"{name}.{last}".rstrip("."), number) for last, number in entries]
            return found
        if isinstance(space, spaces.Discrete):
            words = space.values if isinstance(space, Enum) else range(space.n)
            return [(str(word), float(value == i)) for i, word in enumerate(words)]
        if not isinstance(space, spaces.Box):
            raise UserError(f"an observation {key!r} of {space} has no place in a vector")
        numbers = np.zeros(space.shape) if value is None else np.asarray(value, np.float64)
        if key == "angle":
            turn = np.deg2rad(float(numbers))
            return [("sin", float(np.sin(turn))), ("cos", float(np.cos(turn)))]
        flat = numbers.reshape(-1)
        return [("" if flat.size == 1 else str(i), float(number)) for i, number in enumerate(flat)]
