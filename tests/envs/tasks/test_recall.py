"""Recall-v0: its rewards, its frames, and its reproducibility."""

import json
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import longdream.envs as envs  # noqa: F401  (registers)
from longdream.envs.contract import UserError
from longdream.envs.tasks.recall import RecallEnv, RecallVecEnv, chance_and_optimum

WALK = 0


def remember(world: RecallVecEnv) -> np.ndarray:
    """The optimal action of an agent that remembers the cue and sees the order of the doors at the junction."""
    door = (world.orders[world.order] == world.cue[:, None]).argmax(1)
    return np.where(world.position == world.corridor, 1 + door, WALK)


def play(world: RecallVecEnv, policy, episodes: int) -> np.ndarray:
    """Returns of at least this many episodes."""
    world.reset()
    running, returns = np.zeros(world.num_envs), []
    while len(returns) < episodes:
        _, reward, terminated, truncated, _ = world.step(policy(world))
        running += reward
        done = terminated | truncated
        returns += running[done].tolist()
        running[done] = 0
    return np.array(returns)


def frame_in_state(world: RecallVecEnv, position: int, cue: int, order: int) -> np.ndarray:
    arrays = {"position": position, "cue": cue, "order": order, "steps": position, "ended": False}
    full = {key: np.full(world.num_envs, value) for key, value in arrays.items()}
    world.set_state({**full, "generators": world.get_state()["generators"]})
    return world.step(np.full(world.num_envs, 1 if position < world.corridor else WALK))[
        0
    ]  # this action only lets a step pass


@pytest.mark.parametrize(("doors", "corridor"), [(2, 1), (3, 12), (5, 4)])
def test_remembering_earns_exactly_the_optimum(doors, corridor):
    world = RecallVecEnv(16, corridor=corridor, doors=doors)
    world.reset(seed=1)
    assert (play(world, remember, 200) == world.optimum).all()
    assert chance_and_optimum(doors) == (world.chance, world.optimum) == (1 / doors, 1.0)


@pytest.mark.parametrize("doors", [2, 3, 6])
def test_any_policy_of_the_junction_frame_earns_chance(doors):
    world, episodes = RecallVecEnv(64, corridor=2, doors=doors), 4000
    world.reset(seed=2)
    of_order = np.random.default_rng(0).integers(
        1, 1 + doors, len(world.orders)
    )  # a door for each frame of the junction
    five_sigma = 5 * math.sqrt(world.chance * (1 - world.chance) / episodes)
    for choice in (np.ones(len(world.orders), int), of_order):
        returns = play(world, lambda w, c=choice: np.where(w.position == w.corridor, c[w.order], WALK), episodes)
        assert abs(returns.mean() - world.chance) < five_sigma


def test_cue_and_order_are_uniform_and_independent():
    world = RecallVecEnv(600, doors=3)
    world.reset(seed=3)
    counts = np.zeros((3, 6))
    for _ in range(10):
        world.reset()
        np.add.at(counts, (world.cue, world.order), 1)
    expected = counts.sum() / counts.size
    assert abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_only_the_entrance_shows_the_cue():
    world = RecallVecEnv(1, corridor=5, doors=3)
    world.reset(seed=0)
    entrance = [frame_in_state(world, 0, cue, 0)[0] for cue in range(3)]
    assert len({frame.tobytes() for frame in entrance}) == 3
    for order in range(6):
        assert (frame_in_state(world, 0, 1, order) == entrance[1]).all()
        for position in range(1, 6):
            assert len({frame_in_state(world, position, cue, order).tobytes() for cue in range(3)}) == 1


def test_only_the_junction_shows_the_order_and_every_cell_looks_different():
    world = RecallVecEnv(1, corridor=36, doors=4)
    world.reset(seed=0)
    assert len({frame.tobytes() for frame in world.frames}) == len(world.frames) == 4 + 35 + 24
    for position in range(1, 36):
        assert len({frame_in_state(world, position, 0, order).tobytes() for order in (0, 7, 23)}) == 1
    junction = {frame_in_state(world, 36, 0, order).tobytes() for order in range(24)}
    assert len(junction) == 24


@pytest.mark.parametrize(("size", "doors"), [(16, 3), (32, 3), (64, 6)])
def test_colours_are_large(size, doors):
    world = RecallVecEnv(1, size=size, doors=doors, corridor=3)
    saturation = world.frames.max(-1).astype(int) - world.frames.min(-1)
    coloured = (saturation > 100).mean((1, 2))
    assert (coloured[:doors] > 0.4).all() and (coloured[-len(world.orders) :] > 0.35).all()
    assert (coloured[doors : doors + 2] == 0).all()


def test_doors_open_at_the_junction_alone():
    world = RecallVecEnv(1, corridor=3, doors=2)
    first, _ = world.reset(seed=0)
    for door in (1, 2):
        frame, reward, terminated, _, _ = world.step(np.array([door]))
        assert (frame == first).all() and reward == 0 and not terminated
    for _ in range(3):
        junction, _, terminated, _, _ = world.step(np.array([WALK]))
    frame, reward, terminated, _, _ = world.step(np.array([WALK]))
    assert (frame == junction).all() and reward == 0 and not terminated
    wrong = 3 - remember(world)
    _, reward, terminated, truncated, _ = world.step(wrong)
    assert reward == 0 and terminated and not truncated


@pytest.mark.parametrize("given", [None, 7])
def test_time_limit_truncates(given):
    world = RecallVecEnv(2, corridor=4, doors=2, max_steps=given)
    world.reset(seed=0)
    limit = given or 4 * (4 + 2)
    for step in range(1, limit + 1):
        frame, reward, terminated, truncated, _ = world.step(np.full(2, WALK))
        assert not terminated.any() and not reward.any()
        assert (truncated == (step == limit)).all()
    assert (world.position == 4).all()  # the final row shows where it ended
    frame, reward, terminated, truncated, _ = world.step(np.ones(2, int))
    assert (frame == world.frames[world.cue]).all() and not (terminated | truncated).any() and not reward.any()
    assert (world.steps == 0).all()


def test_opening_in_the_last_step_terminates():
    world = RecallVecEnv(1, corridor=3, doors=2, max_steps=4)
    world.reset(seed=0)
    for _ in range(3):
        world.step(np.array([WALK]))
    _, reward, terminated, truncated, _ = world.step(remember(world))
    assert reward == 1 and terminated and not truncated


def rollout(world, steps: int, seed=None, actions=None):
    obs = [world.reset(seed=seed)[0]] if seed is not None else []
    rows = [world.step(actions[t]) for t in range(steps)]
    return [np.stack(obs + [row[0] for row in rows]), *(np.stack([row[k] for row in rows]) for k in (1, 2, 3))]


@pytest.mark.parametrize("seed", [5, [40, 3, 3, 9, 0, 77, 1, 8]])
def test_a_copy_alone_is_the_copy_among_eight(seed):
    actions = np.random.default_rng(0).choice(3, (200, 8), p=[0.8, 0.1, 0.1])
    together = rollout(RecallVecEnv(8, corridor=4, doors=2), 200, seed, actions)
    seeds = [5 + i for i in range(8)] if seed == 5 else seed
    for i in (0, 2, 7):
        alone = rollout(RecallVecEnv(1, corridor=4, doors=2), 200, [seeds[i]], actions[:, i : i + 1])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[:, i], b[:, 0])


def test_seeds_mean_something():
    cues = []
    for seed in (1, 1, 2):
        world = RecallVecEnv(64)
        world.reset(seed=seed)
        world.reset()
        cues.append(np.stack([world.cue, world.order]))
    np.testing.assert_array_equal(cues[0], cues[1])
    assert (cues[0] != cues[2]).any()
    with pytest.raises(ValueError, match="2 seeds for 3 copies"):
        RecallVecEnv(3).reset(seed=[1, 2])


def test_state_continues_exactly():
    actions = np.random.default_rng(1).choice(3, (300, 6), p=[0.8, 0.1, 0.1])
    world = RecallVecEnv(6, corridor=4, doors=2)
    world.reset(seed=4)
    while not world.ended.any():  # the harder case: an autoreset is pending
        world.step(np.random.default_rng(2).choice(2, 6))
    state = world.get_state()
    numbers = json.loads(json.dumps(state["generators"]))
    expected = rollout(world, 300, actions=actions)
    other = RecallVecEnv(6, corridor=4, doors=2)
    other.reset(seed=99)
    other.set_state({**state, "generators": numbers})
    for a, b in zip(expected, rollout(other, 300, actions=actions), strict=True):
        np.testing.assert_array_equal(a, b)
    assert expected[2].sum() > 50  # many episodes, so the generators were used


def test_gymnasium_accepts_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("longdream/Recall-v0", doors=4).unwrapped)
        vector = gym.make_vec("longdream/Recall-v0", num_envs=3, corridor=2, vectorization_mode="vector_entry_point")
    assert isinstance(vector.unwrapped, RecallVecEnv)
    obs, info = vector.reset(seed=0)
    assert obs in vector.observation_space and info == {}
    obs, reward, terminated, truncated, info = vector.step(vector.action_space.sample())
    assert obs in vector.observation_space and info == {}
    assert reward.shape == terminated.shape == truncated.shape == (3,)


def test_single_form_is_copy_of_the_vector():
    single, vector = RecallEnv(corridor=3, doors=2), RecallVecEnv(1, corridor=3, doors=2)
    np.testing.assert_array_equal(single.reset(seed=6)[0], vector.reset(seed=6)[0][0])
    for action in (0, 1, 0, 0, 2):
        obs, reward, terminated, truncated, _ = single.step(action)
        expected = vector.step(np.array([action]))
        np.testing.assert_array_equal(obs, expected[0][0])
        assert (reward, terminated, truncated) == (expected[1][0], expected[2][0], expected[3][0])
    assert terminated and (single.chance, single.optimum) == (0.5, 1.0)


def test_render_is_the_frame_enlarged():
    world = RecallVecEnv(2, render_mode="rgb_array")
    obs, _ = world.reset(seed=0)
    frames = world.render()
    assert len(frames) == 2 and frames[1].shape == (256, 256, 3)
    np.testing.assert_array_equal(frames[1][::8, ::8], obs[1])
    assert RecallVecEnv(2).render() is None


@pytest.mark.parametrize(
    "kwargs", [{"doors": 1}, {"doors": 7}, {"corridor": 0}, {"size": 8}, {"max_steps": 12}], ids=str
)
def test_arguments_out_of_range_are_refused(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        RecallVecEnv(1, **kwargs)
