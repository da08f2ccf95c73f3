"""Evaluations that take long say how far they are."""

import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from gymnasium import spaces

from longdream.agent.config import options
from longdream.agent.config.schema import EnvConfig, EvaluateConfig
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation import policy
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError, env_spec
from longdream.envs.make import World
from longdream.worldmodel.dynamics import State


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


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (EnvSpec({"obs": ObsSpec("image", (8, 8, 3))}, ActionSpec((3,))), "'obs' is an image of shape (8, 8, 3), the"),
        (EnvSpec({"obs": ObsSpec("discrete", (), 5, 1)}, ActionSpec((3,))), "'obs' is one of 5 values from 1 on, the"),
        (
            env_spec(spaces.Box(-1, 1, (2,)), spaces.Discrete(4, start=1)),
            "its actions are Discrete(4, start=1), the agent was trained with Discrete(3)",
        ),
        (
            env_spec(spaces.Box(-1, 1, (2,)), spaces.Box(-2, 2, (1,))),
            "its actions are Box(-2.0, 2.0, (1,), float32), the agent was trained with Discrete(3)",
        ),
    ],
)
def test_what_does_not_fit_is_told(spec: EnvSpec, problem: str) -> None:
    known = env_spec(spaces.Box(-1, 1, (2,)), spaces.Discrete(3))
    assert problem in policy._difference(spec, known)


def test_a_world_without_a_label_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(policy, "QUIET_S", -1.0)
    for label in ("", "named"):
        with closing(policy.WatchedWorld("longdream/Counting-v0", 1, 0)) as world:
            world.label = label
            world.reset()
            world.step(world.random_action(np.random.default_rng(0)))
        assert capsys.readouterr().err == ("named: 1 steps, 0 episodes ended\n" if label else "")


def test_an_environment_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import gymnasium as gym\nfrom gymnasium import spaces\n\n\nclass Words(gym.Env):\n"
    code += (
        "    observation_space = spaces.Discrete(2)\n    action_space = spaces.Graph(spaces.Discrete(2), None)\n\n\n"
    )
    code += "gym.register('Words-v0', entry_point=Words)\n"
    (tmp_path / "of_words.py").write_text(code)
    with pytest.raises(UserError, match=r"^of_words:Words-v0: an action is a Graph space"):
        policy.make_world(World, EnvConfig(id="of_words:Words-v0"), 1, 0)


def test_where_no_episode_ends_it_names_the_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(policy, "QUIET_S", 0.0)
    monkeypatch.setattr(policy, "LONG", 2)
    with closing(policy.WatchedWorld("longdream/Recall-v0", 2, 0, {"corridor": 9})) as world:
        world.reset()
        for _ in range(4):
            world.step(world.random_action(np.random.default_rng(0)))
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "max_episode_steps" not in first and last.endswith("(if none ever does: --env.kwargs.max_episode_steps N)")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_episodes_are_drawn_on_the_gpu_of_the_agent_and_are_those_of_the_cpu() -> None:
    env = EnvConfig(id="longdream/FastMemoryMaze-9x9-v0", kwargs={"max_episode_steps": 50})
    config = options.update(options.load("tiny"), {"env.id": env.id, "device": "cuda"})
    with closing(World(env.id, 1, 0, env.kwargs)) as world:
        agent = Agent(config, world.spec)
    drawn = policy.drawn_beside(agent, env)
    assert drawn.kwargs["device"].startswith("cuda")
    played = [policy.play(agent, each, 8, 0, "random", EvaluateConfig(copies=8)).to_json() for each in (env, drawn)]
    assert played[0] == played[1]


def test_an_environment_that_was_told_where_to_draw_draws_there() -> None:
    env = EnvConfig(id="longdream/FastMemoryMaze-9x9-v0", kwargs={"device": "cpu"})
    on_gpu = cast(Agent, SimpleNamespace(device=torch.device("cuda")))
    assert policy.drawn_beside(on_gpu, env) == env
    assert policy.drawn_beside(on_gpu, EnvConfig(id="longdream/Recall-v0")).kwargs == {}
    assert policy.drawn_beside(on_gpu, EnvConfig(id=env.id)).kwargs == {"device": "cuda"}
    on_cpu = cast(Agent, SimpleNamespace(device=torch.device("cpu")))
    assert policy.drawn_beside(on_cpu, EnvConfig(id=env.id)).kwargs == {}


def test_memory_is_erased_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """At rows 0, n, 2 n, ... of the evaluation; erasing before the first row alone changes nothing."""
    config = options.load("tiny")
    with closing(World(config.env.id, 2, 0, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
    rows: list[bool] = []  # for each row, whether memory was erased before it
    erase = State.without_long_memory
    observe = agent.observe

    def erased(state: State) -> State:
        rows.append(True)
        return erase(state)

    def observed(*args, **kwargs):
        if len(rows) == seen[0]:
            rows.append(False)
        seen[0] = len(rows)
        return observe(*args, **kwargs)

    monkeypatch.setattr(State, "without_long_memory", erased)
    monkeypatch.setattr(agent, "observe", observed)
    settings = EvaluateConfig(copies=2)
    returns = {}
    for steps in (0, 1, 3, 10_000):
        rows.clear()
        seen = [0]
        returns[steps] = policy.play(agent, config.env, 4, 0, "agent", settings, forget_every=steps)
        assert rows == [bool(steps) and i % max(steps, 1) == 0 for i in range(len(rows))] and len(rows) > 6
    assert returns[10_000] == returns[0]
