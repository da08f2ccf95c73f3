"""A replay in tensors: its clips are pieces of what happened, drawn with the probabilities of `Replay.sample`."""

from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from longdream.agent.data.device_replay import DeviceReplay, DeviceRow, WeightedRows
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

SPEC = EnvSpec(
    {"frame": ObsSpec("image", (2, 2, 1)), "place": ObsSpec("vector", (3,))},
    ActionSpec((3,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"}),
)


def filled(
    times: int,
    first: Tensor,
    reward: Tensor,
    surprise: Tensor,
    priority: Literal["surprise", "reward"] = "surprise",
    device: str = "cpu",
) -> DeviceReplay:
    """A replay after row t of stream s was added for each (t, s) of the tensors. Its observation is 100 * s + t."""
    streams = first.shape[1]
    replay = DeviceReplay(torch.device(device), SPEC, streams, times * streams + streams - 1, priority)
    assert replay.times == times
    for t in range(len(first)):
        number = 100.0 * torch.arange(streams) + t
        obs = {
            "frame": (number % 251).to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 1).to(device),
            "place": number[:, None].expand(-1, 3).to(device),
        }
        flag = first[t].to(device)
        row = DeviceRow(obs, flag, reward[t].to(device), flag.roll(1), flag.roll(2))
        action = torch.eye(3)[(torch.arange(streams) + t) % 3].to(device)
        replay.add(row, action, surprise[t].to(device))
    return replay


def happened(rows: int, streams: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flags is_first, rewards and surprises (rows, streams), all whole numbers. They differ much from row to row."""
    rng = torch.Generator().manual_seed(rows)
    first = torch.rand(rows, streams, generator=rng) < 0.3
    reward = torch.where(torch.rand(rows, streams, generator=rng) < 0.2, -1.0, 0.0)
    surprise = torch.randint(-3, 6, (rows, streams), generator=rng).float() ** 3
    return first, reward, surprise


def probabilities(
    times: int, first: Tensor, priority: Tensor, length: int, starts: float, by_priority: float
) -> np.ndarray:
    """The slow reference: how probable it is that a clip is of stream s and begins in row t, (rows, streams).

    first and priority are (rows, streams), over all rows ever added."""
    rows, streams = first.shape
    oldest = max(0, rows - times)
    begins = range(oldest, rows - length + 1)
    anywhere = Fraction(1, len(begins) * streams)
    start_rows = [(t, s) for t in begins for s in range(streams) if first[t, s]]
    weights = {(t, s): max(0, int(priority[t, s])) for t in range(oldest, rows) for s in range(streams)}
    total = sum(weights.values())
    out = np.zeros((rows, streams))
    for t in begins:
        for s in range(streams):
            out[t, s] += float(anywhere) * (1 - starts - by_priority)
            out[t, s] += starts * float(Fraction((t, s) in start_rows, len(start_rows)) if start_rows else anywhere)
            if not total:
                out[t, s] += by_priority * float(anywhere)
    for (anchor, s), weight in weights.items():
        around = [t for t in begins if t <= anchor < t + length]
        for t in around if total else []:
            out[t, s] += by_priority * weight / total / len(around)
    return out


def contiguous(drawn: dict[str, Any], first: Tensor, reward: Tensor, surprise: Tensor) -> tuple[Tensor, Tensor]:
    """Check that each clip is a piece of what happened. Returns the first row and the stream of each, (B,)."""
    number = drawn["obs"]["place"][..., 0].long()
    stream = number // 100
    time = number % 100
    assert (stream == stream[:, :1]).all()
    assert (time == time[:, :1] + torch.arange(time.shape[1])).all()
    assert torch.equal(drawn["obs"]["place"], number[..., None].expand(-1, -1, 3).float())
    assert torch.equal(drawn["obs"]["frame"][..., 0, 0, 0].long(), number % 251)
    assert torch.equal(drawn["is_first"], first[time, stream])
    assert torch.equal(drawn["terminated"], first.roll(1, 1)[time, stream])
    assert torch.equal(drawn["truncated"], first.roll(2, 1)[time, stream])
    assert torch.equal(drawn["reward"], reward[time, stream])
    assert torch.equal(drawn["surprise"], surprise[time, stream])
    assert torch.equal(drawn["action"].argmax(-1), (stream + time) % 3)
    assert drawn["action"].dtype == torch.float32
    return time[:, 0], stream[:, 0]


def check(replay: DeviceReplay, rows: tuple[Tensor, Tensor, Tensor], weight: Tensor, length: int, *parts: float):
    """Compare many clips with the reference, by a chi-square test and by what is impossible."""
    draws = 20_000
    drawn = replay.sample(np.random.default_rng(5), draws, length, *parts)
    assert drawn["reward"].shape == (draws, length)
    time, stream = contiguous(drawn, *rows)
    seen = np.zeros(rows[0].shape)
    np.add.at(seen, (time.numpy(), stream.numpy()), 1)
    expected = draws * probabilities(replay.times, rows[0], weight, length, *parts)
    assert expected.sum() == pytest.approx(draws)
    assert not seen[expected == 0].any()
    possible = expected > 0
    distance = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert distance < freedom + 4 * np.sqrt(2 * freedom) + 1e-9


# times, rows, length, streams: filled in part, exactly, and wrapped around, with clips from one row to all rows
SIZES = [(7, 5, 3, 3), (7, 5, 5, 1), (7, 7, 3, 3), (7, 18, 3, 3), (7, 23, 7, 2), (13, 40, 4, 5), (11, 17, 1, 3)]


@pytest.mark.parametrize(("times", "rows", "length", "streams"), SIZES)
@pytest.mark.parametrize("parts", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.4)])
@pytest.mark.parametrize("priority", ["surprise", "reward"])
def test_clips_have_the_exact_probabilities(
    times: int,
    rows: int,
    length: int,
    streams: int,
    parts: tuple[float, float],
    priority: Literal["surprise", "reward"],
) -> None:
    first, reward, surprise = happened(rows, streams)
    replay = filled(times, first, reward, surprise, priority)
    held = min(times, rows)
    assert len(replay) == held * streams and replay.longest_clip == times
    assert replay.can_sample(length) and not replay.can_sample(held + 1)
    weight = surprise if priority == "surprise" else reward != 0
    check(replay, (first, reward, surprise), weight, length, *parts)


@pytest.mark.parametrize("rows", [6, 9, 20])
def test_without_such_rows_clips_are_uniform(rows: int) -> None:
    """Rows of the past that were overwritten, and starts too late for a clip, do not count."""
    times = 9
    first = torch.zeros(rows, 3, dtype=torch.bool)
    first[-2:] = True  # a clip of three rows cannot begin there
    surprise = torch.full((rows, 3), -1.0)
    if rows > times:
        first[: rows - times] = True
        surprise[: rows - times] = 100.0
    still = torch.zeros(rows, 3)
    replay = filled(times, first, still, surprise)
    check(replay, (first, still, surprise), surprise, 3, 0.4, 0.4)


@pytest.mark.parametrize("total", [1.0, 3.0, 0.1, 1e6 / 7])
def test_rows_without_weight_are_not_chosen_at_the_ends_of_the_range(total: float) -> None:
    values = torch.zeros(5, 4)
    values[1:4, 1:3] = total / 6
    rows = WeightedRows(values, Tensor.double)
    for t in range(5):
        rows.update(t)
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    place, stream, exists = rows.choose(torch.arange(5), u, u)
    assert exists and place.tolist() == [1, 3] and stream.tolist() == [1, 2]


def test_the_number_of_random_draws_does_not_depend_on_the_rows() -> None:
    after = []
    for rows in (5, 12):
        rng = np.random.default_rng(0)
        filled(7, *happened(rows, 3)).sample(rng, 10, 2, 0.3, 0.3)
        after.append(rng.random())
    assert after[0] == after[1]


def test_a_clip_that_is_too_long_is_refused() -> None:
    replay = filled(7, *happened(4, 3))
    with pytest.raises(UserError, match=r"no clip of 5 rows.* \(a full one has clips of 7 rows\)"):
        replay.sample(np.random.default_rng(0), 2, 5)


def test_too_little_room_is_refused() -> None:
    with pytest.raises(UserError, match="less than a row"):
        DeviceReplay(torch.device("cpu"), SPEC, 8, 7)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [5, 18])
def test_cuda_draws_the_same_clips_and_does_not_wait(rows: int) -> None:
    first, reward, surprise = happened(rows, 3)
    expected = filled(7, first, reward, surprise).sample(np.random.default_rng(1), 500, 3, 0.3, 0.4)
    replay = filled(7, first, reward, surprise, device="cuda")
    number = torch.zeros(3, device="cuda")
    obs = {"frame": torch.zeros(3, 2, 2, 1, dtype=torch.uint8, device="cuda"), "place": number[:, None].expand(-1, 3)}
    flag = torch.zeros(3, dtype=torch.bool, device="cuda")
    action = torch.zeros(3, 3, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = replay.sample(np.random.default_rng(1), 500, 3, 0.3, 0.4)
        replay.add(DeviceRow(obs, flag, number, flag, flag), action, number)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for key, value in expected["obs"].items():
        assert torch.equal(drawn["obs"][key].cpu(), value)
    for key in ("action", "reward", "is_first", "terminated", "truncated", "surprise"):
        assert torch.equal(drawn[key].cpu(), expected[key]), key
