"""A trained agent as an object: what it does is what V, M and C do, in any form that values come in."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import longdream as ld
from longdream.agent.evaluation.rollout import Returns, play_episodes
from longdream.envs.make import World

RUNS = ["images", "vectors", "box", "mixed"]


def as_tensors(obs: Any) -> Any:
    if isinstance(obs, dict):
        return {key: torch.as_tensor(value) for key, value in obs.items()}
    return torch.as_tensor(obs)


def one(obs: Any, i: int) -> Any:
    return {key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i]


@pytest.mark.parametrize("run", RUNS)
def test_single_batched_numpy_and_torch_agree(dream_runs: Callable[[str], Path], run: str) -> None:
    agent = ld.load(dream_runs(run), "cpu")
    envs = agent.make_env(3)
    obs, _ = envs.reset(seed=5)
    memory = agent.reset(3)
    tensors = agent.reset(3)
    singles = [agent.reset() for _ in range(3)]
    over = np.zeros(3, bool)
    for _ in range(9):
        actions, memory = agent.act(obs, memory, greedy=True, first=over)
        assert actions in envs.action_space
        tensor_actions, tensors = agent.act(as_tensors(obs), tensors, greedy=True, first=torch.as_tensor(over))
        assert isinstance(tensor_actions, torch.Tensor) and np.array_equal(tensor_actions.numpy(), actions)
        for i in range(3):
            action, singles[i] = agent.act(one(obs, i), singles[i], greedy=True, first=over[i])
            assert action in envs.single_action_space
            np.testing.assert_allclose(action, actions[i], atol=1e-4)
            np.testing.assert_allclose(singles[i].features, memory.features[i], atol=1e-4)
        obs, _, terminated, truncated, _ = envs.step(actions)
        over = terminated | truncated
    assert isinstance(tensors.features, torch.Tensor) and tensors.features.shape == memory.features.shape


@pytest.mark.parametrize("run", RUNS)
def test_dreams_have_one_form_however_they_are_asked_for(dream_runs: Callable[[str], Path], run: str) -> None:
    agent = ld.load(dream_runs(run), "cpu")
    obs, _ = agent.make_env().reset(seed=1)
    _, memory = agent.act(obs, agent.reset())
    given = np.stack([agent.action_space.sample() for _ in range(4)])
    dream = agent.imagine(memory, given, seed=0)
    np.testing.assert_allclose(dream.actions, given, atol=1e-5)
    many = agent.imagine(memory.repeat(3), np.stack([given] * 3), seed=0)
    policy = agent.imagine(memory, policy=agent, horizon=4)
    assert dream.rewards.shape == policy.rewards.shape == (4,) and many.rewards.shape == (3, 4)
    assert dream.features.shape == (4, len(memory.features)) and many.latents.shape == (3, *dream.latents.shape)
    assert ((dream.ends >= 0) & (dream.ends <= 1)).all()
    frames = dream.frames if isinstance(dream.frames, dict) else {"obs": dream.frames}
    for key, spec in agent.spec.obs.items():
        assert frames[key].shape == (4, *spec.shape) and frames[key].dtype == spec.dtype
        assert frames[key].min() >= spec.start or spec.kind != "discrete"
    tensors = agent.imagine(memory, torch.as_tensor(given), seed=0)
    assert torch.allclose(tensors.rewards, torch.as_tensor(dream.rewards))
    by_function = agent.imagine(memory, policy=lambda features: given[:1].repeat(len(features), 0), horizon=2, seed=0)
    np.testing.assert_allclose(by_function.rewards[:1], dream.rewards[:1], atol=1e-6)


def test_evaluate_policy_of_sb3_finds_the_return_that_a_rollout_finds(dream_runs: Callable[[str], Path]) -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    agent = ld.load(dream_runs("vectors"), "cpu")
    mean, _ = evaluate_policy(agent, make_vec_env(agent.make_env, 2, seed=3), n_eval_episodes=30)  # type: ignore[arg-type]
    returns = Returns.of(*play_episodes(agent.actor, World("CartPole-v1", 2, 3), 30, 3))
    assert abs(float(mean) - returns.return_mean) < 3 * returns.return_std / 30**0.5 + 3


def test_surprise_is_what_acting_measures(dream_runs: Callable[[str], Path]) -> None:
    agent = ld.load(dream_runs("images"), "cpu")
    world = World(agent.config.env.id, 2, 7, agent.config.env.kwargs)
    row = world.reset()
    carry, memory = agent.actor.initial(2), agent.reset(2)
    assert agent.surprise(row.obs["obs"], memory).latent.tolist() == [0, 0]
    for _ in range(3):
        carry, wanted = agent.actor.observe(carry, row)
        assert wanted is not None
        got = agent.surprise(row.obs["obs"], memory, row.reward, row.terminated)
        for mine, its in zip(got, wanted, strict=True):
            np.testing.assert_allclose(mine, its.numpy(), atol=1e-6)
        only = agent.surprise(row.obs["obs"], memory)
        assert only.reward.tolist() == only.end.tolist() == [0, 0]
        memory = agent.observe(row.obs["obs"], memory, row.is_first)
        encoded = agent.actor.act(carry, greedy=True)
        carry = agent.actor.acted(carry, encoded)
        memory = agent.acted(memory, agent.spec.action.decode(encoded))
        row = world.step(encoded)


def test_memory_is_a_value(dream_runs: Callable[[str], Path]) -> None:
    agent = ld.load(dream_runs("images"), "cpu")
    obs, _ = agent.make_env().reset(seed=1)
    fresh = agent.reset()
    _, memory = agent.act(obs, fresh)
    before = memory.features.copy()
    agent.act(obs, memory)
    agent.imagine(memory, horizon=3)
    assert not fresh.started.any() and np.array_equal(memory.features, before)
    erased = memory.without_long_memory()
    assert all(not state.any() for state in erased.carry.state.mixers) and memory.carry.state.mixers[0].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda agent, obs, memory: agent.act(obs[:3], memory), r"observation 'obs' has shape \(3, 16, 3\), expected"),
        (lambda agent, obs, memory: agent.act({"eye": obs}, memory), r"has \['eye'\], this agent knows \['obs'\]"),
        (lambda agent, obs, memory: agent.imagine(agent.reset()), "holds no observation to dream from"),
        (lambda agent, obs, memory: agent.imagine(memory, np.array([0, 9])), "not finite members of"),
        (lambda agent, obs, memory: agent.imagine(memory, np.array(0)), r"actions of shape \(\): give \(H, ...\)"),
        (lambda agent, obs, memory: agent.imagine(memory, np.zeros(3, int), policy=agent), "not both"),
        (lambda agent, obs, memory: agent.imagine(memory, horizon=0), "horizon = 0: must be greater than 0"),
        (lambda agent, obs, memory: agent.decode(np.zeros((3, 2))), r"latents of shape \(3, 2\): give"),
        (lambda agent, obs, memory: memory.repeat(2).repeat(2), "is a batch of 2"),
        (lambda agent, obs, memory: agent.acted(memory, 7), "not finite members of"),
        (lambda agent, obs, memory: agent.act(obs, memory, first=np.ones(3, bool)), r"first of shape \(3,\): give one"),
        (lambda agent, obs, memory: agent.surprise(obs, memory, torch.ones(2)), r"reward of shape \(2,\): give one"),
        (lambda agent, obs, memory: agent.imagine(memory, horizon="3"), "horizon = '3': must be greater than 0"),
        (lambda agent, obs, memory: agent.reset(0), "n = 0: must be at least 1"),
        (lambda agent, obs, memory: agent.make_env(0), "num_envs = 0: must be at least 1"),
        (lambda agent, obs, memory: ld.load(agent, "gpu"), "device 'gpu': should be 'auto', 'cpu' or 'cuda'"),
        (lambda agent, obs, memory: ld.evaluate(agent, episodes="few"), "episodes 'few': should be a valid integer"),
        (lambda agent, obs, memory: ld.train("tiny", resume=agent), "a source or a run to resume, not both"),
        (lambda agent, obs, memory: ld.sb3_env(agent, horizn=3), "'horizn' of dreams: did you mean horizon"),
    ],
)
def test_mistakes_are_one_line(dream_runs: Callable[[str], Path], call: Callable, message: str) -> None:
    agent = ld.load(dream_runs("images"), "cpu")
    obs, _ = agent.make_env().reset(seed=1)
    _, memory = agent.act(obs, agent.reset())
    with pytest.raises(ld.UserError, match=message) as caught:
        call(agent, obs, memory)
    assert "\n" not in str(caught.value)


def test_what_it_offers_is_documented_and_typed() -> None:
    """With an example each, which test_examples.py runs."""
    parts = [getattr(ld, name) for name in ld.__all__]
    functions = [part for part in parts if inspect.isfunction(part)]
    for part in filter(inspect.isclass, parts):
        functions += [f for name, f in vars(part).items() if inspect.isfunction(f) and name[0] != "_"]
    assert {"load", "train", "TrainedAgent.act", "Memory.repeat"} <= {f.__qualname__ for f in functions}
    for function in functions:
        where = function.__qualname__
        assert ">>> " in (function.__doc__ or "") or where == "Memory.repeat", where  # in the example of its class
        signature = inspect.signature(function)
        taken = [p for p in signature.parameters.values() if p.name != "self" and p.kind != p.VAR_KEYWORD]
        assert not {p.annotation for p in taken} & {inspect.Parameter.empty, "Any"}, where
        assert signature.return_annotation is not signature.empty, where


def test_configurations_keep_the_promises_of_the_command_line() -> None:
    config = ld.config("quickstart", env="CartPole-v1", steps=12_000, **{"worldmodel.layers": 3})
    assert config.env.kwargs == {} and config.learn.steps == 12_000 and config.worldmodel.layers == 3
    for wrong, message in (
        ({"sed": 1}, "unknown setting sed: did you mean seed"),
        ({"learn.steps": "many"}, "learn.steps 'many'"),
        ({"worldmodel.width": 7, "worldmodel.num_heads": 2}, "does not divide"),
    ):
        with pytest.raises(ld.UserError, match=message):
            ld.config("tiny", **wrong)
    with pytest.raises(ld.UserError, match="unknown preset 'quikstart': did you mean quickstart"):
        ld.config("quikstart")


def test_training_takes_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"evaluate.every": 0, "evaluate.final_episodes": 1, "learn.prefill": 40, "learn.warmup": 1}
    first = ld.train(ld.config("tiny", steps=60, **short), name="mine", seed=4)
    assert first["seed"] == 4 and first["run"] == "runs/mine" and ld.load("runs/mine").steps >= 60
    longer = ld.train(resume="runs/mine", steps=80)
    assert longer["env_steps"] >= 80 and longer["run"] == "runs/mine"
    tuned = ld.train(init="runs/mine", steps=60, name="tuned")
    assert tuned["run"] == "runs/tuned" and tuned["env_steps"] >= 60
    with pytest.raises(ld.UserError, match="runs/mine is in use"):
        ld.train("tiny", name="mine")
    with pytest.raises(ld.UserError, match="train what"):
        ld.train()


def test_importing_is_quick() -> None:
    """It brings nothing that takes long."""
    code = (
        "import longdream, sys; dir(longdream);"
        "print([name for name in ('torch', 'matplotlib', 'pydantic', 'scipy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_name_is_there() -> None:
    assert all(getattr(ld, name) is not None for name in ld.__all__) and set(ld.__all__) <= set(dir(ld))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ld.lode  # noqa: B018


def test_the_environment_takes_arguments(dream_runs: Callable[[str], Path]) -> None:
    agent = ld.load(dream_runs("images"), "cpu")
    env = agent.make_env(render_mode="rgb_array", corridor=5)
    env.reset(seed=0)
    assert isinstance(env, gym.Env) and env.render().shape[-1] == 3
    with pytest.raises(ld.UserError, match="unexpected keyword"):
        agent.make_env(coridor=5)
