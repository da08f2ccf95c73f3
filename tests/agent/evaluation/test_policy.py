"""Evaluations that take long say how far they are."""

import re
from contextlib import closing

import numpy as np
import pytest

from longdream.agent.config import options
from longdream.agent.config.schema import EvaluateConfig
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation import policy
from longdream.envs.make import World


def test_a_long_evaluation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    config = options.load("tiny")
    with closing(World(config.env.id, 2, 0, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
    policy.play(agent, config.env, 4, 0, "random", EvaluateConfig(copies=2))
    assert capsys.readouterr().err == ""  # not a word where it is short
    monkeypatch.setattr(policy, "QUIET_S", 0.0)
    policy.play(agent, config.env, 4, 0, "random", EvaluateConfig(copies=2))
    said = [
        re.fullmatch(r"evaluating random actions, 4 episodes: ([\d,]+) steps, (\d+) episodes ended", line)
        for line in capsys.readouterr().err.splitlines()
    ]
    steps, ended = zip(*[(int(line[1].replace(",", "")), int(line[2])) for line in said if line], strict=True)
    assert len(steps) == len(said) > 4 and list(steps) == sorted(steps) and steps[0] <= 2 and ended[-1] >= 4
    assert policy.ENDLESS not in "".join(line[0] for line in said if line)


def test_where_no_episode_ends_it_names_the_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(policy, "QUIET_S", 0.0)
    monkeypatch.setattr(policy, "LONG", 2)
    with closing(policy.WatchedWorld("longdream/Recall-v0", 2, 0, {"corridor": 9})) as world:
        world.reset()
        for _ in range(4):
            world.step(world.random_action(np.random.default_rng(0)))
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "max_episode_steps" not in first and last.endswith("(if none ever does: --env.kwargs.max_episode_steps N)")
