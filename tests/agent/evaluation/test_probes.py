"""Probes read from features what is in them, and nothing that is not."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from longdream.agent.cli import main as cli
from longdream.agent.cli.play import find_run
from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.data.video.library import open_library
from longdream.agent.evaluation import probes
from longdream.agent.play.source import open_source
from longdream.agent.run import folder as run_folder
from longdream.envs import World
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

SPEC = EnvSpec({"obs": ObsSpec("image", (64, 64, 3))}, ActionSpec((6,)))


def episodes(count: int, length: int = 20, size: int = 3, seed: int = 0) -> probes.Episodes:
    """Random walls and targets; each target is in view in the rows 2 and 9."""
    rng = np.random.default_rng(seed)
    seen = np.minimum(np.array([length if t < 2 else (t - 2) if t < 9 else t - 9 for t in range(length)]), length)
    return probes.Episodes(
        image=rng.integers(256, size=(count, length, 16, 16, 3)).astype(np.uint8),
        prev_action=np.eye(6, dtype=np.float32)[rng.integers(6, size=(count, length))],
        pose=rng.uniform(-1, 1, (count, length, 4)).astype(np.float32),
        walls=rng.integers(2, size=(count, size, size)).astype(np.float32),
        targets=rng.uniform(0, size, (count, 2, 2)).astype(np.float32),
        seen=np.broadcast_to(seen[:, None], (count, length, 2)),
    )


def told(some: probes.Episodes, from_row: int = 0) -> torch.Tensor:
    """Features that say everything from a row on."""
    everything = np.concatenate([some.walls.reshape(len(some.walls), -1), some.targets.reshape(len(some.walls), -1)], 1)
    features = np.repeat(everything[:, None], some.pose.shape[1], 1)
    features[:, :from_row] = 0
    return torch.from_numpy(features).half()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "HIDDEN", 96)
    monkeypatch.setattr(probes, "BATCH", 128)
    monkeypatch.setattr(probes, "RATE", 2e-3)


def test_they_read_what_is_there(small: None) -> None:
    train, test = episodes(400), episodes(30, seed=1)
    reading = probes.reading_of(probes.fit(train, told(train), 600, 0), test, told(test))
    whole = probes.score(test, reading)[-1]
    assert whole["age"] == "0-19" and whole["walls_accuracy"] > 95 and whole["objects_error"] < 0.5
    again, same = (probes.fit(train, told(train), 20, 3).state_dict() for _ in range(2))
    assert all(torch.equal(again[name], same[name]) for name in again)


def test_they_read_nothing_that_is_not_there(small: None) -> None:
    train, test = episodes(400), episodes(30, seed=1)
    blind = torch.zeros(*train.pose.shape[:2], 0), torch.zeros(*test.pose.shape[:2], 0)
    reading = probes.reading_of(probes.fit(train, blind[0], 100, 0), test, blind[1])
    constant = probes.score(test, probes.constant(train, test))[-1]
    whole = probes.score(test, reading)[-1]
    assert 40 < whole["walls_accuracy"] < 60 and abs(whole["objects_error"] - constant["objects_error"]) < 0.25
    assert constant["objects_error"] > 0.8


def test_results_are_told_by_age_and_by_steps_since_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    some = episodes(5)
    monkeypatch.setattr(probes, "AGES", (0, 5, 12, 100))
    monkeypatch.setattr(probes, "SINCE", (0, 1, 5, 1000))
    right = np.repeat(some.walls[:, None], 20, 1)
    right[:, :5] = 1 - right[:, :5]
    places = np.repeat(some.targets[:, None], 20, 1).copy()
    places[:, 12:, :, 0] += 3.0
    rows = probes.score(some, probes.Reading(right, places))
    assert [row["age"] for row in rows] == ["0-4", "5-11", "12-19", "0-19"]
    assert [row["walls_accuracy"] for row in rows] == [0, 100, 100, 75]
    assert [round(row["objects_error"], 4) for row in rows] == [0, 0, 3, 1.2]
    since = probes.score_since(some, probes.Reading(right, places))
    assert [row["since_seen"] for row in since] == ["0-0", "1-4", "5-999", "never"]
    # 0: rows 2 and 9; 1 to 4: rows 3 to 6 and 10 to 13, of which 12 and 13 are wrong; then 7, 8 and 14 to 19
    assert [round(row["objects_error"], 4) for row in since] == [0, 3 * 2 / 8, 3 * 6 / 8, 0]


def test_a_target_is_seen_ahead_and_not_through_walls() -> None:
    layout = np.ones((7, 7), np.uint8)
    layout[3, 3] = 0  # [y, x]
    targets = np.array([[6.5, 3.5], [6.5, 6.0], [0.3, 3.5]])
    position = np.array([[1.0, 3.5], [1.0, 3.5], [1.0, 3.5], [4.5, 3.5]])
    ahead = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    right = np.stack([ahead[:, 1], -ahead[:, 0]], 1)
    offset = targets - position[:, None]
    vectors = np.stack([(offset * right[:, None]).sum(-1), (offset * ahead[:, None]).sum(-1)], -1)
    seen = probes.since_seen(layout, position, targets, vectors)
    # the first is behind the wall until the last row, the second in view at once, the third behind the agent at first
    assert seen[:, 0].tolist() == [4, 4, 4, 0]
    assert seen[:, 1].tolist() == [0, 1, 2, 3]
    assert seen[:, 2].tolist()[:2] == [4, 4]


def test_features_are_those_of_acting(mazes: Path) -> None:
    library = open_library(mazes, "memory-maze", "actions")
    some = probes.read(library, library.recordings[:3], 64)
    assert some.image.shape == (3, 12, 64, 64, 3) and some.walls.sum() == 0 and some.size == 9
    assert some.prev_action.argmax(-1)[0].tolist()[1:] == [t % 6 for t in range(1, 12)]
    config = options.update(options.load("tiny"), {"device": "cpu"})
    agent = Agent(config, SPEC)
    found = probes.features(agent.model, some, "obs")
    erased = probes.features(agent.model, some, "obs", erased=True)
    carry = agent.initial(3)
    for t in range(12):
        row = _Row({"obs": some.image[:, t]}, np.full(3, t == 0))
        carry = carry._replace(action=torch.from_numpy(some.prev_action[:, t]))
        carry, _ = agent.observe(carry, row, measure=False)
        torch.testing.assert_close(found["M"][:, t].float(), carry.feat, atol=2e-3, rtol=2e-3)
    assert torch.equal(found["V"], erased["V"]) and torch.equal(found["M"][:, 0], erased["M"][:, 0])
    assert not torch.allclose(found["M"][:, 8], erased["M"][:, 8])


class _Row:
    def __init__(self, obs: dict, is_first: np.ndarray):
        self.obs = obs
        self.is_first = is_first


def test_the_bench(
    mazes: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = options.update(options.load("tiny"), {"env.id": "longdream/FastMemoryMaze-9x9-v0", "env.kwargs": {}})
    with closing(World(config.env.id, 1, 0)) as world:
        spec = world.spec
    agent = Agent(config, spec)
    run_folder.create(Path("runs/maze"), config)
    run_folder.save(Path("runs/maze"), 0, {"spec": spec.to_json(), **agent.state_dict()}, config)
    command = ["bench", "probe", "runs/maze", "--data", str(mazes), "--updates", "5", "--share", "0.34"]
    assert cli.main([*command, "--supervised", "2", "--clips", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["episodes"] == {"train": 4, "test": 2}
    assert {row["features"] for row in result["rows"]} == {"constant", "V", "M", "M erased", "supervised"}
    row = result["rows"][0]
    assert row["size"] == "9x9" and row["mixer"] == "hybrid" and row["age"] == "0-11" and row["walls_accuracy"] == 100
    assert Path(result["picture"]).stat().st_size > 5000
    played_beside_the_true_map(Path("runs/maze"))
    for arguments, error in (
        (["bench", "probe", "runs/maze"], "needs --data DIR"),
        ([*command, "--updates", "0"], "--updates 0: must be at least 1"),
        ([*command, "--share", "1"], "--share 1.0: must be between 0 and 1"),
        (["bench", "probe", "runs/nobody", "--data", str(mazes)], "there is no such run"),
    ):
        assert cli.main(arguments) == 2
        assert error in capsys.readouterr().err


def played_beside_the_true_map(folder: Path) -> None:
    """`longdream play` shows what the probe of the bench reads out of M's memory after each row; nothing of one that is
    of another M, or damaged."""
    source = open_source(str(folder), find_run(str(folder)), {}, "cpu")
    mind = source.mind
    assert mind is not None and mind.probe is not None and not [note for note in source.notes if "probe" in note]
    session = source.session()
    shown = []
    for keys in (None, ("ArrowUp",), ("ArrowLeft",)):
        if keys:
            session.settings.eyes = False
            session.step(source.keys.action(keys))
        shown.append(session.map())
        assert session.now.real and session.now.carry and shown[-1]
        truth = session.now.real.probes
        x, y = 2 * truth["agent_pos"] / 9 - 1
        pose = torch.tensor([x, y, *truth["agent_dir"]], dtype=torch.float32)
        said = mind.probe.read(session.now.carry.feat[0], pose)
        assert np.allclose(shown[-1]["read"]["walls"], 100 * said.walls[::-1], atol=0.6)
        assert np.allclose(shown[-1]["read"]["targets"], said.places, atol=1e-3)
        assert shown[-1]["true"]["walls"] == (100 * (truth["maze_layout"][::-1] == 0)).tolist()
    assert shown[0]["read"] != shown[1]["read"] and shown[0]["true"] == shown[1]["true"]
    session.close()
    whole = (folder / probes.FILE).read_bytes()
    size = mind.agent.model.feature_size
    with pytest.raises(UserError, match="reads M of step 0, not of 7: train it again"):
        probes.load(folder, size, 7)
    for blob in (whole[:-4], b"", whole.replace(b"walls.net.0.weight", b"walls.net.9.weight")):
        (folder / probes.FILE).write_bytes(blob)
        with pytest.raises(UserError, match="cannot be used"):
            probes.load(folder, size, 0)
    source = open_source(str(folder), find_run(str(folder)), {}, "cpu")
    assert source.mind and source.mind.probe is None and [note for note in source.notes if "probe.safetensors" in note]
    (folder / probes.FILE).unlink()
    assert probes.load(folder, size, 0) is None
