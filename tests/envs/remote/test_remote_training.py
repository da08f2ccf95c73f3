"""Training in an environment that lives in another interpreter: by flag, by preset, and through its faults."""

import json
import sys
from pathlib import Path

import pytest

from longdream.agent.cli import main as cli

# Episodes of eight steps, seen as a picture; the process of one of them dies, once.
FAR = """
import os
import numpy as np

class Box:
    dtype = np.dtype("u1")
    low, high = np.zeros((16, 16, 3), "u1"), np.full((16, 16, 3), 255, "u1")

class Discrete:
    n = 3

class Short:
    observation_space, action_space = Box(), Discrete()

    def __init__(self, dies_at=None, mark="died"):
        self.dies_at, self.mark, self.steps = dies_at, mark, 0

    def reset(self):
        self.time = 0
        return np.zeros((16, 16, 3), "u1")

    def step(self, action):
        self.time, self.steps = self.time + 1, self.steps + 1
        if self.steps == self.dies_at and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os._exit(3)
        return np.full((16, 16, 3), 20 * self.time, "u1"), float(action == 1), self.time == 8, {}

    def close(self):
        pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "far_world.py").write_text(FAR)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_by_flag(capsys: pytest.CaptureFixture) -> None:
    where = f"remote:{sys.executable}:far_world:Short"
    small = [
        "--learn.steps",
        "140",
        "--evaluate.every",
        "0",
        "--evaluate.final_episodes",
        "2",
        "--evaluate.copies",
        "1",
    ]
    remote = ["--env", where, "--env.copies", "2", "--env.kwargs", '{"kwargs": {"dies_at": 30}}']
    assert cli.main(["train", "tiny", "--name", "far", *remote, *small, "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    assert summary["env"] == where and summary["length_mean"] == 8
    assert "died in step (exit code 3): fault 1, the process is started again" in err
    counts = [line["count/faults"] for line in lines("runs/far") if "count/faults" in line]
    assert counts[-1] == 1 and counts == sorted(counts)
    lengths = [line["episode/length"] for line in lines("runs/far") if "episode/length" in line]
    assert [length for length in lengths if length != 8] == [30 % 8]  # cut short where it died
    assert cli.main(["train", "--resume", "runs/far", "--steps", "180", "--json"]) == 0
    assert [line["count/faults"] for line in lines("runs/far") if "count/faults" in line][-1] == 1  # not forgotten


def test_by_preset(folder: Path) -> None:
    preset = f"""# Far away
    threads: 1
    env:
      id: longdream/Remote-v0
      kwargs: {{python: {sys.executable}, env: "far_world:Short", timeout_s: 20}}
      copies: 1
    replay: {{capacity: 500, batch: 2, length: 8}}
    encoder: {{channels: 8, depth: 4}}
    worldmodel: {{layers: 1, width: 16, num_heads: 2, state_size: 4, window: 2}}
    controller: {{hidden: 16, layers: 1, imagination_starts: 2, horizon: 3}}
    learn: {{steps: 60, prefill: 20, train_ratio: 4, encoder_rows: 16}}
    evaluate: {{every: 0, final_episodes: 1, copies: 1}}
    """
    (folder / "far.yaml").write_text(preset)
    assert cli.main(["train", "far.yaml", "--name", "preset"]) == 0
    assert json.loads(Path("runs/preset/summary.json").read_text())["env_steps"] >= 60


def test_a_failed_start_is_one_line_and_the_output_of_the_process(capsys: pytest.CaptureFixture) -> None:
    where = f"remote:{sys.executable}:no_such_world:Short"
    assert cli.main(["train", "tiny", "--env", where, "--json"]) == 2
    out, err = capsys.readouterr()
    lines_of_error = err.splitlines()
    assert "it raised in make: ModuleNotFoundError: No module named 'no_such_world'" in lines_of_error[0]
    assert lines_of_error[-1] == "ModuleNotFoundError: No module named 'no_such_world'" and len(lines_of_error) > 3
    assert "no_such_world" in json.loads(out)["error"] and not Path("runs").exists()
