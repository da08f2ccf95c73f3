"""Sizes of V, M and C by one word: `--size`, or `size:` in a YAML file, in place of a dozen settings."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from longdream.agent.config.flags import suggest
from longdream.agent.config.schema import Config
from longdream.envs.contract import UserError

NAME = "size"
"""Stands for the settings of a size wherever settings are given by name."""


def _size(width: int, layers: int, channels: int, classes: int, depth: int, hidden: int, deep: int) -> dict[str, Any]:
    return {
        "worldmodel.width": width,
        "worldmodel.layers": layers,
        "worldmodel.num_heads": max(4, width // 64),
        "worldmodel.state_size": 16 if width < 256 else 32,
        "encoder.channels": channels,
        "encoder.classes": classes,
        "encoder.depth": depth,
        "heads.hidden": hidden,
        "controller.hidden": hidden,
        "controller.layers": deep,
    }


SIZES = {
    "tiny": _size(64, 2, 128, 8, 16, 128, 2),
    "small": _size(128, 2, 256, 16, 24, 256, 2),
    "medium": _size(256, 3, 512, 16, 32, 256, 3),
    "large": _size(512, 4, 1024, 32, 32, 512, 3),
}
"""Settings by size. tiny is for CPUs; large is that of Memory Maze, for a GPU."""


def expanded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, with those of a size in its place; what else is named comes after them.

    Raises:
        UserError: there is no such size.
    """
    if NAME not in settings:
        return settings
    size = settings[NAME]
    if size not in SIZES:
        raise UserError(f"size = {size}" + suggest(str(size), SIZES, f"there are {', '.join(SIZES)}"))
    return SIZES[size] | {name: value for name, value in settings.items() if name != NAME}


def default_size(config: Config) -> str:
    """The size for an environment on a device: tiny on a CPU; on a GPU medium for images, small for all else.

    Raises:
        UserError: the environment cannot be made, or shows what is not supported.
    """
    # imported here: they bring torch, and help is quick
    from longdream.agent.core.device import resolve_device
    from longdream.envs.make import World

    if resolve_device(config.device) == "cpu":
        return "tiny"
    with closing(World(config.env.id, 1, config.seed, config.env.kwargs)) as world:
        images = any(spec.kind == "image" for spec in world.spec.obs.values())
    return "medium" if images else "small"
