"""Two ranks of one run, on the CPU: whatever ends one of them ends the run in one line, and nothing that was saved is
lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from longdream.agent.config import options
from longdream.agent.core.ranks import Ranks
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run_folder
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import UserError

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
        if os.environ.get("RANK") == "1" and self.steps == 20 and not os.path.exists("mark"):
            open("mark", "w").close()
            if self.fault == "raise":
                raise ZeroDivisionError("a bug of the environment")
            time.sleep(600)
        return np.full(3, 0.1, np.float32), float(action), False, self.steps % 10 == 0, {}


gym.register("OnRank1-v0", entry_point="on_rank_1:Faulty")
"""

THREADS = """
import atexit
import json
import os
import sys
from pathlib import Path

from longdream.agent.cli import launch, output
from longdream.agent.core.ranks import here
from longdream.envs.contract import UserError

if not launch.is_rank():
    sys.exit(launch.launched(2, [sys.executable, __file__]))


def of_group():
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def leave():
    Path(os.environ["RANK"] + ".json").write_text(json.dumps([before, of_group()]))


atexit.register(leave)
try:
    with launch.as_rank() as rank, here().together():
        before = of_group()
        if rank:
            raise UserError("a mistake")
except UserError as error:
    code, message = output.explain(error)
    print(f"longdream: {message}", file=sys.stderr)
    sys.exit(code)
"""


def start(folder: Path, *arguments: str, module: bool = True, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *(["-m", "longdream"] if module else []), *arguments],
        cwd=folder,
        env=os.environ | {"LONGDREAM_RANK_TIMEOUT_S": "60"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes of the ranks, in their order."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with suppress(OSError):  # it has just ended
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
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


@pytest.mark.timeout(300 + 100 * KILLS)
def test_killed_and_stopped_it_goes_on_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    """kill -9 of one rank at random moments, and of all at once; SIGTERM to one, Ctrl-C on the terminal of all."""
    moments = random.Random(KILLS)
    run = tmp_path / "runs" / "run"
    process = start(tmp_path, "train", "tiny", "--name", "run", *SHORT, *OFTEN)
    for kill in range(KILLS):
        wait_for(process, run, max(120 * kill // KILLS, reached(run) + 1))
        time.sleep(moments.uniform(0, 0.2))
        ranks = ranks_of(process)
        victims = [kill % 2] if kill else [0, 1]
        for victim in victims:
            os.kill(ranks[victim], signal.SIGKILL)
        err, said = end(process)
        assert process.returncode == 1, err
        named = [f"rank {victim} (process {ranks[victim]} on " in said[0] for victim in victims]
        assert len(said) == 1 and any(named) and "died" in said[0], err
        assert "go on with: longdream train --resume runs/run" in said[0] and "Traceback" not in err
        process = start(tmp_path, "train", "--resume", "runs/run", "--gpus", "2")
    for number in (signal.SIGTERM, signal.SIGINT):
        wait_for(process, run, reached(run) + 1)
        if number == signal.SIGTERM:
            os.kill(ranks_of(process)[1], number)
        else:
            os.killpg(process.pid, number)  # what a terminal does
        err, said = end(process)
        assert process.returncode == 128 + number, err
        assert said == [f"longdream: stopped by {number.name}; go on with: longdream train --resume runs/run"], err
        process = start(tmp_path, "train", "--resume", "runs/run", "--gpus", "2")
    err, said = end(process)
    assert process.returncode == 0 and not said and "warning" not in err, err
    assert record(run) == record(whole)


def test_another_number_of_ranks_goes_on_with_what_was_learned(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    config = options.update(run_folder.open_run(folder).config, {"learn.steps": 200})
    before = record(folder)
    updates = [line for line in before if "count/updates" in line][-1]["count/updates"]
    summary = OnlineTrainer.train(config, folder, resume=True)
    assert "warning: the run was saved by 2 ranks and goes on with 1" in capsys.readouterr().err
    assert summary["env_steps"] >= 200 and summary["updates"] > updates
    assert summary["dream_steps"] > json.loads((whole / "summary.json").read_text())["dream_steps"]
    saved, _ = checkpoint.load(folder / "checkpoints")
    assert "ranks" not in saved and saved["count"]["lost_worlds"] == 0
    assert (folder / "replay").is_dir() and not (folder / "replay-1").exists()


def test_what_all_have_agreed_on_ends_the_threads_of_the_group_before_python(tmp_path: Path) -> None:
    """Those that outlive Python abort the process now and then, and the run with a code of its own."""
    (tmp_path / "threads.py").write_text(THREADS)
    process = start(tmp_path, "threads.py", module=False)
    err, said = end(process)
    assert process.returncode == 2 and said == ["longdream: rank 1: a mistake"], err
    counts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(before > 0 and after == 0 for before, after in counts), counts


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


def test_what_cannot_be_shared_evenly_is_refused_with_numbers_that_can() -> None:
    config = options.load("tiny")
    part = Ranks(1, 2).share(config)
    assert (part.env.copies, part.replay.batch, part.replay.capacity, part.learn.encoder_rows) == (2, 2, 1000, 16)
    assert (part.learn.steps, part.learn.train_ratio) == (config.learn.steps, config.learn.train_ratio)
    with pytest.raises(UserError, match=r"env.copies = 5 is for all 2 ranks together, .* use 4 or 6"):
        Ranks(0, 2).share(options.update(config, {"env.copies": 5}))
    with pytest.raises(UserError, match=r"video.frames / 64 clips = 16 is for all 5 ranks"):
        Ranks(0, 5).share(options.update(options.load("tiny"), {"kind": "video", "learn.encoder_rows": 10}))
    spans = [Ranks(rank, 3).span(7) for rank in range(3)]
    assert [*spans[0], *spans[1], *spans[2]] == list(range(7))
