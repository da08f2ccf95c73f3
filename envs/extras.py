"""What is not installed with the project itself, but with one of its extras: `pip install 'longdream[NAME]'`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from longdream.envs.contract import UserError

EXTRAS = {
    "maze": ("memory_maze", "dm_control", "mujoco", "labmaze", "numba"),
    "video": ("av", "torchmetrics"),
}
"""Modules that each extra brings, of those that are asked for here."""


def needs(extra: str) -> str:
    """What is not installed of an extra, and how to get it; empty where nothing is missing."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if "labmaze" in missing and sys.version_info >= (3, 13):
        return f"needs {', '.join(missing)}: labmaze has no wheels for Python 3.13, use 3.11 or 3.12"
    return f"needs {', '.join(missing)}: pip install 'longdream[{extra}]'" if missing else ""


def require(extra: str, what: str) -> None:
    """Check that an extra is installed.

    Raises:
        UserError: it is not; `what` needs it.
    """
    if lacking := needs(extra):
        raise UserError(f"{what} {lacking}")
