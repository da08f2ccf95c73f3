"""Collecting in tensors: the same rows as on the host, and a run that stops and goes on."""

import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent, Stage
from longdream.agent.data.device_replay import DeviceReplay
from longdream.agent.run.signals import Interrupted, Signals
from longdream.agent.train import collecting as collecting_module
from longdream.agent.train import trainer
from longdream.agent.train.device_collector import DeviceCollector
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import UserError
from longdream.envs.make import World, vector_takes


def maze(**settings: Any) -> Config:
    """Preset tiny on the fast Memory Maze."""
    fast = {
        "env.id": "longdream/FastMemoryMaze-9x9-v0", "env.kwargs": {}, "env.copies": 3, "replay.keep": "device",
        "replay.capacity": 300, "learn.steps": 260, "learn.prefill": 60, "learn.train_ratio": 4, "device": "cpu",
        "evaluate.every": 0, "evaluate.final_episodes": 1, "evaluate.copies": 1,
    }  # fmt: skip
    return options.update(options.load("tiny"), fast | {key.replace("__", "."): v for key, v in settings.items()})


def collecting(config: Config) -> tuple[World, DeviceReplay, DeviceCollector]:
    world = World(config.env.id, 3, 7)
    agent = Agent(config, world.spec)
    replay = DeviceReplay(agent.device, world.spec, 3, 300)
    return world, replay, DeviceCollector(world, agent, replay, np.random.default_rng(0), seed=7)


def test_rows_are_those_of_the_world() -> None:
    """What the collector puts into replay is what the same copies give, row by row, through numpy."""
    config = maze(learn__explore=0.5)
    world, replay, collector = collecting(config)
    for _ in range(30):
        collector.step(random=False)
    other = World(config.env.id, 3, 7)
    row = other.reset()
    assert collector.env_steps == 90
    for t in range(30):
        for key in ("is_first", "reward", "terminated", "truncated"):
            np.testing.assert_array_equal(replay.fields[key][t].numpy(), getattr(row, key), err_msg=key)
        np.testing.assert_array_equal(replay.fields["obs/obs"][t].numpy(), row.obs["obs"])
        assert (replay.fields["surprise"][t].numpy() > 0).tolist() == (~row.is_first).tolist()
        row = other.step(replay.fields["action"][t].float().numpy())
    world.close()
    other.close()


@pytest.mark.parametrize("sticky", [0.0, 0.9])
def test_random_actions_stick(sticky: float) -> None:
    config = maze(learn__sticky=sticky)
    world, replay, collector = collecting(config)
    for _ in range(60):
        collector.step(random=True)
    action = replay.fields["action"][:60].float().argmax(-1)
    again = (action[1:] == action[:-1]).float().mean(0).numpy()
    share = sticky * (np.arange(len(again)) + 0.5) / len(again)
    assert again == pytest.approx(share + (1 - share) / 6, abs=0.2)  # of 59 pairs each
    world.close()


def test_a_run_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay is collected anew, without updates on the little there is at first; steps and episodes go on."""
    updates: list[int] = []
    held: list[int] = []

    class Noting(Agent):
        def update(self, rows: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> dict:
            updates.append(self.updates)
            if len(updates) == 15:
                signal.raise_signal(signal.SIGTERM)
            return super().update(rows, stage, rate_scale)

    class Counted(DeviceReplay):
        def sample(self, *args: Any) -> dict[str, Any]:
            held.append(len(self))
            return super().sample(*args)

    monkeypatch.setattr(trainer, "Agent", Noting)
    monkeypatch.setattr(collecting_module, "DeviceReplay", Counted)
    with pytest.raises(Interrupted):
        OnlineTrainer.train(maze(), tmp_path / "run", console=False)
    stopped = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    before = len(held)
    assert before == 15 and stopped < 260
    summary = OnlineTrainer.train(maze(), tmp_path / "run", resume=True, console=False)
    assert summary["env_steps"] >= 260 and summary["env"] == "longdream/FastMemoryMaze-9x9-v0"
    length = maze().replay.length
    assert length * 3 < held[before] <= length * 3 + 3 * 4  # soon after a clip exists, at the replay ratio
    assert held[before + 1] > held[before]  # no burst to make up for the steps in between
    assert updates[14:16] == [14, 15] and updates == sorted(updates)


def test_an_environment_that_makes_no_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"makes no tensors.*replay\.keep = disk"):
        OnlineTrainer.train(maze(env__id="longdream/Recall-v0"), tmp_path / "recall", console=False)


def test_copies_begin_at_different_ages(tmp_path: Path) -> None:
    """In training; in evaluations episodes are whole."""
    config = maze()
    with ExitStack() as stack:
        trainer = OnlineTrainer(config, tmp_path / "run", None, stack.enter_context(Signals()), stack)
        vector: Any = trainer.world.vector
        assert len(set(vector.steps.tolist())) == 3
    assert "stagger" not in config.evaluation_env.kwargs
    assert vector_takes(config.env.id, "stagger") and not vector_takes(config.env.id, "staggered")
    assert not vector_takes("longdream/Recall-v0", "stagger")
