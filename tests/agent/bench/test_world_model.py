"""`longdream bench world-model`: every mixer through training, both tasks and cost, at the smallest size."""

import json
from pathlib import Path

import numpy as np
import pytest

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.worldmodel.dynamics import Dynamics

TINY = {
    "video.size": 16, "video.lengths": [4, 8], "video.frames": 16, "video.context": 4, "video.horizon": 4,
    "encoder.grid": 2, "encoder.channels": 4, "encoder.depth": 4, "learn.updates": 4, "learn.warmup": 2,
    "worldmodel.layers": 2, "worldmodel.width": 32, "worldmodel.num_heads": 2, "worldmodel.state_size": 4,
    "worldmodel.window": 2, "worldmodel.blocks": [1, 2], "forcing.steps": 1,
    "evaluate.times": 0, "video.held_out_clips": 2, "threads": 1,
}  # fmt: skip


def bench(mazes: Path, *more: str, **settings: object) -> int:
    given = json.dumps(TINY | settings)
    common = ["--data", str(mazes), "--settings", given, "--context", "5", "--ahead", "3", "--clips", "3"]
    return cli.main(["bench", "world-model", *common, "--out", "out", *more])


def test_every_mixer_has_its_rows(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mixers = ("hybrid", "ssm", "causal", "hybrid/no-prefix")
    assert bench(mazes, "--mixers", ",".join(mixers), "--contexts", "4,8", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["mixer"], row["task"]): row for row in result["rows"]}
    assert set(rows) == {(mixer, task) for mixer in (*mixers, "hybrid/zeroed") for task in ("retrieval", "reasoning")}
    sizes = [row["params"] for row in result["rows"]]
    assert max(sizes) < 1.05 * min(sizes)
    for (_, task), row in rows.items():
        assert len(row["psnr_curve"]) == len(row["ssim_curve"]) == (4 if task == "retrieval" else 3)
        assert row["psnr"] == pytest.approx(np.mean(row["psnr_curve"]), abs=1e-3)
        assert row["psnr"] > 0 and -1 <= row["ssim"] <= 1 and row["lpips"] is None  # no weights here, and no zero
        assert row["train_frames_per_s"] > 0 and row["seed"] == 0 and row["updates"] == 4
    cost = {(row["mixer"], row["context"]): row for row in result["cost"]}
    assert set(cost) == {(mixer, context) for mixer in mixers for context in (4, 8)}
    assert cost["hybrid", 4]["state_bytes"] == cost["hybrid", 8]["state_bytes"] < cost["causal", 8]["state_bytes"]
    assert cost["causal", 4]["state_bytes"] < cost["causal", 8]["state_bytes"]
    assert all(Path(picture).stat().st_size > 1000 for picture in result["pictures"])
    assert json.loads(Path("out/world-model.json").read_text())["rows"] == result["rows"]

    # once more: what is trained is not trained again, and evaluated the same
    again = bench(mazes, "--mixers", "ssm", "--contexts", "4", "--json")
    rows_again = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert again == 0 and len(rows_again) == 2
    for row in rows_again:
        assert row["psnr"] == rows[row["mixer"], row["task"]]["psnr"]
        assert row["wall_s"] == rows[row["mixer"], row["task"]]["wall_s"]
    assert bench(mazes, "--mixers", "ssm", **{"learn.model_rate": 1e-5}) == 2
    assert "holds a run of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixers", "hybird"], "'hybird': did you mean hybrid"),
        (["--context", "2"], "--context 2"),
        (["--context", "500"], "the longest held-out recording has"),
        (["--preset", "video-tiny"], "video.condition must be pose"),
    ],
)
def test_a_mistake_ends_in_one_line(
    flags: list[str], message: str, mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert bench(mazes, *flags) == 2
    assert message in capsys.readouterr().err


def test_an_update_of_m_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--settings", json.dumps(TINY), "--clips", "2", "--frames", "8", "--repeats", "3", "--device", "cpu"]
    assert cli.main(["bench", "update", *size, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["frames_per_s"] == pytest.approx(2 * 8 / result["update_ms"] * 1e3)
    assert (result["clips"], result["frames"], result["device"], result["peak_bytes"]) == (2, 8, "cpu", None)
    more = options.update(options.load("video-world-model"), TINY)
    m = Dynamics(more.worldmodel, more.encoder.grid, more.encoder.channels, 20)
    assert result["parameters"] == sum(p.numel() for p in m.parameters())


def test_an_update_of_chunks_is_of_whole_ones(capsys: pytest.CaptureFixture[str]) -> None:
    given = json.dumps(TINY | {"worldmodel.chunk_frames": 2})
    assert cli.main(["bench", "update", "--settings", given, "--frames", "7", "--device", "cpu"]) == 2
    assert "--frames 7: must be a multiple of worldmodel.chunk_frames = 2" in capsys.readouterr().err
