"""World: the alignment of rows, seeds, exact continuation, and failures of environments."""

import sys
import time
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest

import longdream.envs as envs
from longdream.envs import World
from longdream.envs.contract import EnvError, UserError
from longdream.envs.copies import for_gym_make
from longdream.envs.make import derive_seed
from longdream.envs.tasks.counting import CountingVecEnv
from longdream.envs.tasks.recall import RecallVecEnv

# Action 1 raises, 2 hangs, 3 ends the process, 4 ends the episode. Workers import the module by its name.
FAULTY = """
import os, signal, time
import gymnasium as gym
import numpy as np

class Faulty(gym.Env):
    observation_space = gym.spaces.Box(0, 1, (2,))
    action_space = gym.spaces.Discrete(5)

    def __init__(self, observation_space=None, render_mode=None):
        self.observation_space = observation_space or self.observation_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(2, dtype=np.float32), {"info": "is dropped"}

    def step(self, action):
        if action == 1:
            raise KeyError("the wheel came off, 100% of it")
        if action == 2:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a hanging library may ignore SIGTERM too
            time.sleep(600)
        if action == 3:
            os._exit(7)
        return self.np_random.random(2, dtype=np.float32), 1.0, action == 4, False, {}

    def close(self):
        if self.observation_space.shape == (2,):
            open(f"{os.path.dirname(__file__)}/closed-{id(self)}", "w").close()

gym.register("Faulty-v0", entry_point="faulty_world:Faulty")
gym.register("OnlyVector-v0", vector_entry_point="faulty_world:Faulty")
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch) -> Iterator[str]:
    (tmp_path / "faulty_world.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield "faulty_world:Faulty-v0"
    sys.modules.pop("faulty_world", None)
    for name in ("Faulty-v0", "OnlyVector-v0"):
        gym.registry.pop(name, None)


@pytest.fixture
def make_world():
    worlds = []

    def make(*args, **kwargs) -> World:
        worlds.append(World(*args, **kwargs))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def assert_same(a, b):
    for key in a.obs:
        np.testing.assert_array_equal(a.obs[key], b.obs[key])
    for key in ("is_first", "reward", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


def test_registration_is_there_and_can_be_repeated(recwarn):
    envs.register()
    assert not recwarn.list
    for env_id in ("longdream/Recall-v0", "longdream/Counting-v0"):
        assert gym.spec(env_id).vector_entry_point


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rows_are_next_step_autoreset_of_the_single_environment(make_world, mode):
    n, seed = 2, 11
    world = make_world("CartPole-v1", n, seed, mode=mode)
    row = world.reset()
    singles = [gym.make("CartPole-v1") for _ in range(n)]
    expected = np.stack([e.reset(seed=derive_seed(seed, i, 0))[0] for i, e in enumerate(singles)])
    np.testing.assert_array_equal(row.obs["obs"], expected)
    assert row.is_first.all() and not (row.terminated | row.truncated).any() and not row.reward.any()
    episode, ended, resets = np.zeros(n, int), np.zeros(n, bool), 0
    rng = np.random.default_rng(0)
    for _ in range(120):
        action = world.random_action(rng)
        row, native = world.step(action), world.spec.action.decode(action)
        for i, single in enumerate(singles):
            if ended[i]:
                episode[i] += 1
                obs, reward, terminated = single.reset(seed=derive_seed(seed, i, int(episode[i])))[0], 0.0, False
            else:
                obs, reward, terminated, _, _ = single.step(native[i])
            np.testing.assert_array_equal(row.obs["obs"][i], obs)
            assert row.is_first[i] == ended[i]
            assert (row.reward[i], row.terminated[i], row.truncated[i]) == (reward, terminated, False)
            ended[i] = terminated
        resets += row.is_first.sum()
    assert resets > 4
    assert row.reward.dtype == np.float32 and {row.is_first.dtype, row.terminated.dtype} == {np.dtype(bool)}


def test_time_limit_of_the_registration_truncates(make_world):
    world = make_world("Pendulum-v1", 1, 0)
    world.reset()
    rng = np.random.default_rng(0)
    flags = [
        (row.terminated[0], row.truncated[0]) for row in (world.step(world.random_action(rng)) for _ in range(201))
    ]
    assert flags[199] == (False, True) and flags.count((False, False)) == 200


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("env_id", "kwargs"), [("Pendulum-v1", {}), ("longdream/Recall-v0", {"corridor": 9})])
def test_any_environment_takes_a_time_limit_which_truncates(make_world, env_id, kwargs, mode):
    world = make_world(env_id, 2, 0, {"max_episode_steps": 3, **kwargs}, mode=mode)
    assert world.max_episode_steps == 3
    world.reset()
    rows = [world.step(world.random_action(np.random.default_rng(0))) for _ in range(8)]
    assert [bool(row.truncated[0]) for row in rows] == [False, False, True, False] * 2
    assert not any(row.terminated.any() for row in rows) and [i for i in range(8) if rows[i].is_first[0]] == [3, 7]


def test_the_shorter_of_two_time_limits_holds(make_world):
    world = make_world("Pendulum-v1", 1, 0, {"max_episode_steps": 300})
    world.reset()
    rows = [world.step(world.random_action(np.random.default_rng(0))) for _ in range(201)]
    assert [i for i, row in enumerate(rows) if row.truncated[0]] == [199]
    registration = gym.spec("Pendulum-v1")
    assert for_gym_make(registration, {"max_episode_steps": 300, "g": 9}) == {"max_episode_steps": 200, "g": 9}
    assert for_gym_make(registration, {"g": 9}) == {"g": 9}


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_an_episode_as_long_as_a_new_limit_ends_with_the_next_step(make_world, steps):
    world = make_world("Pendulum-v1", 1, 0)
    world.reset()
    for _ in range(steps):
        world.step(np.zeros((1, 1), np.float32))
    limited = make_world("Pendulum-v1", 1, 0, {"max_episode_steps": 4})
    limited.reset()
    limited.set_state(world.get_state())
    assert_same(limited.row, world.row)
    row = limited.step(np.zeros((1, 1), np.float32))
    assert row.truncated[0] and not row.is_first[0]
    assert limited.step(np.zeros((1, 1), np.float32)).is_first[0]


def test_a_state_at_a_time_limit_continues_exactly(make_world):
    world, other = (make_world("Pendulum-v1", 1, 0, {"max_episode_steps": 4}) for _ in range(2))
    world.reset()
    for _ in range(4):
        row = world.step(np.zeros((1, 1), np.float32))
    assert row.truncated[0]
    other.set_state(world.get_state())
    assert_same(other.step(np.zeros((1, 1), np.float32)), world.step(np.zeros((1, 1), np.float32)))


def test_reset_starts_over_and_copies_differ(make_world):
    world = make_world("CartPole-v1", 3, 5)
    first = world.reset()
    for _ in range(30):
        world.step(world.random_action(np.random.default_rng(0)))
    assert_same(world.reset(), first)
    assert len(np.unique(first.obs["obs"], axis=0)) == 3
    assert (make_world("CartPole-v1", 3, 6).reset().obs["obs"] != first.obs["obs"]).all()


def test_copies_of_adjacent_seeds_have_different_generators(make_world):
    orders = []
    for seed in (0, 1):
        world = make_world("longdream/Recall-v0", 8, seed, {"doors": 6})
        world.reset()
        orders.append([g.bit_generator.state["state"]["state"] for g in world.vector.generators])
    assert not set(orders[0]) & set(orders[1])


@pytest.mark.parametrize(
    ("env_id", "mode"),
    [
        ("CartPole-v1", "sync"),
        ("CartPole-v1", "async"),
        ("Pendulum-v1", "sync"),
        ("longdream/Recall-v0", "sync"),
        ("longdream/Counting-v0", "sync"),
    ],
)
@pytest.mark.parametrize("at_an_end", [False, True])
def test_state_continues_exactly(make_world, env_id, mode, at_an_end):
    rng = np.random.default_rng(3)
    world = make_world(env_id, 3, 4, mode=mode)
    world.reset()
    for _ in range(7):
        row = world.step(world.random_action(rng))
    if at_an_end:
        while not (row.terminated | row.truncated).any():
            row = world.step(world.random_action(rng))
    else:
        assert not (row.terminated | row.truncated).all()
    state = world.get_state()
    actions = [world.random_action(rng) for _ in range(60)]
    expected = [world.step(action) for action in actions]
    other = make_world(env_id, 3, 4, mode=mode)
    for restored in (other, world):  # a new world, and one that has continued
        restored.set_state(state)
        assert_same(restored.row, row)
        for action, wanted in zip(actions, expected, strict=True):
            assert_same(restored.step(action), wanted)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_state_is_restored_into_a_world_that_is_about_to_reset(make_world, mode):
    rng = np.random.default_rng(0)
    world = make_world("CartPole-v1", 2, 0, mode=mode)
    world.reset()
    row = world.step(world.random_action(rng))
    state, action = world.get_state(), world.random_action(rng)
    expected = world.step(action)
    while not (row.terminated | row.truncated).any():
        row = world.step(world.random_action(rng))
    world.set_state(state)
    assert_same(world.step(action), expected)


def test_vector_classes_are_used_if_they_can_be_resumed(make_world):
    assert isinstance(make_world("longdream/Recall-v0", 2, 0, {"doors": 2}).vector, RecallVecEnv)
    assert isinstance(make_world("longdream/Counting-v0", 2, 0, mode="async").vector, CountingVecEnv)
    assert gym.spec("CartPole-v1").vector_entry_point  # it has a vector class, but without get_state
    assert isinstance(make_world("CartPole-v1", 2, 0).vector, gym.vector.SyncVectorEnv)


def act(world: World, *choices: int) -> np.ndarray:
    return world.spec.action.encode(np.array(choices))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_exception_names_the_worker_and_shows_its_traceback(faulty, make_world, mode, recwarn):
    world = make_world(faulty, 3, 0, mode=mode)
    world.reset()
    world.step(act(world, 0, 4, 0))
    with pytest.raises(EnvError) as error:
        world.step(act(world, 0, 0, 1))
    message, *trace = str(error.value).split("\n")
    assert message == f"environment worker 2 of {faulty} raised in step: KeyError: 'the wheel came off, 100% of it'"
    assert error.value.worker == 2
    assert 'raise KeyError("the wheel came off, 100% of it")' in "\n".join(trace)
    assert world.vector.closed
    assert not [w for w in recwarn.list if "wheel" in str(w.message)]  # reported once
    if mode == "async":
        assert not any(process.is_alive() for process in world.vector.processes)


def test_hang_hits_the_time_out_and_names_the_worker(faulty, make_world):
    world = make_world(faulty, 3, 0, mode="async", timeout_s=2.0)
    world.reset()
    start = time.monotonic()
    with pytest.raises(EnvError, match=rf"environment worker 1 of {faulty} gave no answer to step within 2 s") as error:
        world.step(act(world, 0, 2, 4))
    assert 1.5 < time.monotonic() - start < 6
    assert error.value.worker == 1
    assert not any(process.is_alive() for process in world.vector.processes)
    world.close()


def test_dead_worker_is_named(faulty, make_world):
    world = make_world(faulty, 2, 0, mode="async")
    world.reset()
    with pytest.raises(EnvError, match=rf"environment worker 1 of {faulty} died in step"):
        world.step(act(world, 0, 3))
    assert not any(process.is_alive() for process in world.vector.processes)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_close_ends_every_copy_and_can_be_repeated(faulty, make_world, mode, tmp_path):
    world = make_world(faulty, 2, 0, mode=mode)
    world.reset()
    world.close()
    world.close()
    assert world.vector.closed and list(tmp_path.glob("closed-*"))


def test_close_in_the_middle_of_a_call(faulty, make_world):
    world = make_world(faulty, 2, 0, mode="async")
    world.reset()
    world.vector.send("step", [{"action": 2}, {"action": 0}])  # as an interrupt from the keyboard leaves it
    world.close()
    assert not any(process.is_alive() for process in world.vector.processes)


@pytest.mark.parametrize(
    ("env_id", "suggestion"),
    [
        ("CartPol-v1", "did you mean CartPole-v1"),
        ("cartpole-v1", "did you mean CartPole-v1"),
        ("longdream/Recal-v0", "did you mean longdream/Recall-v0"),
        ("Qqqqqqqqqqqqqqq", "put the module that registers it in front, as in my_envs:Qqqqqqqqqqqqqqq"),
        ("no_such_module_here:X-v0", "cannot import module 'no_such_module_here' .* start in the folder where it lies"),
        ("faulty_world:Fault-v0", "did you mean faulty_world:Faulty-v0"),
    ],
)
def test_unknown_ids_are_refused_with_a_suggestion(faulty, env_id, suggestion):
    with pytest.raises(UserError, match=suggestion) as error:
        World(env_id, 1, 0)
    assert env_id.split(":")[0] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "longdream/Recall-v0"])
def test_wrong_arguments_of_an_environment_are_one_line(env_id, mode):
    with pytest.raises(UserError, match=rf"{env_id} cannot be made with wheels=3: TypeError") as error:
        World(env_id, 2, 0, {"wheels": 3}, mode=mode)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_unusable_spaces_are_refused_by_key(faulty, mode):
    nested = gym.spaces.Dict({"eyes": gym.spaces.Tuple([gym.spaces.Graph(gym.spaces.Discrete(2), None)])})
    with pytest.raises(UserError, match="observation 'eyes/0' is a Graph space: give its nodes and edges as Boxes"):
        World(faulty, 2, 0, {"observation_space": nested}, mode=mode)


def test_vector_form_alone_is_refused_if_it_cannot_be_resumed(faulty):
    with pytest.raises(UserError, match="OnlyVector-v0 has only a vector form"):
        World("faulty_world:OnlyVector-v0", 2, 0)


def test_module_in_the_current_folder_is_found(faulty, make_world):
    world = make_world(faulty, 2, 0)
    assert world.reset().obs["obs"].shape == (2, 2)


@pytest.mark.parametrize("kwargs", [{"num_envs": 0}, {"seed": -1}, {"mode": "parallel"}], ids=str)
def test_arguments_out_of_range_are_refused(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        World(**{"env_id": "CartPole-v1", "num_envs": 1, "seed": 0, **kwargs})


def test_misuse_is_an_error(make_world):
    world = make_world("CartPole-v1", 2, 0)
    with pytest.raises(RuntimeError, match="before World"):
        world.step(np.zeros((2, 2), np.float32))
    with pytest.raises(RuntimeError, match="before World"):
        world.get_state()
    world.reset()
    with pytest.raises(ValueError, match=r"actions of shape \(2,\), expected \(2, 2\)"):
        world.step(np.zeros(2, np.float32))


def test_random_actions_are_uniform(make_world):
    world = make_world("CartPole-v1", 500, 0)
    action = world.random_action(np.random.default_rng(0))
    assert action.shape == (500, 2) and (action.sum(1) == 1).all() and 200 < action[:, 0].sum() < 300


def test_render(make_world):
    world = make_world("longdream/Recall-v0", 2, 0, {"render_mode": "rgb_array"})
    world.reset()
    np.testing.assert_array_equal(world.render(1)[::8, ::8], world.row.obs["obs"][1])
    assert make_world("CartPole-v1", 1, 0).render() is None
