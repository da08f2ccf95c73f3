"""`longdream bench scale`, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longdream.agent.bench.agents import scale
from longdream.agent.config import options
from longdream.agent.core.ranks import Ranks
from longdream.envs.contract import UserError


def test_ranks_are_measured(tmp_path: Path) -> None:
    flags = ["--preset", "tiny", "--ranks", "2", "--repeats", "3", "--json"]
    command = [sys.executable, "-m", "longdream", "bench", "scale", *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["table"]
    assert row["ranks"] == 2 and row["efficiency"] == 1 and 0 < row["communication"] <= 1
    assert row["rows_per_s"] == pytest.approx(2 * 4 * 8 / row["ms"] * 1e3)
    assert row["dreamt_steps_per_s"] == pytest.approx(2 * 4 * 2 * 3 / row["ms"] * 1e3)
    assert row["gradient_bytes"] > 4 * 10_000 and row["peak_bytes"] > 1 << 20
    assert "efficiency" in result.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["tiny", "video-tiny"])
def test_each_rank_has_the_work_of_one(preset: str) -> None:
    one = options.load(preset)
    part = Ranks(1, 2).share(scale.scaled(one, 2))
    assert (part.env.copies, part.replay.batch, part.replay.capacity) == (
        one.env.copies, one.replay.batch, one.replay.capacity,
    )  # fmt: skip
    assert part.learn.encoder_rows == one.learn.encoder_rows
    with pytest.raises(UserError, match="must be at least 1"):
        scale.measure(preset, ranks=(0,))
