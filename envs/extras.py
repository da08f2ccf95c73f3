"""What is not installed with the project itself, but with one of its extras: `pip install 'longdream[NAME]'`."""

from __future__ import annotations

from importlib.util import find_spec

from longdream.envs.contract import UserError

EXTRAS = {
    "maze": ("memory_maze", "dm_control", "mujoco", "labmaze", "numba"),
    "video": ("av", "torchmetrics"),
}
"""Modules that each extra brings, of those that are asked for here."""


def missing(extra: str) -> list[str]:
    """Modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def require(extra: str, what: str) -> None:
    """Check that an extra is installed.

    Raises:
        UserError: it is not; `what` needs it.
    """
    if lacking := missing(extra):
        raise UserError(f"{what} needs {', '.join(lacking)}: pip install 'longdream[{extra}]'")
