"""The dream as an environment: spaces, time, seeds, autoreset, Gymnasium's tools, wrong actions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics, RecordVideo

import longdream.envs as envs  # noqa: F401  (registers the environments)
from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.dream_env.spaces import picture
from longdream.agent.dream_env.starts import Moments, first_moments
from longdream.agent.run import folder as run_folder
from longdream.envs.contract import UserError
from longdream.envs.make import World


def vec(checkpoint: Path | Agent, num_envs: int = 5, **arguments: Any) -> Any:
    """The vector form, as users make it."""
    arguments = {"pool": 20, "horizon": 4} | arguments
    kind = "vector_entry_point"
    return gym.make_vec("longdream/Dream-v0", num_envs, kind, checkpoint=str(checkpoint), **arguments)


def untrained(cont: float | None = None, seed: int = 0) -> tuple[Agent, Moments]:
    """An agent with weights that make a difference, and 7 first moments. cont: the logit of going on, everywhere."""
    config = options.update(options.load("tiny"), {"forcing.steps": 2})
    world = World(config.env.id, 7, seed, config.env.kwargs)
    agent = Agent(config, world.spec)
    for parameter in agent.model.parameters():  # heads begin at zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if cont is not None:
        last: Any = agent.model.reward_continue.cont_out[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, cont)
    return agent, first_moments(agent, world.reset().obs)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b)


def walk(env: Any, seed: int | None, actions: list) -> list:
    return [env.reset(seed=seed)[0], *(env.step(action)[:4] for action in actions)]


# -- spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", ["latent", "feature", "image"])
@pytest.mark.parametrize("name", ["images", "vectors", "mixed", "box"])
def test_every_kind_of_environment_is_dreamt_in_its_spaces(dream_runs: Callable, name: str, observation: str) -> None:
    env = vec(dream_runs(name), observation=observation)
    real = run_folder.open_run(dream_runs(name)).config.env
    assert env.single_action_space == gym.make(real.id, **real.kwargs).action_space
    obs, infos = env.reset(seed=1)
    assert infos == {} and env.observation_space.contains(obs)
    env.action_space.seed(2)
    for _ in range(12):
        obs, reward, terminated, truncated, infos = env.step(env.action_space.sample())
        assert env.observation_space.contains(obs) and infos == {}
        assert reward.shape == terminated.shape == truncated.shape == (5,) and np.isfinite(reward).all()
        assert reward.dtype == np.float64 and terminated.dtype == truncated.dtype == np.bool_


def test_decoded_observations_are_those_of_reality(dream_runs: Callable) -> None:
    env = vec(dream_runs("mixed"), observation="image").unwrapped
    assert env.single_observation_space["eye"] == spaces.Box(0, 255, (16, 20, 1), np.uint8)
    assert env.single_observation_space["leg"].shape == (4,)
    assert env.single_observation_space["gear"] == spaces.Discrete(3, start=-1)
    obs, _ = env.reset(seed=0)
    decoded = env.agent.model.encoder.decode(env._now.z)
    np.testing.assert_array_equal(obs["eye"], decoded["eye"].numpy())
    np.testing.assert_array_equal(obs["gear"], decoded["gear"].numpy() - 1)
    assert env.agent.spec.pack_obs(obs).keys() == obs.keys()


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_step_is_one_of_the_model_under_the_same_draws() -> None:
    agent, moments = untrained(cont=100.0)
    env = DreamVecEnv(7, agent, start=moments, horizon=50)
    seen, _ = env.reset(seed=3)
    feat, state = env._now.feat, env._now.state
    np.testing.assert_array_equal(seen, feat.numpy())
    for t in range(5):
        action = np.arange(7) % 4
        obs, reward, *_ = env.step(action)
        # the slow truth: one-hot actions by hand, heads and sampling called one after the other
        encoded = torch.nn.functional.one_hot(torch.from_numpy(action), 4).float()
        expected, _ = agent.model.reward_continue.expect(feat, encoded)
        np.testing.assert_allclose(reward, expected.detach().numpy(), rtol=1e-5)
        # committing the latents that were drawn gives the features that were seen
        feat, state = agent.model.commit(state, env._now.z, encoded, torch.zeros(7, dtype=torch.bool))
        np.testing.assert_allclose(obs, feat.numpy(), atol=1e-6, err_msg=f"step {t}")


def test_ends_come_as_often_as_the_model_says() -> None:
    agent, moments = untrained(cont=float(np.log(3)))  # goes on with probability 3/4
    env = DreamVecEnv(4000, agent, start=moments, horizon=50)
    env.reset(seed=0)
    _, _, terminated, truncated, _ = env.step(np.zeros(4000, int))
    assert 0.22 < terminated.mean() < 0.28 and not truncated.any()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, "same_step", "NextStep"])
def test_the_horizon_truncates_and_a_new_dream_begins(mode: AutoresetMode | str) -> None:
    agent, moments = untrained(cont=100.0)
    env = DreamVecEnv(3, agent, start=moments, horizon=4, autoreset_mode=mode)
    same_step = mode in (AutoresetMode.SAME_STEP, "same_step")
    wanted = AutoresetMode.SAME_STEP if same_step else AutoresetMode.NEXT_STEP
    assert (
        env.metadata["autoreset_mode"] is wanted and DreamVecEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    )
    env.reset(seed=0)
    starts = {row.tobytes() for row in moments.feat.numpy()}
    for t in range(1, 16):
        obs, reward, terminated, truncated, infos = env.step(np.ones(3, int))
        begins = [row.tobytes() in starts for row in obs]
        assert not terminated.any()
        if same_step:
            assert truncated.all() == (t % 4 == 0) and begins == [t % 4 == 0] * 3
            if truncated.all():
                assert infos["_final_obs"].all() and all(row.tobytes() not in starts for row in infos["final_obs"])
            else:
                assert infos == {}
            assert (reward != 0).all()
        else:  # the row after the last is the first of the next, its action ignored
            assert truncated.all() == (t % 5 == 4) and begins == [t % 5 == 0] * 3 and infos == {}
            assert (reward == 0).all() == (t % 5 == 0)


def test_copies_end_each_for_itself() -> None:
    agent, moments = untrained(cont=1.0)
    env = DreamVecEnv(64, agent, "image", start=moments, horizon=6, autoreset_mode="same_step")
    env.reset(seed=0)
    age = np.zeros(64, int)
    seen = set()
    for _ in range(30):
        obs, _, terminated, truncated, infos = env.step(np.zeros(64, int))
        age += 1
        over = terminated | truncated
        assert not (terminated & truncated).any() and (truncated == ((age == 6) & ~terminated)).all()
        assert ("final_obs" in infos) == over.any()
        if over.any():
            assert (infos["_final_obs"] == over).all()
            assert [value is not None for value in infos["final_obs"]] == over.tolist()
            assert all(value.shape == (16, 16, 3) for value in infos["final_obs"][over])
            assert any((infos["final_obs"][i] != obs[i]).any() for i in np.flatnonzero(over))
        age[over] = 0
        seen |= set(age.tolist())
    assert seen == set(range(6))


def test_next_step_and_same_step_dream_alike_up_to_the_first_end() -> None:
    agent, moments = untrained(cont=100.0)
    a, b = (DreamVecEnv(4, agent, start=moments, horizon=5, autoreset_mode=mode) for mode in ("nextstep", "samestep"))
    actions = [np.full(4, t % 4) for t in range(5)]
    first, second = walk(a, 1, actions), walk(b, 1, actions)
    assert same(first[:5], second[:5]) and same(first[5][1:], second[5][1:])


# -- seeds ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_dream(dream_runs: Callable) -> None:
    env, other = vec(dream_runs("images")), vec(dream_runs("images"))
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(12)]
    first = walk(env, 5, actions)
    torch.manual_seed(99)  # global streams have no say
    assert same(first, walk(env, 5, actions)) and same(first, walk(other, 5, actions))
    assert not same(first, walk(env, 6, actions))
    going_on = walk(env, None, actions)
    assert not same(going_on, walk(env, None, actions))
    env.reset(seed=6), env.reset()
    assert same(env.reset()[0], (other.reset(seed=6), other.reset(), other.reset())[-1][0])


def test_global_streams_are_left_alone() -> None:
    agent, moments = untrained()
    env = DreamVecEnv(3, agent, start=moments)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    env.reset(seed=0)
    env.step(np.zeros(3, int))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_a_copy_knows_nothing_of_the_others() -> None:
    agent, moments = untrained(cont=1.5)
    env = DreamVecEnv(8, agent, start=moments, horizon=5)
    rng = np.random.default_rng(0)
    mine = rng.integers(4, size=20)
    runs = []
    for _ in range(2):
        obs = [env.reset(seed=4)[0][2]]
        for action in mine:
            actions = rng.integers(4, size=8)
            actions[2] = action
            outcome = env.step(actions)
            obs.append(np.append(outcome[0][2], [outcome[1][2], outcome[2][2], outcome[3][2]]))
        runs.append(np.concatenate(obs))
    np.testing.assert_array_equal(*runs)


def test_what_was_handed_out_stays_and_may_be_written_to() -> None:
    agent, moments = untrained(cont=1.0)
    for observation in ("latent", "feature", "image"):
        env = DreamVecEnv(6, agent, observation, start=moments, autoreset_mode="samestep")
        obs = [env.reset(seed=0)[0]] + [env.step(np.zeros(6, int))[0] for _ in range(6)]
        kept = [o.copy() for o in obs]
        env.step(np.zeros(6, int))
        assert same(obs, kept)
        wild = [env.reset(seed=0)[0]]
        for _ in range(6):
            wild[-1][:] = 7
            wild.append(env.step(np.zeros(6, int))[0])
        assert same(wild[-1], kept[-1])


def test_temperature_is_how_much_dreams_of_one_moment_differ() -> None:
    agent, moments = untrained(cont=100.0)
    one = Moments(*(part[:1] for part in moments[:2]), moments.state.map(lambda t: t[:1]))
    spread = []
    for temperature in (0.1, 1.0, 2.0):
        env = DreamVecEnv(200, agent, "latent", temperature, start=one, horizon=9)
        env.reset(seed=0)
        spread.append(env.step(np.zeros(200, int))[0].std(0).mean())
    assert 0 < spread[0] < 0.5 * spread[1] and spread[1] < spread[2]


# -- Gymnasium's tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", ["latent", "feature", "image"])
@pytest.mark.parametrize("name", ["images", "mixed"])
def test_gymnasium_finds_nothing_wrong(dream_runs: Callable, name: str, observation: str) -> None:
    arguments = {"checkpoint": str(dream_runs(name)), "observation": observation, "pool": 20, "start": "initial"}
    check_env(gym.make("longdream/Dream-v0", render_mode="rgb_array", **arguments).unwrapped)


@pytest.mark.parametrize("mode", list(AutoresetMode)[:2])
def test_statistics_and_videos_are_recorded(dream_runs: Callable, mode: AutoresetMode, tmp_path: Path) -> None:
    env = vec(dream_runs("vectors"), 4, autoreset_mode=mode, render_mode="rgb_array", horizon=3)
    env = RecordVideo(RecordEpisodeStatistics(env), str(tmp_path), episode_trigger=lambda i: i < 2)
    env.reset(seed=0)
    total, lengths = np.zeros(4), []
    for _ in range(12):
        _, reward, terminated, truncated, infos = env.step(np.zeros(4, int))
        total += reward
        for i in np.flatnonzero(terminated | truncated):
            assert infos["episode"]["r"][i] == pytest.approx(total[i], abs=1e-6)
            lengths.append(int(infos["episode"]["l"][i]))
            total[i] = 0
    env.close()
    assert lengths and max(lengths) <= 3
    assert all(path.stat().st_size > 500 for path in tmp_path.glob("*.mp4")) and any(tmp_path.glob("*.mp4"))


def test_pictures_show_images_large_and_numbers_as_bars() -> None:
    eye = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    shown = picture({"leg": np.ones(2), "eye": eye})
    assert shown.shape == (256, 256, 3) and (shown[::16, ::16] == eye).all()
    assert (
        picture({"eye": eye[..., :1]}).shape == picture({"eye": np.repeat(eye[..., :1], 4, -1)}).shape == (256, 256, 3)
    )
    bars = picture({"a": np.array([1.0, -1.0, 0.0, 1e9])})
    lit = (bars == (240, 136, 62)).all(-1)
    assert bars.shape == (256, 256, 3) and lit[:, 0].sum() == lit[:, 64].sum() == 64 and lit[:, 128].sum() == 0
    assert lit[64:128, 0].all() and lit[128:192, 64].all() and lit[:128, -1].all()


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions", [[0, 1], [0, 1, 4], [0, 1, -1], [0.0, 1.0, 2.0], [[0], [1], [2]], None])
def test_actions_outside_of_the_space_are_refused(actions: Any) -> None:
    agent, moments = untrained()
    env = DreamVecEnv(3, agent, start=moments)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(3, int))
    env.reset(seed=0)
    with pytest.raises(UserError, match="actions"):
        env.step(actions)


def test_boxes_are_clipped_but_must_be_finite(dream_runs: Callable) -> None:
    env = vec(dream_runs("box"), 2)
    far, edge = (walk(env, 0, [np.full((2, 1), value, np.float32)]) for value in (50.0, 2.0))
    assert same(far, edge)
    with pytest.raises(UserError, match="finite"):
        env.step(np.array([[0.0], [np.nan]], np.float32))


def test_an_agent_needs_moments() -> None:
    agent, _ = untrained()
    with pytest.raises(UserError, match="give it Moments"):
        DreamVecEnv(2, agent)


class Rehearsed:
    """As Replayed, without a device: a first call happens several times, and what a call returned is overwritten by the
    next."""

    def __init__(self, function: Callable[[], torch.Tensor]):
        self.function, self.outputs = function, None

    def __call__(self) -> torch.Tensor:
        if self.outputs is None:
            for _ in range(3):
                self.function()
            self.outputs = self.function()
        else:
            self.outputs.copy_(self.function())
        return self.outputs


@pytest.mark.parametrize("mode", ["nextstep", "samestep"])
def test_capturing_changes_no_dream(mode: str) -> None:
    """Present moments that stay where they are, as a CUDA graph needs them, give the dreams that others give."""
    agent, moments = untrained()
    actions = [np.full(6, t % 3) for t in range(11)]
    plain = DreamVecEnv(6, agent, start=moments, horizon=4, autoreset_mode=mode)
    graphed = DreamVecEnv(6, agent, start=moments, horizon=4, autoreset_mode=mode)
    graphed.graphed, graphed.advance = True, Rehearsed(graphed._advance)
    for seed in (3, 4):  # the second reset finds a captured graph
        assert same(walk(graphed, seed, actions), walk(plain, seed, actions))
    held = graphed._now.feat.data_ptr()
    graphed.step(actions[0])
    assert graphed._now.feat.data_ptr() == held
    start = moments.feat.clone()
    graphed.reset(seed=3)
    assert torch.equal(moments.feat, start)


def on_cuda(**settings: Any) -> tuple[Agent, Moments]:
    config = options.update(options.load("tiny"), {"device": "cuda", "forcing.steps": 2, **settings})
    world = World(config.env.id, 7, 0, config.env.kwargs)
    agent = Agent(config, world.spec)
    return agent, first_moments(agent, world.reset().obs)


@pytest.mark.cuda
@pytest.mark.parametrize("observation", ["latent", "feature", "image"])
@pytest.mark.parametrize("mode", ["nextstep", "samestep"])
def test_dreams_on_cuda_keep_their_seeds(mode: str, observation: Any) -> None:
    agent, moments = on_cuda()
    env, other = (DreamVecEnv(9, agent, observation, start=moments, horizon=5, autoreset_mode=mode) for _ in range(2))
    actions = [np.full(9, t % 4) for t in range(12)]
    first = walk(env, 1, actions)
    for other_walk in (walk(env, 1, actions), walk(other, 1, actions)):
        for a, b in zip(first[1:], other_walk[1:], strict=True):
            # (decoded images are whole numbers: a rounding error of M is a step of one)
            np.testing.assert_allclose(a[0].astype(float), b[0], atol=1 if observation == "image" else 1e-4)
            assert same(a[2:], b[2:])


@pytest.mark.cuda
@pytest.mark.parametrize("objective", ["flow", "mask", "teacher"])
def test_a_captured_step_on_cuda_is_one_of_the_model(objective: str) -> None:
    """Rewards and features of a captured environment, against M called step by step with the latents it drew."""
    agent, moments = on_cuda(**{"forcing.objective": objective})
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    env = DreamVecEnv(9, agent, start=moments, horizon=50)
    assert env.graphed
    env.reset(seed=3)
    fresh = np.zeros(9, bool)
    for t in range(5):
        feat, state = env._now.feat.clone(), env._now.state.map(torch.clone)
        choice = (np.arange(9) + t) % 4
        obs, reward, terminated, *_ = env.step(choice)
        encoded = torch.nn.functional.one_hot(torch.from_numpy(choice), 4).float().cuda()
        with torch.no_grad():
            expected, _ = agent.model.reward_continue.expect(feat, encoded)
            feat, _ = agent.model.commit(state, env._now.z, encoded, torch.zeros(9, dtype=torch.bool, device="cuda"))
        np.testing.assert_allclose(reward[~fresh], expected.cpu().numpy()[~fresh], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(obs[~fresh], feat.cpu().numpy()[~fresh], rtol=1e-3, atol=1e-3)
        assert (reward[fresh] == 0).all() and not terminated[fresh].any()
        fresh = terminated


@pytest.mark.cuda
def test_what_cuda_handed_out_stays_and_its_streams_too() -> None:
    agent, moments = on_cuda()
    for observation in ("latent", "feature", "image"):
        env = DreamVecEnv(6, agent, observation, start=moments, horizon=3, autoreset_mode="samestep")
        torch.cuda.manual_seed(5)
        before = torch.cuda.get_rng_state()
        obs = [env.reset(seed=0)[0]] + [env.step(np.zeros(6, int))[0] for _ in range(6)]
        kept = [o.copy() for o in obs]
        env.step(np.ones(6, int))
        assert same(obs, kept) and torch.equal(before, torch.cuda.get_rng_state())
