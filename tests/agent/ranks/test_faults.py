"""Two ranks of one run, on the CPU: whatever ends one of them ends the run in one line, and nothing that was saved is
lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longdream.agent.run import checkpoint

ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("LONGDREAM_KILLS", "2"))  # each costs the start of three processes
SHORT = ["--gpus", "2", "--steps", "150", "--evaluate.episodes", "4", "--evaluate.final_episodes", "4"]
OFTEN = ["--evaluate.save_seconds", "0"]
ENVIRONMENT = """
import os
import time

import gymnasium as gym
import numpy as np


class Faulty(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fault):
        self.fault = fault
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        if os.environ.get("RANK") == "1" and self.steps == 40 and not os.path.exists("mark"):
            open("mark", "w").close()
            if self.fault == "raise":
                raise ZeroDivisionError("a bug of the environment")
            time.sleep(600)
        return np.full(3, 0.1, np.float32), float(action), False, self.steps % 10 == 0, {}


gym.register("OnRank1-v0", entry_point="on_rank_1:Faulty")
"""


def start(folder: Path, *arguments: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "longdream", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "LONGDREAM_RANK_TIMEOUT_S": "60"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes of the ranks, in their order."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def listening(pids: list[int]) -> set[str]:
    """Addresses at which these processes listen, as the kernel writes them."""
    sockets = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(fd)
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and line[9] in sockets}


def reached(folder: Path) -> int:
    newest = checkpoint.latest(folder / "checkpoints")
    return int(newest.name.split("_")[1].partition(".")[0]) if newest else -1


def wait_for(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the run has a checkpoint of this step, or a later one."""
    while reached(run) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def end(process: subprocess.Popen) -> tuple[str, list[str]]:
    """What was printed, and the lines that say why it ended; nothing of it runs any more."""
    pids = ranks_of(process) if process.poll() is None else []
    _, err = process.communicate(timeout=200)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    return err, [line for line in err.splitlines() if line.startswith("longdream: ")]


def record(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks from its first step to its last."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, "train", "tiny", "--name", "run", *SHORT, *OFTEN, "--json")
    wait_for(process, folder / "runs" / "run", 0)
    listens = listening([process.pid, *ranks_of(process)])
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert listens <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}, listens
    assert err.count("training in runs/run") == 1 and "Traceback" not in err and "warning" not in err
    summary = json.loads(out)
    assert summary["env_steps"] >= 150 and summary["episodes"] == 4
    lines = record(folder / "runs" / "run")
    assert any("controller/actor" in line for line in lines)
    assert sum("episode/return" in line for line in lines) == lines[-2]["count/episodes"]
    return folder / "runs" / "run"


@pytest.mark.timeout(200 + 100 * KILLS)
def test_a_rank_is_killed_and_the_run_goes_on_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    moments = random.Random(KILLS)
    run = tmp_path / "runs" / "run"
    process = start(tmp_path, "train", "tiny", "--name", "run", *SHORT, *OFTEN)
    for kill in range(KILLS):
        wait_for(process, run, 140 * kill // KILLS)
        time.sleep(moments.uniform(0, 0.2))
        ranks = ranks_of(process)
        victim = kill % 2
        os.kill(ranks[victim], signal.SIGKILL)
        err, said = end(process)
        assert process.returncode == 1, err
        assert len(said) == 1 and f"rank {victim} (process {ranks[victim]} on " in said[0] and "died" in said[0], err
        assert "go on with: longdream train --resume runs/run" in err and "Traceback" not in err
        process = start(tmp_path, "train", "--resume", "runs/run", "--gpus", "2")
    err, said = end(process)
    assert process.returncode == 0 and not said, err
    assert "warning" not in err, err
    assert record(run) == record(whole)


def test_signals_to_one_rank_and_to_all_save_first(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    process = start(tmp_path, "train", "tiny", "--name", "run", *SHORT, *OFTEN)
    wait_for(process, run, 20)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    err, said = end(process)
    assert process.returncode == 143, err
    assert said == ["longdream: stopped by SIGTERM; go on with: longdream train --resume runs/run"], err
    process = start(tmp_path, "train", "--resume", "runs/run", "--gpus", "2")
    wait_for(process, run, reached(run) + 1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    err, said = end(process)
    assert process.returncode == 130, err
    assert said == ["longdream: stopped by SIGINT; go on with: longdream train --resume runs/run"], err

    # with another number of ranks the run goes on with what it has learned
    process = start(tmp_path, "train", "--resume", "runs/run")
    err, said = end(process)
    assert process.returncode == 0 and not said, err
    assert "warning: the run was saved by 2 ranks and goes on with 1" in err
    last = [line for line in record(run) if "count/updates" in line][-1]
    assert last["step"] >= 150 and last["count/updates"] > 5


@pytest.mark.parametrize("fault", ["raise", "hang"])
def test_an_environment_that_fails_on_one_rank(fault: str, tmp_path: Path) -> None:
    (tmp_path / "on_rank_1.py").write_text(ENVIRONMENT)
    flags = ["--env", "on_rank_1:OnRank1-v0", "--env.kwargs", json.dumps({"fault": fault})]
    bound = {"LONGDREAM_RANK_TIMEOUT_S": "8"} if fault == "hang" else {}
    process = start(tmp_path, "train", "tiny", "--name", "run", *SHORT, *OFTEN, *flags, **bound)
    wait_for(process, tmp_path / "runs" / "run", 0)
    err, said = end(process)
    assert process.returncode == 1 and len(said) == 1, err
    if fault == "raise":
        assert said[0].startswith("longdream: rank 1: environment worker ") and "a bug of the environment" in said[0]
        assert err.count('raise ZeroDivisionError("a bug of the environment")') == 1
        saved, step = checkpoint.load(tmp_path / "runs" / "run" / "checkpoints")
        assert saved["collector"] is not None and step == saved["progress"]  # rank 0's episodes go on
    else:
        assert "rank 1 (process " in said[0] and "did not answer within 8 s" in said[0]
    assert "go on with: longdream train --resume runs/run" in err


def test_what_cannot_be_shared_is_refused_once(tmp_path: Path) -> None:
    process = start(tmp_path, "train", "tiny", "--gpus", "2", "--env.copies", "5")
    err, said = end(process)
    assert process.returncode == 2
    assert said == ["longdream: env.copies = 5 is for all 2 ranks together, which share evenly: use 4 or 6"], err
    assert not (tmp_path / "runs").exists()
