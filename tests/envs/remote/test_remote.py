"""An environment in another interpreter behaves as in this one: spaces, values, old interfaces, rows."""

import ast
import os
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence

from longdream.envs import World, remote_server
from longdream.envs.contract import EnvError, UserError
from longdream.envs.remote import Enum, RemoteEnv

# An environment that returns its action as the observation, with every kind of Gymnasium space.
ECHO = """
import gymnasium as gym
import numpy as np
from collections import OrderedDict
from gymnasium import spaces

class Enum(spaces.Discrete):  # as MineRL's: values are words, sorted
    def __init__(self, *values):
        super().__init__(len(values))
        self.values = np.array(sorted(values))

    def sample(self, mask=None):
        return self.values[super().sample()]

    def contains(self, x):
        return isinstance(x, str) and x in self.values

def everything(with_enum=True):
    inner = OrderedDict(wide=spaces.Box(-np.inf, np.inf, (2, 3), np.float64), few=spaces.Discrete(5, start=-3))
    if with_enum:
        inner["word"] = Enum("stone", "log", "none")
    return spaces.Dict(OrderedDict(
        picture=spaces.Box(0, 255, (8, 6, 3), np.uint8),
        number=spaces.Box(-1.5, 2.5, (), np.float32),
        half=spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)),
        table=spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[0, 1], [2, 3]])),
        bits=spaces.MultiBinary(3),
        board=spaces.MultiBinary((2, 2)),
        pair=spaces.Tuple([spaces.Discrete(2), spaces.Dict(OrderedDict(inner))]),
        text=spaces.Text(7, min_length=2, charset="abcdé☃"),
        a_last=spaces.Discrete(3),
    ))

class Echo(gym.Env):
    def __init__(self, space=None, render_mode=None):
        self.observation_space = self.action_space = space or everything()
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {"options": options}

    def step(self, action):
        assert self.action_space.contains(action), action
        return action, 1, False, False, {}

    def render(self):
        return np.full((4, 4, 3), 5, np.uint8)

def sequences():
    return Echo(spaces.Dict({"a": spaces.Tuple([spaces.Discrete(2), spaces.Sequence(spaces.Discrete(2))])}))

def pairs():
    return Echo(spaces.Tuple([spaces.Discrete(2), spaces.Dict({"b": spaces.Discrete(2)})]))

gym.register("Echo-v0", entry_point=Echo)
"""


@pytest.fixture(autouse=True)
def echo_world(far_folder: Path) -> None:
    (far_folder / "echo_world.py").write_text(ECHO)


def test_it_behaves_as_in_this_process(remote):
    there, here = remote("CartPole-v1"), gym.make("CartPole-v1")
    assert there.observation_space == here.observation_space and there.action_space == here.action_space
    assert data_equivalence(there.reset(seed=3), here.reset(seed=3), exact=True)
    ends = 0
    for t in range(60):
        one, two = there.step(np.int64(t // 3 % 2)), here.step(np.int64(t // 3 % 2))
        assert data_equivalence(one, two, exact=True)
        if one[2]:
            ends += 1
            assert data_equivalence(there.reset(), here.reset(), exact=True)
    assert ends > 1


def test_spaces_and_values_are_transmitted_exactly(remote, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    import echo_world

    there, here = remote("echo_world:Echo"), echo_world.everything(with_enum=False)
    assert list(there.observation_space.spaces) == list(here.spaces)  # in the same order
    pair = there.observation_space["pair"][1]
    word = pair.spaces.pop("word")
    assert there.observation_space == here
    assert there.observation_space["text"].characters == here["text"].characters
    assert isinstance(word, Enum) and word.values == ("log", "none", "stone") and word.n == 3
    pair.spaces["word"] = word
    there.action_space.seed(0)
    first, info = there.reset(seed=5, options={"depth": 2})
    assert there.observation_space.contains(first) and info == {"options": {"depth": 2}}
    for _ in range(20):
        action = there.action_space.sample()
        obs, reward, *_ = there.step(action)
        assert data_equivalence(obs, action) and reward == 1
    sys.modules.pop("echo_world")


def test_an_unsupported_space_is_named():
    with pytest.raises(UserError, match=r"the observation\.a\[1\] space is a Sequence") as error:
        RemoteEnv(sys.executable, "echo_world:sequences")
    assert "\n" not in str(error.value)


def test_an_observation_that_looks_like_one_with_an_info(remote):
    env = remote("echo_world:pairs")
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs) and info == {"options": None}


def test_an_id_with_a_module_can_be_made(remote):
    env = remote("echo_world:Echo-v0", render_mode="rgb_array")
    assert isinstance(env.action_space, gym.spaces.Dict)
    env.reset()
    assert (env.render() == 5).all()


def test_old_interface(remote):
    env = remote(render_mode="rgb_array")
    first, info = env.reset(seed=1)
    assert info == {} and env.observation_space.contains(first)
    obs, reward, *flags, info = env.step(0)
    assert (reward, flags) == (0.1, [False, False]) and env.observation_space.contains(obs)
    assert info["mode"] == "0o700" and info["ours"] == []
    assert "Chance object" in info["chance"] and info["many"].nbytes == 2_400_000
    np.testing.assert_array_equal(info["array"], np.arange(3))
    assert env.step(1)[2:4] == (True, False)
    assert env.step(2)[2:4] == (False, True)
    assert (env.render() == 7).all()
    started = info["started"]
    again, _ = env.reset(seed=1)
    np.testing.assert_array_equal(again, first)
    assert env.step(0)[4]["started"] == started  # Python's and numpy's own generators are seeded too
    assert (env.reset()[0] != first).all() and (env.reset(seed=2)[0] != first).all()


def test_messages_keep_values_and_types(tmp_path):
    import socket

    ends = socket.socketpair()
    handle = os.open(tmp_path / "frames", os.O_RDWR | os.O_CREAT)
    remote_server.grow(handle, 64)
    one, two = (remote_server.Channel(end, os.dup(handle)) for end in ends)
    arrays = [
        np.zeros((0, 3)),
        np.arange(6).reshape(2, 3).T,
        np.array(True),
        np.array(["é", "longer"]),
        np.ones(99, ">i2"),
    ]
    message = [None, True, 2**70, float("inf"), "☃", (1, [2.5]), {"": {}, "x": np.float32(0.1)}, np.int8(-3), arrays]
    for sender, receiver in ((one, two), (two, one)):
        sender.send([message, np.random.default_rng(0).random(20_000)])
        got, large = receiver.receive()
        assert data_equivalence(got, message, exact=True) and type(got[5]) is tuple
        np.testing.assert_array_equal(large, np.random.default_rng(0).random(20_000))
    for thing in (object(), np.array([object()]), {1: 2}, b"bytes"):
        with pytest.raises(TypeError, match="cannot travel"):
            one.send([thing])
    one.close()
    with pytest.raises(EOFError):
        two.receive()
    two.close()
    os.close(handle)


def test_the_server_file_supports_the_oldest_interpreter():
    source = Path(remote_server.__file__).read_bytes()
    tree = ast.parse(source, feature_version=(3, 7))
    assert source.isascii()
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_several_side_by_side():
    kwargs = {"python": sys.executable, "env": "CartPole-v1"}
    there = gym.make_vec("longdream:longdream/Remote-v0", 3, "async", **kwargs)
    here = gym.make_vec("CartPole-v1", 3, "sync")
    try:
        np.testing.assert_array_equal(there.reset(seed=4)[0], here.reset(seed=4)[0])
        for t in range(40):
            one, two = (vector.step(np.arange(3) * (t + 1) % 2) for vector in (there, here))
            for a, b in zip(one[:4], two[:4], strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        there.close()


# -- as part of the project --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rows_and_exact_continuation(mode):
    there = World(f"remote:{sys.executable}:CartPole-v1", 2, 5, mode=mode)
    here = World("CartPole-v1", 2, 5)
    try:
        rng = np.random.default_rng(0)
        assert data_equivalence(vars(there.reset()), vars(here.reset()))
        for _ in range(30):
            action = there.random_action(rng)
            assert data_equivalence(vars(there.step(action)), vars(here.step(action)))
        state, action = there.get_state(), there.random_action(rng)
        row = there.step(action)
        there.set_state(state)
        assert data_equivalence(vars(there.step(action)), vars(row)) and there.faults == 0
    finally:
        there.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_world_counts_the_faults_of_its_copies(mode):
    world = World(f"remote:{sys.executable}:old_world:Old", 2, 0, mode=mode)
    try:
        world.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tested elsewhere; worker processes print their own warnings
            row = world.step(world.spec.action.encode(np.array([0, 3])))
        assert row.truncated.tolist() == [False, True] and world.faults == 1
        row = world.step(world.spec.action.encode(np.array([0, 0])))
        assert row.is_first.tolist() == [False, True] and world.faults == 1
    finally:
        world.close()


def test_a_fault_while_restoring_a_state_is_an_error():
    world = World(f"remote:{sys.executable}:old_world:Old", 1, 0)
    world.reset()
    state = world.get_state()
    state["copies"][0]["actions"] = np.array([0, 3, 0])  # the second of which ends the process
    with pytest.warns(UserWarning, match="fault 1"), pytest.raises(EnvError, match="while its episode was run again"):
        world.set_state(state)


@pytest.mark.parametrize(
    "env_id", ["remote:", "remote:CartPole-v1", f"remote:{sys.executable}:", "remote::CartPole-v1"]
)
def test_an_incomplete_remote_id_is_explained(env_id):
    with pytest.raises(UserError, match="is not remote:PYTHON:ENV, such as"):
        World(env_id, 1, 0)
