"""The examples of docs/dream.md run as they stand, in a run that was trained for a moment."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dream.md"


def test_the_examples_of_the_page_run(dream_runs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart-s0-1").symlink_to(dream_runs("images"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 5
    here: dict = {}
    for block in blocks:
        smaller = {"20_000": "128", "corridor=12, doors=2": "corridor=3, size=16"}  # it was trained in that corridor
        for text, other in smaller.items():
            block = block.replace(text, other)
        exec(block, here)
    assert here["obs"].shape == here["dream"].observation_space.shape
    assert 0 <= here["total"] <= 200 and here["model"].num_timesteps == 128
    assert [path.stat().st_size > 500 for path in (tmp_path / "dreamt").glob("*.mp4")] == [True]
