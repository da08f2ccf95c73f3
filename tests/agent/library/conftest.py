"""A folder with runs/demo in it, trained for a moment."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def demo(dream_runs: Callable[[str], Path], tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(dream_runs("images"))
    return tmp_path
