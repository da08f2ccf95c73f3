"""What an environment may return, and how it is told of everything else: key, value, space and worker."""

import math
import sys
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from longdream.envs import World
from longdream.envs.contract import EnvError, UserError, env_spec
from longdream.envs.copies import Misfit, conform

# Returns what its arguments say: `late` only from its second step on. Workers import the module by its name.
TOLD = """
import gymnasium as gym
import numpy as np

class Told(gym.Env):
    action_space = gym.spaces.Discrete(2)

    def __init__(self, space, obs, late=None, result=None, reset=None):
        self.observation_space = space
        self.obs, self.late, self.result, self.result_of_reset = obs, late, result, reset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.result_of_reset or (self.obs, {})

    def step(self, action):
        self.t += 1
        obs = self.late if self.late is not None and self.t == 2 else self.obs
        return tuple(self.result) if self.result else (obs, 0.0, False, False, {})

gym.register("Told-v0", entry_point="told:Told", disable_env_checker=True, order_enforce=False)
"""
IMAGE = spaces.Box(0, 255, (4, 6, 3), np.uint8)
SMALL = spaces.Box(-1, 1, (3,), np.float32)
ZEROS = np.zeros(3, np.float32)


@pytest.fixture(autouse=True)
def told(tmp_path, monkeypatch) -> Iterator[None]:
    (tmp_path / "told.py").write_text(TOLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if p)])
    yield
    sys.modules.pop("told", None)
    gym.registry.pop("Told-v0", None)


def play(mode: str, steps: int = 3, **kwargs) -> World:
    world = World("told:Told-v0", 2, 0, kwargs, mode=mode, timeout_s=60)
    try:
        world.reset()
        for _ in range(steps):
            world.step(world.spec.action.encode(np.zeros(2)))
    finally:
        world.close()
    return world


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("space", "good", "bad", "what"),
    [
        (IMAGE, np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8), "'obs' as uint8 of shape (6, 4, 3)"),
        (IMAGE, np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 0.7), "'obs' as float64 of shape (4, 6, 3)"),
        (spaces.Discrete(6), 5, 6, "'obs' = 6, its space is Discrete(6), which has 0 to 5"),
        (spaces.Discrete(3, start=-1), -1, 2, "'obs' = 2, its space is Discrete(3, start=-1), which has -1 to 1"),
    ],
)
def test_observations_outside_their_space_are_refused(mode, late, space, good, bad, what):
    first = good if late else bad
    with pytest.raises(EnvError) as error:
        play(mode, space=space, obs=first, late=bad)
    where = "step" if late else "reset"
    assert "\n" not in str(error.value) and error.value.worker == 0
    assert f"environment worker 0 of told:Told-v0 returned the observation {what}" in str(error.value)
    assert str(space) in str(error.value) and str(error.value).endswith(f"make one fit the other (in {where})")


@pytest.mark.parametrize(
    ("space", "obs", "what"),
    [
        (SMALL, np.zeros(4, np.float32), "'obs' as float32 of shape (4,)"),
        (SMALL, np.zeros((3, 1), np.float32), "'obs' as float32 of shape (3, 1)"),
        (SMALL, None, "'obs' as object of shape ()"),
        (SMALL, "abc", "'obs' as <U3 of shape ()"),
        (SMALL, [[1.0], [2.0, 3.0]], "'obs' as object of shape ()"),
        (SMALL, ZEROS * 1j, "'obs' as complex64 of shape (3,)"),
        (spaces.Box(0, 255, (3,), np.uint8), np.array([1, 2, 300], np.uint16), "'obs' = 300 as uint16"),
        (spaces.Box(0, 255, (3,), np.uint8), np.array([1, 2, 3]), "'obs' as int64 of shape (3,)"),
        (spaces.Box(-9, 9, (1,), np.int8), np.array([200]), "'obs' = 200 as int64"),
        (spaces.Discrete(4), 2.0, "'obs' as float64 of shape ()"),
        (spaces.Discrete(4), np.array([2]), "'obs' as int64 of shape (1,)"),
        (spaces.Dict(a=SMALL, b=spaces.Discrete(2)), {"a": ZEROS}, "without 'b': return a dict with 'a', 'b'"),
        (spaces.Dict(a=SMALL, b=spaces.Discrete(2)), ZEROS, "return a dict with 'a', 'b'"),
        (spaces.Dict(a=SMALL, b=spaces.Discrete(2)), {"a": ZEROS, "b": 2}, "'b' = 2"),
    ],
)
def test_what_does_not_conform_is_named(space, obs, what):
    with pytest.raises(Misfit) as misfit:
        conform(obs, space)
    assert what in str(misfit.value) and "\n" not in str(misfit.value)


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (SMALL, [0.5, 0.25, 0.0]),
        (SMALL, np.array([0.5, 0.25, 0.0])),
        (SMALL, np.array([1, 0, -1])),
        (spaces.Discrete(4), np.uint8(3)),
        (spaces.Discrete(4), np.array(3, np.int32)),
        (spaces.Box(0, 9, (3,), np.int16), np.array([1, 2, 3])),
    ],
)
def test_what_conforms_keeps_its_values(space, obs):
    converted = conform(obs, space)
    assert converted.dtype == space.dtype
    np.testing.assert_array_equal(converted, obs)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("result", "what"),
    [
        ([ZEROS, np.array([1.0]), False, False, {}], "returned the reward array([1.]): return one number"),
        ([ZEROS, [1.0, 2.0], False, False, {}], "returned the reward [1.0, 2.0]: return one number"),
        ([ZEROS, None, False, False, {}], "returned the reward None: return one number"),
        ([ZEROS, "1", False, False, {}], "returned the reward '1': return one number"),
        (
            [ZEROS, 1.0, np.array([True, False]), False, {}],
            "returned terminated = array([ True, False])",
        ),
        ([ZEROS, 1.0, False, "no", {}], "returned truncated = 'no': return a bool"),
        ([ZEROS, 1.0, None, False, {}], "returned terminated = None: return a bool"),
        ([ZEROS, 1.0, False], "from step: return observation, reward, terminated, truncated, info"),
    ],
)
def test_rewards_that_are_no_number_and_flags_that_are_no_bool_are_refused(mode, result, what):
    with pytest.raises(EnvError, match=r"environment worker 0 of told:Told-v0 returned") as error:
        play(mode, space=SMALL, obs=ZEROS, result=result)
    assert what in str(error.value)


def test_a_reset_without_info_is_refused():
    with pytest.raises(EnvError, match="from reset: return observation, info"):
        play("sync", space=SMALL, obs=ZEROS, reset=[ZEROS])


@pytest.mark.parametrize("reward", [np.float32(0.5), np.array(0.5), True, 2, math.inf])
def test_numbers_are_rewards(reward):
    world = play("sync", space=SMALL, obs=ZEROS, result=[ZEROS, reward, np.bool_(False), 0, None])
    assert world.row is not None and world.row.reward.tolist() == [float(reward)] * 2


def test_keys_that_are_no_strings_are_refused():
    space = spaces.Dict({0: SMALL, 1: spaces.Discrete(2)})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="the observation Dict has the key 0, a int: name its entries by strings"):
        World("told:Told-v0", 1, 0, {"space": space, "obs": {}})


def test_random_actions_take_memory_of_copies_times_actions():
    action = env_spec(spaces.Discrete(1), spaces.MultiDiscrete([10**6, 3])).action  # (a matrix would take 4 TB)
    drawn = action.sample(np.random.default_rng(0), 4)
    assert drawn.shape == (4, 10**6 + 3) and drawn.dtype == np.float32
    rng = np.random.default_rng(0)
    expected = np.stack([rng.integers(10**6, size=4), rng.integers(3, size=4)], axis=1)
    np.testing.assert_array_equal(action.decode(drawn), expected)


class Many(gym.vector.VectorEnv):
    """A vector environment of its own, which World uses as it is."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_observation_space = spaces.Discrete(3)
    single_action_space = spaces.Discrete(2)

    def __init__(self, num_envs: int, obs, reward):
        self.num_envs = num_envs
        self.obs = obs
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.num_envs, np.int64), {}

    def step(self, actions):
        no = np.zeros(self.num_envs, np.bool_)
        return np.array(self.obs), np.array(self.reward), no, no, {}

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


@pytest.mark.parametrize(
    ("obs", "reward", "what"),
    [
        ([0, 3], [0.0, 0.0], "returned the observation 'obs' = 3, its space is Discrete(3)"),
        ([[0], [1]], [0.0, 0.0], "returned the observation 'obs' as int64 of shape (2, 1)"),
        ([0, 1], [[0.0], [1.0]], "returned reward as float64 of shape (2, 1): return an array of one value for each"),
    ],
)
def test_vector_environments_are_checked_too(obs, reward, what):
    gym.register("Many-v0", vector_entry_point=Many)
    try:
        world = World("Many-v0", 2, 0, {"obs": obs, "reward": reward})
        world.reset()
        with pytest.raises(EnvError) as error:
            world.step(world.spec.action.encode(np.zeros(2)))
        assert what in str(error.value) and "Many-v0" in str(error.value)
    finally:
        gym.registry.pop("Many-v0")
