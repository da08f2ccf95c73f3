"""The measurements of dreams: what they return is consistent, and what they learn from is what they say."""

import json
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from longdream.agent.bench.agents import dream, temperature
from longdream.agent.data.replay import Replay
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.dream_env.starts import initial_moments, open_replay
from longdream.agent.run.folder import load_agent
from longdream.envs.contract import UserError


@pytest.mark.parametrize("observation", ["feature", "image"])
def test_the_parts_of_a_dreamt_step_add_up(observation: str) -> None:
    result = json.loads(json.dumps(dream.measure("tiny", (1, 9), observation, seconds=0.2, rounds=2, device="cpu")))
    assert [row["copies"] for row in result["rows"]] == [1, 9]
    for row in result["rows"]:
        assert row["device"] == "cpu" and row["observation"] == observation
        assert row["steps_per_s"] == pytest.approx(1e3 * row["copies"] / row["ms_per_step"], rel=1e-2)
        assert sum(row["share"].values()) == pytest.approx(1) and row["share"]["model"] > 0
        assert (row["share"]["decoder"] > 0) == (observation == "image")
        assert row["overhead_share"] == pytest.approx(row["share"]["environment"] / row["share"]["model"])
        if observation == "feature":
            own = max(0, row["ms_per_step"] - row["waited_ms"])
            assert row["waited_share"] == pytest.approx(own / row["waited_ms"], abs=0.01)


def test_dreams_that_are_measured_end_at_their_horizon() -> None:
    agent, moments = dream._asleep("tiny", "cpu")
    env = DreamVecEnv(200, agent, start=moments)
    env.reset(seed=0)
    ends = [env.step(np.zeros(200, int))[2:4] for _ in range(3)]
    assert not any(terminated.any() for terminated, _ in ends) and [cut.all() for _, cut in ends] == [0, 0, 1]


@pytest.mark.parametrize("updates", [0, 3])
def test_scores_over_temperatures(dream_runs: Callable, updates: int, tmp_path: Path) -> None:
    asked = {"temperatures": (0.5, 2.0), "updates": updates, "episodes": 6, "out": tmp_path / "new" / "t.png"}
    result = json.loads(json.dumps(temperature.measure(dream_runs("images"), **asked)))
    assert [row["temperature"] for row in result["rows"]] == [0.5, 2.0]
    for row in result["rows"]:
        for name in ("dream", "real"):
            low, high = row[f"{name}_ci95"]
            assert low <= row[f"{name}_mean"] <= high
        assert 1 <= row["dream_length"] <= result["horizon"] and 1 <= row["real_length"] <= 20
        assert 0 <= row["real_mean"] <= 1
    if not updates:  # one C: the same real episodes each time
        assert result["rows"][0]["real_mean"] == result["rows"][1]["real_mean"]
    assert iio.imread(result["picture"]).shape[-1] in (3, 4)
    assert {**result, "picture": "", "rows": []} == {
        "run": str(dream_runs("images")),
        "env": "longdream/Recall-v0",
        "updates": updates,
        "denoising_steps": 4,
        "episodes": 6,
        "horizon": result["horizon"],
        "seed": 0,
        "picture": "",
        "rows": [],
    }


def test_a_new_controller_learns_and_the_world_model_stays(dream_runs: Callable) -> None:
    agent, run = load_agent(dream_runs("images"))
    replay = open_replay(run)
    one, same, hotter = (temperature.learned(agent, replay, t, 2, 2, seed=1) for t in (1.0, 1.0, 3.0))
    for key, value in agent.model.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[key], value, rtol=0, atol=0)
    weights = [torch.cat([p.flatten() for p in a.optimizers["controller"].parameters]) for a in (one, same, hotter)]
    begun = temperature.learned(agent, replay, 1.0, 2, 0, seed=1)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in begun.optimizers["controller"].parameters]))


def test_a_dream_score_is_the_mean_of_whole_dreams(dream_runs: Callable) -> None:
    agent, run = load_agent(dream_runs("images"))
    moments = initial_moments(agent, open_replay(run), 8)
    result = temperature.dream_returns(agent, moments, 12, 1.0, 1, 5, seed=3)
    env = DreamVecEnv(12, agent, "feature", 1.0, 1, 5, moments)
    feat, _ = env.reset(seed=3)
    total, over, length = np.zeros(12), np.zeros(12, bool), []
    for _ in range(5):
        choice = agent.controller.act(torch.from_numpy(feat), greedy=True).argmax(-1).numpy()
        feat, reward, terminated, truncated, _ = env.step(choice)
        total[~over] += reward[~over]
        length.append((~over).sum())
        over |= terminated | truncated
    assert over.all() and result.episodes == 12
    assert result.return_mean == pytest.approx(total.mean()) and result.length_mean == sum(length) / 12


def test_the_longest_episode_is_counted_in_steps(dream_runs: Callable) -> None:
    _, run = load_agent(dream_runs("mixed"))  # its episodes have 7 steps
    replay = open_replay(run)
    assert isinstance(replay, Replay) and replay.longest_episode() == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperatures": (1.0, 0.0)},
        {"temperatures": ()},
        {"episodes": 0},
        {"updates": -1},
        {"steps": 0},
        {"horizon": 0},
    ],
)
def test_scores_that_cannot_be_taken_are_refused(dream_runs: Callable, wrong: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        temperature.measure(dream_runs("images"), **wrong)


def test_speeds_that_cannot_be_measured_are_refused() -> None:
    for wrong in ({"copies": (0,)}, {"copies": ()}, {"seconds": 0.0}, {"rounds": 0}):
        with pytest.raises(UserError, match="must be more than 0"):
            dream.measure("tiny", **wrong)
