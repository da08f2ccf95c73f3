"""Collecting and replay in tensors: the same rows as on the host, clips that are pieces of what happened, resume."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent, Upto
from longdream.agent.data.device_replay import DeviceCollector, DeviceReplay, DeviceRow
from longdream.agent.run.signals import Interrupted
from longdream.agent.train import online as loop
from longdream.agent.train.online import train
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError
from longdream.envs.make import World

SPEC = EnvSpec(
    {"frame": ObsSpec("image", (2, 2, 1)), "place": ObsSpec("vector", (3,))},
    ActionSpec((3,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"}),
)
STREAMS = 3


def filled(times: int, rows: int) -> DeviceReplay:
    """Row t of stream s says so in every field; episodes of 5 rows, later by one in every stream."""
    replay = DeviceReplay(torch.device("cpu"), SPEC, STREAMS, times * STREAMS + 1)
    assert replay.times == times
    for t in range(rows):
        number = 100.0 * torch.arange(STREAMS) + t
        first = (torch.arange(STREAMS) + t) % 5 == 0
        obs = {
            "frame": (number % 251).to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 1),
            "place": number[:, None].expand(-1, 3),
        }
        row = DeviceRow(obs, first, number, first.roll(1), first.roll(2))
        action = torch.eye(3)[(torch.arange(STREAMS) + t) % 3]
        replay.add(row, action, number, first.numpy())
    return replay


@pytest.mark.parametrize(("times", "rows", "length"), [(7, 5, 5), (7, 7, 3), (7, 23, 7), (13, 40, 4), (11, 11, 1)])
@pytest.mark.parametrize(("starts", "weight"), [(0, 0), (1, 0), (0, 1), (0.3, 0.3)])
def test_clips_are_pieces_of_what_happened(times: int, rows: int, length: int, starts: float, weight: float) -> None:
    replay = filled(times, rows)
    held = min(times, rows)
    assert len(replay) == held * STREAMS and replay.longest_clip == times
    assert replay.can_sample(length) and not replay.can_sample(held + 1)
    drawn = replay.sample(np.random.default_rng(0), 400, length, starts, weight)
    number = drawn["reward"].long()
    assert number.shape == (400, length)
    stream, time = number // 100, number % 100
    assert (stream == stream[:, :1]).all() and (time == time[:, :1] + torch.arange(length)).all()
    assert time.min() >= rows - held and time.max() < rows and (starts == 1 or time.max() == rows - 1)
    assert torch.equal(drawn["obs"]["frame"][..., 0, 0, 0].long(), number % 251)
    assert torch.equal(drawn["obs"]["place"], number[..., None].expand(-1, -1, 3).float())
    assert torch.equal(drawn["is_first"], (stream + time) % 5 == 0)
    assert torch.equal(drawn["action"].argmax(-1), (stream + time) % 3) and drawn["action"].dtype == torch.float32
    assert torch.equal(drawn["surprise"], number.float())
    possible = held - length + 1
    began = {(int(s), int(t)) for s, t in zip(stream[:, 0], time[:, 0], strict=True)}
    if not starts and not weight:
        assert len(began) == possible * STREAMS  # every clip there is
    exist = any((s + t) % 5 == 0 for s in range(STREAMS) for t in range(rows - held, rows - length + 1))
    if starts == 1 and exist:
        assert drawn["is_first"][:, 0].all()
    if weight == 1:  # a row of stream 2 is some ten times likelier to be the anchor than one of stream 0
        assert (stream[:, 0] == 2).float().mean() > 0.5


def test_draws_by_surprise_are_in_proportion() -> None:
    replay = filled(8, 8)
    drawn = replay.sample(np.random.default_rng(1), 20_000, 1, 0.0, 1.0)
    mass = torch.tensor([[100.0 * s + t for t in range(8)] for s in range(STREAMS)])
    number = drawn["reward"].long()[:, 0]
    found = torch.zeros(STREAMS, 8).index_put_((number // 100, number % 100), torch.ones(20_000), accumulate=True)
    torch.testing.assert_close(found / 20_000, mass / mass.sum(), atol=0.01, rtol=0)


def test_draws_around_rewards_know_no_others() -> None:
    replay = filled(8, 8)
    replay.around = "reward"
    replay.fields["reward"][:] = 0
    replay.fields["reward"][[2, 5], [0, 1]] = torch.tensor([1.0, -3.0])
    drawn = replay.sample(np.random.default_rng(1), 2000, 3, 0.0, 1.0)["reward"]
    assert (drawn != 0).any(1).all()
    assert abs((drawn == 1).any(1).float().mean() - 0.5) < 0.05


def maze(**settings: Any) -> Config:
    """Preset tiny on the twin of Memory Maze."""
    told = {
        "env.id": "longdream/FastMemoryMaze-9x9-v0", "env.kwargs": {}, "env.copies": 3, "replay.keep": "device",
        "replay.capacity": 300, "learn.steps": 260, "learn.prefill": 60, "learn.ratio": 4, "device": "cpu",
        "evaluate.every": 0, "evaluate.final_episodes": 1, "evaluate.copies": 1,
    }  # fmt: skip
    return options.update(options.load("tiny"), told | {key.replace("__", "."): v for key, v in settings.items()})


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
    again = (action[1:] == action[:-1]).float().mean().item()
    assert again == pytest.approx(sticky + (1 - sticky) / 6, abs=0.1)  # 177 pairs
    world.close()


def test_a_run_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay is collected anew, without updates on the little there is at first; steps and episodes go on."""
    updates: list[int] = []
    held: list[int] = []

    class Told(Agent):
        def update(self, rows: dict, upto: Upto = "controller", pace: float = 1.0) -> dict:
            updates.append(self.updates)
            if len(updates) == 15:
                signal.raise_signal(signal.SIGTERM)
            return super().update(rows, upto, pace)

    class Counted(DeviceReplay):
        def sample(self, *args: Any) -> dict[str, Any]:
            held.append(len(self))
            return super().sample(*args)

    monkeypatch.setattr(loop, "Agent", Told)
    monkeypatch.setattr(loop, "DeviceReplay", Counted)
    with pytest.raises(Interrupted):
        train(maze(), tmp_path / "run", console=False)
    stopped = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    before = len(held)
    assert before == 15 and stopped < 260
    summary = train(maze(), tmp_path / "run", resume=True, console=False)
    assert summary["env_steps"] >= 260 and summary["env"] == "longdream/FastMemoryMaze-9x9-v0"
    length = maze().replay.length
    assert length * 3 < held[before] <= length * 3 + 3 * 4  # soon after a clip exists, at the replay ratio
    assert held[before + 1] > held[before]  # no burst to make up for the steps in between
    assert updates[14:16] == [14, 15] and updates == sorted(updates)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"makes no tensors.*replay\.keep = disk"):
        train(maze(env__id="longdream/Recall-v0"), tmp_path / "recall", console=False)
    with pytest.raises(UserError, match="less than a row"):
        DeviceReplay(torch.device("cpu"), SPEC, 8, 7)
