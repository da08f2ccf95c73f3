"""longdream/MineRL-*: a task of MineRL behind Gymnasium's interface.

Minecraft and MineRL run in an interpreter of their own (envs/remote.py). This module adds discrete action sets, images
of a fixed size, vectors for the rest of an observation, action repeat and sticky buttons.
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
"""The environment variable with the path of an interpreter that has MineRL."""

ITEMS: dict[str, tuple[str, ...]] = {
    "ObtainDiamondShovel": (
        *("dirt", "*_log", "*_planks", "stick", "crafting_table", "wooden_pickaxe", "cobblestone", "furnace", "coal"),
        *("torch", "stone_pickaxe", "iron_ore", "iron_ingot", "iron_pickaxe", "diamond", "diamond_shovel"),
    )
}
"""Patterns of the inventory items in the observation, for tasks whose inventory lists every item of the game.

A pattern with `*` stands for the sum of the counts that match it."""

HELD = {"attack", "use", "forward", "back", "left", "right", "jump", "sneak", "sprint"}
"""Buttons that stay pressed while an action is repeated. Other controls act only in its first tick."""


class MineRLEnv(gym.Env):
    """A task of MineRL, with an image and vectors as observations and one of three discrete action sets.

    Observation: a Dict. `image` is (size, size, 3) uint8, resized by area averaging. Every other part of the task's
    observation, such as inventory, equipped_items, compass or life_stats, is a float32 vector with the part's name as
    its key. Numbers are unchanged, words and buttons become one-hot vectors, and the compass angle becomes sine and
    cosine. The attribute `names` lists the name of each entry of each vector.

    Args:
        task: a key of longdream.envs.minerl.controls.CONTROLS.
        python: the interpreter that has MineRL; "": the environment variable LONGDREAM_MINERL_PYTHON.
        actions: the action set: flat, factored or vpt (docs/minerl.md lists them).
        size: side of the image in pixels.
        repeat: number of ticks for which an action is repeated; rewards are summed.
        sticky_attack: ticks for which attack stays pressed after an action that pressed it; a block takes several.
        sticky_jump: the same for jump.
        pitch: limit of the camera's pitch, up and down, in degrees. None: 60, or no limit if the task's menus are
            operated with the mouse, as in MineRL 1.0.
        items: patterns of the inventory items in the observation; None: all items, or ITEMS of the task.
        env: an environment to make instead of the task's, "module:callable" or "module:Id".
        kwargs, environ, timeout_s, reset_timeout_s, restarts, render_mode: as for longdream/Remote-v0. A reset that
            fails or hangs is retried in a new process, up to `restarts` times.

    Raises:
        UserError: there is no such interpreter, task or action set, an argument is out of range, or the environment is
            not one of MineRL's.
        EnvError: (reset, step) more than `restarts` consecutive faults.
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
        self.repeat = repeat
        self.size = size
        self.sticky = {"attack": sticky_attack, "jump": sticky_jump}
        self.remote = RemoteEnv(
            python, env or f"minerl:MineRL{task}-v0", kwargs, environ, timeout_s, reset_timeout_s, restarts
        )
        try:
            self.controls = Controls.of(self.remote.action_space)
            self.actions = action_set(actions, self.controls, task)
            menus = "inventory" in self.controls.buttons
            self.max_pitch = pitch if pitch is not None else np.inf if menus else 60.0
            self._set_observation_space(ITEMS.get(task) if items is None else items)
        except UserError:
            self.remote.close()
            raise
        self.action_space = self.actions.space
        self.render_mode = render_mode
        self._frame: np.ndarray | None = None

    @property
    def faults(self) -> int:
        """Number of faults so far; see RemoteEnv."""
        return self.remote.faults

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        obs, info = self.remote.reset(seed=seed, options=options)
        self._ticks_left = dict.fromkeys(self.sticky, 0)  # for which each sticky button stays pressed
        self._pitch = 0.0  # degrees; every episode begins with the camera level
        return self._convert(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        decoded = self.actions.decode(action)
        total = 0.0
        obs: dict[str, Any] = {}
        terminated = False
        truncated = False
        info = {}
        for tick in range(self.repeat):
            native = decoded if tick == 0 else self._held(decoded)
            obs, reward, terminated, truncated, info = self.remote.step(self._to_remote(native))
            total += float(reward)
            if terminated or truncated:
                break
        return self._convert(obs), total, bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray | None:
        """The last image at the game's own resolution."""
        return self._frame if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.remote.close()

    def _held(self, tick: dict[str, Any]) -> dict[str, Any]:
        """The tick for the repetitions of an action: only the buttons in HELD."""
        return self.controls.rest() | {button: tick[button] for button in HELD if button in tick}

    def _to_remote(self, tick: dict[str, Any]) -> dict[str, Any]:
        """The tick as an action of the remote environment, with sticky buttons and a limited pitch."""
        tick = dict(tick)
        for button, ticks in self.sticky.items():
            self._ticks_left[button] = ticks if tick[button] else max(0, self._ticks_left[button] - 1)
            tick[button] = int(tick[button] or self._ticks_left[button] > 0)
        pitch = float(np.clip(self._pitch + tick["camera"][0], -self.max_pitch, self.max_pitch))
        tick["camera"] = np.array([pitch - self._pitch, tick["camera"][1]], np.float32)
        self._pitch = pitch
        for choice in self.controls.choices:
            tick[choice] = self.remote.action_space[choice].values.index(tick[choice])  # type: ignore[index]
        return tick

    # -- observations -------------------------------------------------------------------------------------------------

    def _set_observation_space(self, items: Sequence[str] | None) -> None:
        space = self.remote.observation_space
        if not isinstance(space, spaces.Dict) or "pov" not in space.spaces:
            raise UserError(f"this is no observation space of a MineRL task, with an image 'pov': {space}")
        self.items = items
        self.names: dict[str, list[str]] = {}
        parts: dict[str, spaces.Space] = {"image": spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)}
        for key, part in space.spaces.items():
            if key != "pov":
                self.names[key] = [name for name, _ in self._entries(key, part, None)]
                parts[key] = spaces.Box(-np.inf, np.inf, (len(self.names[key]),), np.float32)
        self.observation_space = spaces.Dict(parts)

    def _convert(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        """Convert an observation of the remote environment to our observation space."""
        self._frame = obs["pov"]
        converted = {"image": resize_area(obs["pov"], self.size, self.size)}
        for key, part in self.remote.observation_space.spaces.items():  # type: ignore[attr-defined]
            if key != "pov":
                converted[key] = np.array([value for _, value in self._entries(key, part, obs[key])], np.float32)
        return converted

    def _entries(self, key: str, space: spaces.Space, value: Any) -> list[tuple[str, float]]:
        """Names and values of the entries of a vector. If value is None, only the names are meaningful."""
        if key == "inventory" and self.items is not None and isinstance(space, spaces.Dict):
            counts = {name: 0.0 if value is None else float(value[name]) for name in space.spaces}
            return [(item, sum(n for name, n in counts.items() if fnmatchcase(name, item))) for item in self.items]
        if isinstance(space, spaces.Dict):
            entries = []
            for name, part in space.spaces.items():
                inner = self._entries(name, part, None if value is None else value[name])
                entries += [(f"{name}.{last}".rstrip("."), number) for last, number in inner]
            return entries
        if isinstance(space, spaces.Discrete):
            words = space.values if isinstance(space, Enum) else range(space.n)
            return [(str(word), float(value == i)) for i, word in enumerate(words)]
        if not isinstance(space, spaces.Box):
            raise UserError(f"observation {key!r} of {space} is not supported: use Box, Discrete, Enum or Dict")
        numbers = np.zeros(space.shape) if value is None else np.asarray(value, np.float64)
        if key == "angle":
            turn = np.deg2rad(float(numbers))
            return [("sin", float(np.sin(turn))), ("cos", float(np.cos(turn)))]
        flat = numbers.reshape(-1)
        return [("" if flat.size == 1 else str(i), float(number)) for i, number in enumerate(flat)]
