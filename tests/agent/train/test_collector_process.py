"""Collecting in a process beside learning: the same ratio, new weights without a stop, nothing lost, nothing left."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longdream.agent.bench.agents import loop
from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent, Stage
from longdream.agent.data.replay import Replay
from longdream.agent.run import folder as run_folder
from longdream.agent.run.signals import Interrupted
from longdream.agent.train import collecting, collector_process, trainer
from longdream.agent.train.collector_process import AHEAD, AsyncCollector
from longdream.agent.train.trainer import OnlineTrainer
from longdream.agent.train.weights import SharedWeights
from longdream.envs.contract import EnvError, Row
from longdream.envs.make import World

PLAIN = '''
import gymnasium as gym
import numpy as np


class Plain(gym.Env):
    """Episodes of ten steps, whose observation is their number; the reward is the action."""

    observation_space = gym.spaces.Box(0, 10, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.full(1, self.time, np.float32), float(action), False, self.time >= 10, {}


gym.register("Plain-v0", entry_point="plain:Plain")
'''
FAULTY_CONTROLLER = """
import multiprocessing

from longdream.controller.actor_critic import ActorCritic


class Faulty(ActorCritic):
    def act(self, feat, greedy):
        if multiprocessing.parent_process() is not None:
            raise ZeroDivisionError("a bug of the controller")
        return super().act(feat, greedy)
"""
SETTINGS: dict[str, Any] = {
    "env.id": "plain:Plain-v0", "env.kwargs": {}, "env.copies": 2, "env.timeout_s": 30.0, "learn.steps": 160,
    "learn.prefill": 40, "learn.explore": 0.0, "evaluate.every": 0, "evaluate.final_episodes": 2,
    "replay.capacity": 4000,
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment above, importable as a user's own is: from the current folder."""
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "faulty_controller.py").write_text(FAULTY_CONTROLLER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "plain", raising=False)


def config(workers: str = "beside", **settings: Any) -> Config:
    given = SETTINGS | {"env.workers": workers} | {key.replace("__", "."): v for key, v in settings.items()}
    return options.update(options.load("tiny"), given)


@pytest.fixture
def opened() -> Iterator[Callable[[Config], tuple[OnlineTrainer, AsyncCollector]]]:
    """Opens a trainer at its beginning."""
    with ExitStack() as stack:

        def opens(wanted: Config) -> tuple[OnlineTrainer, AsyncCollector]:
            run = stack.enter_context(loop.opened(wanted))
            assert isinstance(run.collector, AsyncCollector)
            return run, run.collector

        yield opens


def processes(pid: int) -> set[int]:
    """The processes that this one has started, directly or not, and that run."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            parents.setdefault(int(parent), []).append(int(path.name))
    found = set()
    rest = [pid]
    while rest:
        children = parents.get(rest.pop(), [])
        found |= {*children}
        rest += children
    return found


def wait_until_gone(pids: set[int]) -> None:
    """Within the time of a test."""
    while any(is_running(pid) for pid in pids):
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def collecting_process() -> int:
    (pid,) = [child.pid for child in multiprocessing.active_children() if child.name == "longdream-collector"]
    return pid


# -- learning ---------------------------------------------------------------------------------------------------------


def test_as_much_is_learned_per_step_as_without(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pids: set[int] = set()

    class Noting(Agent):
        def update(self, batch: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> dict:
            for child in multiprocessing.active_children():
                pids.update({child.pid} | processes(child.pid))
            return super().update(batch, stage, rate_scale)

    monkeypatch.setattr(trainer, "Agent", Noting)
    path = Path("plain.yaml")
    path.write_text(options.dump(config("sync")))
    for name, flags in (("sync", []), ("beside", ["--collect.async"])):
        assert cli.main(["train", str(path), "--name", name, *flags]) == 0
    assert "bit for bit" in capfd.readouterr().err
    counts: dict[str, dict[int, int]] = {}
    for name in ("sync", "beside"):
        lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        counts[name] = {line["step"]: line["count/updates"] for line in lines if "count/updates" in line}
        assert ("collect/stale" in lines[-2]) == (name == "beside")
    assert counts["beside"] == counts["sync"] and len(counts["sync"]) > 2
    assert run_folder.open_run("runs/beside").config.env.workers == "beside"
    assert len(pids) >= 4  # the process, two copies, and what starts these
    wait_until_gone(pids)


def test_the_policy_is_at_most_so_stale(opened: Any) -> None:
    """Two updates are due per step of all copies."""
    run, collector = opened(config(learn__train_ratio=32, evaluate__log_every=1000))
    while run.count["updates"] < 80:
        run.turn()
    assert len(collector.stale) >= 40 - AHEAD
    # one turn is for weights that could not be handed over as they were just being read
    assert min(collector.stale) >= 0 and max(collector.stale) <= 2 * AHEAD
    assert collector.ordered == AHEAD - 1


def test_the_process_acts_with_what_was_learned(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """C is made to prefer one action, then the other: so do the actions that come back."""
    actions: list[np.ndarray] = []

    class Noting(Replay):
        def add(self, row: Row, action: np.ndarray, surprise: np.ndarray) -> None:
            actions.append(action.argmax(-1))
            super().add(row, action, surprise)

    monkeypatch.setattr(collecting, "Replay", Noting)
    run, collector = opened(config())
    last = [module for module in run.agent.controller.actor.modules() if isinstance(module, torch.nn.Linear)][-1]
    for step, preferred in enumerate((1, 0, 1)):
        with torch.no_grad():
            last.bias.copy_(torch.eye(2)[preferred] * 50)
        run.agent.updates += 1
        for _ in range(AHEAD + 20):
            collector.step(random=False)
        assert np.mean(actions[-20:]) == pytest.approx(preferred, abs=0.1)
        assert collector.stale[-1] == 0 and len(collector.stale) == (step + 1) * (AHEAD + 20)


def test_nothing_is_lost_when_a_run_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[np.ndarray] = []

    class Noting(Replay):
        def add(self, row: Row, action: np.ndarray, surprise: np.ndarray) -> None:
            rows.append(row.obs["obs"][:, 0])
            super().add(row, action, surprise)

    class Stopping(Agent):
        def update(self, batch: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> dict:
            if self.updates in (12, 20):
                signal.raise_signal(signal.SIGTERM)
            return super().update(batch, stage, rate_scale)

    monkeypatch.setattr(collecting, "Replay", Noting)
    monkeypatch.setattr(trainer, "Agent", Stopping)
    folder = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(Interrupted):
            OnlineTrainer.train(config(), folder, resume=resume, console=False)
    saved = run_folder.open_run(folder).saved[0]
    # what is finished and was not learned from yet is part of the checkpoint
    assert len(saved["collector"]["finished"]) == AHEAD - 1
    monkeypatch.setattr(trainer, "Agent", Agent)
    summary = OnlineTrainer.train(config(), folder, resume=True, console=False)
    assert 160 <= summary["env_steps"] < 162
    times = np.array(rows)
    assert (times[1:] == (times[:-1] + 1) % 11).all() and len(times) == 87
    assert (folder / "summary.json").exists() and multiprocessing.active_children() == []


def test_a_checkpoint_with_steps_that_are_none_is_refused(opened: Any) -> None:
    _, collector = opened(config())
    for _ in range(3):
        collector.step(random=True)
    state = collector.get_state()
    assert len(state["finished"]) == AHEAD - 1
    step = state["finished"][0]
    for wrong in ({"surprise": np.zeros(3, np.float32)}, {"outcome": {**step["outcome"], "steps": "many"}}):
        with pytest.raises(ValueError, match="finished"):
            collector.set_state(state | {"finished": [step | wrong]})
    collector.set_state(state)  # it is still there
    collector.step(random=True)


# -- faults -----------------------------------------------------------------------------------------------------------


def test_the_process_is_killed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pids: set[int] = set()

    class Killing(Agent):
        def update(self, batch: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> dict:
            if self.updates == 12:
                pids.update(processes(collecting_process()))
                os.kill(collecting_process(), signal.SIGKILL)
            return super().update(batch, stage, rate_scale)

    monkeypatch.setattr(trainer, "Agent", Killing)
    Path("plain.yaml").write_text(options.dump(config()))
    assert cli.main(["train", "plain.yaml", "--name", "run"]) == 1
    err = capfd.readouterr().err
    message = [line for line in err.splitlines() if line.startswith("longdream: ")]
    assert message == ["longdream: the collecting process of plain:Plain-v0 died (exit code -9)"]
    assert "Traceback" not in err and "go on with: longdream train --resume runs/run" in err
    tree, step = run_folder.open_run("runs/run").saved
    assert step >= 40 and tree["counters"]["updates"] >= 12 and tree["collector"] is None
    assert len(pids) >= 2
    wait_until_gone(pids)
    monkeypatch.setattr(trainer, "Agent", Agent)
    assert cli.main(["train", "--resume", "runs/run"]) == 0


def test_the_process_hangs(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, collector = opened(config())
    run.turn()
    monkeypatch.setattr(collector_process, "OWN_S", 0.5)
    run.world.timeout_s = 0.5
    pids = {collecting_process()} | processes(collecting_process())
    os.kill(collecting_process(), signal.SIGSTOP)
    with pytest.raises(EnvError, match="Plain-v0 gave no answer within 1 s"):
        for _ in range(AHEAD + 1):
            collector.step(random=True)
    wait_until_gone(pids)


def test_a_bug_beside_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    Path("plain.yaml").write_text(options.dump(config(controller__kind="faulty_controller:Faulty")))
    assert cli.main(["train", "plain.yaml", "--name", "run"]) == 1
    err = capfd.readouterr().err
    assert "longdream: ZeroDivisionError: a bug of the controller" in err
    assert err.count('raise ZeroDivisionError("a bug of the controller")') == 1
    assert multiprocessing.active_children() == []


def test_what_cannot_be_made_leaves_no_folder(capfd: pytest.CaptureFixture[str]) -> None:
    Path("plain.yaml").write_text(options.dump(config(env__kwargs={"nonsense": 3})))
    assert cli.main(["train", "plain.yaml", "--name", "run"]) == 2
    err = capfd.readouterr().err
    assert "plain:Plain-v0 cannot be made with nonsense=3" in err and "Traceback" not in err
    assert not Path("runs/run").exists()


def test_nothing_runs_on_when_the_program_is_killed(tmp_path: Path) -> None:
    Path("plain.yaml").write_text(options.dump(config(learn__steps=100_000)))
    command = [sys.executable, "-m", "longdream", "train", "plain.yaml", "--name", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "rows/s" not in (line := process.stderr.readline()):
        assert line
    pids = processes(process.pid)
    assert len(pids) >= 4  # the process, two copies, and what starts these
    process.kill()
    process.wait()
    wait_until_gone(pids)


# -- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--replay.keep", "device"], "an environment that makes tensors needs no process"),
        (["--controller.kind", "stable_baselines3:PPO"], "use --env.workers async"),
    ],
)
def test_refused(flags: list[str], problem: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("plain.yaml").write_text(options.dump(config("sync")))
    assert cli.main(["train", "plain.yaml", "--name", "run", "--collect.async", *flags]) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("longdream: ")]
    assert len(lines) == 1 and problem in lines[0] and "--collect.async" in lines[0]
    assert not Path("runs/run").exists()


def test_the_flag_takes_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "tiny", "--collect.async=yes"]) == 2
    assert "--collect.async takes no value" in capsys.readouterr().err
    assert cli.main(["train", "tiny", "--collect.asynk"]) == 2
    assert "did you mean --collect.async" in capsys.readouterr().err


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[SharedWeights, SharedWeights]]:
    """The weights of one agent, and those of another that is to have the same."""
    wanted = options.load("tiny")
    world = World(wanted.env.id, 1, 0, wanted.env.kwargs)
    first = SharedWeights(Agent(wanted, world.spec))
    yield first, SharedWeights(Agent(wanted, world.spec), os.dup(first.file))
    world.close()


def same(one: SharedWeights, other: SharedWeights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.actor.tensors(), other.actor.tensors(), strict=True))


@torch.no_grad()
def changed(weights: SharedWeights) -> None:
    for tensor in weights.actor.tensors():
        tensor.copy_(tensor == 0)


def test_weights_come_over_whole(pair: tuple[SharedWeights, SharedWeights]) -> None:
    ours, theirs = pair
    assert not same(ours, theirs)
    assert {tensor.dtype for tensor in ours.actor.tensors()} > {torch.float32}
    ours.publish(0)
    assert theirs.take() == 0 and same(ours, theirs)
    changed(ours)
    ours.publish(0)  # not under another number
    assert theirs.take() == 0 and not same(ours, theirs)
    ours.publish(7)
    assert theirs.take() == 7 and same(ours, theirs)


LOCK = "import fcntl, sys; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


def test_who_reads_is_not_waited_for_and_may_die(pair: tuple[SharedWeights, SharedWeights]) -> None:
    ours, theirs = pair
    ours.publish(0)
    command = [sys.executable, "-c", LOCK, str(ours.file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, pass_fds=[ours.file], **pipes) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        ours.publish(1)
        assert theirs.version[0] == 0
        reader.kill()
    ours.publish(1)  # what was on its way
    assert theirs.take() == 1


@pytest.mark.cuda
def test_weights_come_from_a_gpu_a_call_later() -> None:
    wanted = options.update(options.load("tiny"), {"device": "cuda"})
    world = World(wanted.env.id, 1, 0, wanted.env.kwargs)
    ours = SharedWeights(Agent(wanted, world.spec))
    theirs = SharedWeights(Agent(wanted, world.spec), os.dup(ours.file))
    ours.publish(0)
    assert theirs.take() == 0 and same(ours, theirs)
    changed(ours)
    ours.publish(3)
    torch.cuda.synchronize()
    ours.publish(3)
    assert theirs.take() == 3 and same(ours, theirs)
    world.close()
