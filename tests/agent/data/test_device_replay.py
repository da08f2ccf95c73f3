"""A replay in tensors: its clips are pieces of what happened."""

import numpy as np
import pytest
import torch

from longdream.agent.data.device_replay import DeviceReplay, DeviceRow
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

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
@pytest.mark.parametrize(("starts", "priority"), [(0, 0), (1, 0), (0, 1), (0.3, 0.3)])
def test_clips_are_pieces_of_what_happened(times: int, rows: int, length: int, starts: float, priority: float) -> None:
    replay = filled(times, rows)
    held = min(times, rows)
    assert len(replay) == held * STREAMS and replay.longest_clip == times
    assert replay.can_sample(length) and not replay.can_sample(held + 1)
    drawn = replay.sample(np.random.default_rng(0), 400, length, starts, priority)
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
    if not starts and not priority:
        assert len(began) == possible * STREAMS  # every clip there is
    exist = any((s + t) % 5 == 0 for s in range(STREAMS) for t in range(rows - held, rows - length + 1))
    if starts == 1 and exist:
        assert drawn["is_first"][:, 0].all()
    if priority == 1:  # a row of stream 2 is some ten times likelier to be the anchor than one of stream 0
        assert (stream[:, 0] == 2).float().mean() > 0.5


def test_draws_by_surprise_are_in_proportion() -> None:
    replay = filled(8, 8)
    drawn = replay.sample(np.random.default_rng(1), 20_000, 1, 0.0, 1.0)
    mass = torch.tensor([[100.0 * s + t for t in range(8)] for s in range(STREAMS)])
    number = drawn["reward"].long()[:, 0]
    counts = torch.zeros(STREAMS, 8).index_put_((number // 100, number % 100), torch.ones(20_000), accumulate=True)
    torch.testing.assert_close(counts / 20_000, mass / mass.sum(), atol=0.01, rtol=0)


def test_draws_around_rewards_know_no_others() -> None:
    replay = filled(8, 8)
    replay.priority = "reward"
    replay.fields["reward"][:] = 0
    replay.fields["reward"][[2, 5], [0, 1]] = torch.tensor([1.0, -3.0])
    drawn = replay.sample(np.random.default_rng(1), 2000, 3, 0.0, 1.0)["reward"]
    assert (drawn != 0).any(1).all()
    assert abs((drawn == 1).any(1).float().mean() - 0.5) < 0.05


def test_too_little_room_is_refused() -> None:
    with pytest.raises(UserError, match="less than a row"):
        DeviceReplay(torch.device("cpu"), SPEC, 8, 7)
