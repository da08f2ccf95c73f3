"""Every kind of C in the loop: it trains, is saved, goes on exactly, acts from its checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation.rollout import play_episodes
from longdream.agent.run import checkpoint
from longdream.agent.run.folder import load_agent
from longdream.agent.train.trainer import OnlineTrainer
from longdream.controller.planner import Planner
from longdream.envs.contract import UserError
from longdream.envs.make import World

KINDS: dict[str, dict[str, object]] = {
    "evolution": {"controller.kwargs": {"population": 6, "moments": 3}},
    "planner": {
        "controller.kwargs": {"candidates": 4, "elites": 2, "proposals": 2, "horizon": 2, "iterations": 1},
    },
    "cem": {
        "controller.kind": "planner",
        "controller.kwargs": {"method": "cem", "candidates": 8, "horizon": 2, "iterations": 1},
    },
    "tree": {"controller.kwargs": {"simulations": 3}},
    "stable_baselines3:PPO": {"controller.kwargs": {"copies": 4, "batch_size": 12}},
}
SHORT = {"learn.steps": 88, "evaluate.final_episodes": 2, "evaluate.every": 0, "evaluate.save_seconds": 0}


def config(kind: str, **settings: object) -> Config:
    return options.update(options.load("tiny"), SHORT | {"controller.kind": kind} | KINDS[kind] | settings)


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_trains_resumes_exactly_and_acts_from_its_checkpoint(kind: str, tmp_path: Path, monkeypatch) -> None:
    keep = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda root, step, tree: keep(root, step, tree, keep=100))
    whole, half = tmp_path / "whole", tmp_path / "half"
    summary = OnlineTrainer.train(config(kind), whole, console=False)
    assert np.isfinite(summary["return_mean"]) and summary["updates"] > 5
    shutil.copytree(whole, half)
    (half / "summary.json").unlink()
    saved = sorted((half / "checkpoints").iterdir())
    for later in saved[len(saved) // 2 :]:
        shutil.rmtree(later)
    again = OnlineTrainer.train(config(kind), half, resume=True, console=False)
    assert {k: v for k, v in again.items() if k != "wall_s"} == {k: v for k, v in summary.items() if k != "wall_s"}
    weights = [load_agent(folder)[0].controller.state_dict() for folder in (whole, half)]
    assert str(weights[0]) == str(weights[1])
    agent, _ = load_agent(whole)
    world = World(agent.config.env.id, 2, 5, agent.config.env.kwargs)
    assert len(play_episodes(agent, world, 2, 5).returns) == 2
    assert (whole / "controller.zip").exists() == (kind == "stable_baselines3:PPO")


def test_a_planner_looks_ahead_in_reality_and_not_in_the_dreams_it_learns_from(monkeypatch) -> None:
    settings = config("planner")
    world = World(settings.env.id, 2, 0, settings.env.kwargs)
    agent, calls = Agent(settings, world.spec), []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda self, *args: calls.append(args) or plan(self, *args))
    carry, _ = agent.observe(agent.initial(2), world.reset())
    action = agent.act(carry, greedy=True)
    assert len(calls) == 1 and calls[0][0] is agent.model and calls[0][1] is carry.feat
    assert action.shape == (2, world.spec.action.size)
    batch, length = settings.replay.batch, settings.replay.length
    row = world.reset()
    rows = {
        "obs": {k: np.repeat(v[:1, None], length, 1).repeat(batch, 0) for k, v in row.obs.items()},
        "action": np.tile(action[:1, None], (batch, length, 1)),
        **{k: np.zeros((batch, length), np.float32) for k in ("reward", "surprise")},
        **{k: np.zeros((batch, length), bool) for k in ("is_first", "terminated", "truncated")},
    }
    assert "controller/actor" in agent.update(rows) and len(calls) == 1


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"controller.kind": "stable_baselines3:SAC"}, "SAC cannot take Discrete actions: PPO, A2C, DQN can"),
        ({"controller.kind": "stable_baselines3:PPOO"}, "has no attribute 'PPOO'"),
        ({"controller.kind": "planer"}, "actor_critic, planner, tree, evolution"),
        (
            {"controller.kind": "planner", "controller.kwargs.elites": 999},
            "controller.kwargs.elites = 999 of 64 candidates: use less",
        ),
        (
            {"controller.kind": "planner", "controller.kwargs.elite": 3},
            "controller.kwargs.elite: there is no such setting",
        ),
        ({"controller.kwargs.population": 6}, "controller.kwargs.population: actor_critic has no settings of its own"),
        ({"controller.kind": "planner", "controller.kwargs.horizon": 0}, "kwargs.horizon 0: must be at least 1"),
        ({"controller.kind": "evolution", "controller.replay_value": 0.3}, "set controller.replay_value to 0"),
        ({"controller.kind": "tree", "env.id": "Pendulum-v1", "env.kwargs": {}}, "tree needs discrete actions"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(settings: dict, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        OnlineTrainer.train(options.update(options.load("tiny"), settings), tmp_path / "run", console=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_controller_that_is_not_finite_is_stopped(monkeypatch) -> None:
    from longdream.agent.core.actor import NotFinite

    settings = config("planner")
    world = World(settings.env.id, 2, 0, settings.env.kwargs)
    agent = Agent(settings, world.spec)
    monkeypatch.setattr(Planner, "plan", lambda self, model, feat, state, greedy: torch.full((2, 4), torch.nan))
    carry, _ = agent.observe(agent.initial(2), world.reset())
    with pytest.raises(NotFinite):
        agent.act(carry, greedy=True)
