"""Two ranks on two GPUs: NCCL inside of captured updates."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longdream.agent.cli import launch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
LEARN = """
import json, sys
from pathlib import Path
import torch
from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.core.ranks import here, joined
from longdream.agent.run import parts
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec

out, compiled = Path(sys.argv[1]), sys.argv[2] == "compiled"
with joined():
    ranks = here()
    assert torch.cuda.device_count() == 1
    settings = {"device": "cuda", "cuda_graphs": True, "compiled": compiled, "learn.encoder_rows": 1024}
    settings |= {"controller.center_advantages": True, "forcing.objective": "prior", "learn.warmup": 0}
    config = ranks.share(options.update(options.load("tiny"), settings))
    agent = Agent(config, EnvSpec({"image": ObsSpec("image", (16, 16, 3))}, ActionSpec((4,))))
    parts.check_weights(agent)
    torch.manual_seed(ranks.rank)
    losses = []
    for i in range(12):
        b, t = config.replay.batch, config.replay.length
        rows = {
            "obs": {"image": torch.randint(0, 255, (b, t, 16, 16, 3), dtype=torch.uint8)},
            "action": torch.nn.functional.one_hot(torch.randint(0, 4, (b, t)), 4).float(),
            "reward": torch.rand(b, t), "surprise": torch.rand(b, t),
            "is_first": torch.rand(b, t) < 0.1, "terminated": torch.zeros(b, t, dtype=torch.bool),
            "truncated": torch.zeros(b, t, dtype=torch.bool),
        }
        metrics = agent.update(rows)
        losses.append({key: float(value) for key, value in metrics.items()})
    agent.settle()
    parts.check_weights(agent)
    norms = ranks.gather([losses[i]["model/grad_norm"] for i in range(12)])
    assert norms[0] == norms[1], norms
    if ranks.rank == 0:
        out.write_text(json.dumps([agent.skipped, losses]))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["plain", "compiled"])
def test_captured_updates_leave_the_same_weights_on_both(how: str, tmp_path: Path) -> None:
    script = tmp_path / "learn.py"
    script.write_text(LEARN)
    out = tmp_path / "out.json"
    rank = [sys.executable, str(script), str(out), how]
    starter = f"import sys; from longdream.agent.cli.launch import launched; sys.exit(launched(2, {rank!r}))"
    result = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    skipped, losses = json.loads(out.read_text())
    assert skipped == 0 and losses[-1]["model/prediction"] < losses[0]["model/prediction"] * 1.5


@pytest.mark.timeout(600)
def test_a_run_of_two_gpus_from_the_command_line(tmp_path: Path) -> None:
    assert launch.gpus_of(["train", "tiny", "--gpus", "2"]) == (2, ["train", "tiny"])
    flags = ["--cuda_graphs", "true", "--device", "cuda", "--json"]
    command = [sys.executable, "-m", "longdream", "train", "tiny", "--name", "run", "--gpus", "2", *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["updates"] > 20
