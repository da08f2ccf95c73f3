"""Evaluations that take long say how far they are."""

import re
from contextlib import closing

import pytest

from longdream.agent.config import options
from longdream.agent.config.schema import EvaluateConfig
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation import policy as judge
from longdream.envs.make import World


def test_a_long_evaluation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    config = options.load("tiny")
    with closing(World(config.env.id, 2, 0, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
    judge.play(agent, config.env, 4, 0, "random", EvaluateConfig(copies=2))
    assert capsys.readouterr().err == ""  # not a word where it is short
    monkeypatch.setattr(judge, "PATIENCE_S", 0.0)
    judge.play(agent, config.env, 4, 0, "random", EvaluateConfig(copies=2))
    told = [
        re.fullmatch(r"evaluating random actions, 4 episodes: ([\d,]+) steps, (\d+) episodes ended", line)
        for line in capsys.readouterr().err.splitlines()
    ]
    steps, ended = zip(*[(int(line[1].replace(",", "")), int(line[2])) for line in told if line], strict=True)
    assert len(steps) == len(told) > 4 and list(steps) == sorted(steps) and steps[0] <= 2 and ended[-1] >= 4
