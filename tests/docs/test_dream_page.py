"""The examples of docs/dream.md run as they stand, in a run that was trained for a moment."""

import re
from pathlib import Path

import pytest

from longdream.agent.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_of_the_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "60", "--learn.prefill", "40", "--learn.warmup", "2", "--evaluate.every", "0"]
    few = ["--evaluate.final_episodes", "4", "--name", "quickstart-s0-1"]
    assert cli.main(["train", "tiny", *short, *few]) == 0
    assert len(blocks("docs/dream.md")) == 6
    here: dict = {}
    for block in blocks("docs/dream.md"):
        smaller = {"20_000": "128", "corridor=12, doors=2": "corridor=3, size=16"}  # it was trained in that corridor
        for text, other in smaller.items():
            block = block.replace(text, other)
        exec(block, here)
    assert here["obs"].shape == here["dream"].observation_space.shape
    assert here["learner"].num_timesteps == 64 * 16
    assert 0 <= here["total"] <= 200 and here["model"].num_timesteps == 128
    assert [path.stat().st_size > 500 for path in (tmp_path / "dreamt").glob("*.mp4")] == [True]
