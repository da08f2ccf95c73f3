"""Specs of spaces: what is stored, how actions are encoded, and which spaces are refused with which message."""

import json
import pickle
import re

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, create_empty_array, iterate

from longdream.envs.contract import ActionSpec, EnvError, EnvSpec, ObsSpec, UserError, env_spec

N = 4
ACTIONS = [
    spaces.Discrete(5),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3, 4]),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiDiscrete([3, 2], start=[7, -2]),
    spaces.Box(-2.0, 2.0, (1,), np.float32),
    spaces.Box(np.array([[0, -5, 1]], np.float64), np.array([[1, 5, 90]], np.float64)),
    spaces.Box(0, 255, (2, 2), np.uint8),
]


def spec_of(observation=None, action=None) -> EnvSpec:
    return env_spec(observation or spaces.Discrete(2), action or spaces.Discrete(2))


def batch(space: spaces.Space, seed: int = 0):
    batched = batch_space(space, N)
    batched.seed(seed)
    return batched.sample()


@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_actions_survive_the_round_trip(space):
    spec = spec_of(action=space).action
    native = batch(space)
    encoded = spec.encode(native)
    assert encoded.shape == (N, spec.size) and encoded.dtype == np.float32
    assert encoded.min() >= -1 and encoded.max() <= 1
    decoded = spec.decode(encoded)
    assert decoded.dtype == native.dtype and decoded.shape == native.shape
    np.testing.assert_allclose(decoded, native, rtol=1e-6, atol=1e-5)
    assert all(space.contains(one) for one in iterate(batch_space(space, N), decoded))


@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_random_actions_are_valid_and_reach_every_choice(space):
    spec = spec_of(action=space).action
    sample = spec.sample(np.random.default_rng(0), 600)
    assert sample.dtype == np.float32
    assert all(space.contains(one) for one in spec.decode(sample))
    if spec.parts:
        assert (sample.sum(1) == len(spec.parts)).all() and sample.any(0).all()
        np.testing.assert_array_equal(spec.encode(spec.decode(sample)), sample)
    else:
        assert sample.min() < -0.9 and sample.max() > 0.9


def test_one_hots_are_concatenated():
    spec = spec_of(action=spaces.MultiDiscrete([2, 3])).action
    assert spec.parts == (2, 3) and spec.size == 5
    np.testing.assert_array_equal(spec.encode(np.array([[1, 0], [0, 2]])), [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])
    np.testing.assert_array_equal(spec.decode(np.array([[0.2, 0.1, 0.5, 0.6, 0.1]])), [[0, 1]])


def test_box_actions_are_scaled_and_clipped():
    spec = spec_of(action=spaces.Box(np.float32([0, -4]), np.float32([10, 4]))).action
    np.testing.assert_allclose(spec.encode(np.float32([[0, -4], [5, 0], [10, 4]])), [[-1, -1], [0, 0], [1, 1]])
    np.testing.assert_allclose(spec.decode(np.array([[3.0, -7.0]])), [[10, -4]])


def test_box_action_of_no_width_stays_where_it_is():
    spec = spec_of(action=spaces.Box(np.float32([1, 0]), np.float32([1, 2]))).action
    np.testing.assert_array_equal(spec.encode(np.float32([[1, 2]])), [[0, 1]])
    np.testing.assert_array_equal(spec.decode(np.float32([[0.7, 1]])), [[1, 2]])


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Box(0, 255, (8, 9, 3), np.uint8), ObsSpec("image", (8, 9, 3))),
        (spaces.Box(0, 255, (8, 9, 1), np.uint8), ObsSpec("image", (8, 9, 1))),
        (spaces.Box(0, 255, (8, 9, 4), np.uint8), ObsSpec("image", (8, 9, 4))),
        (spaces.Box(0, 255, (8, 9), np.uint8), ObsSpec("image", (8, 9, 1))),
        (spaces.Box(0, 255, (128,), np.uint8), ObsSpec("vector", (128,))),
        (spaces.Box(-np.inf, np.inf, (7,), np.float64), ObsSpec("vector", (7,))),
        (spaces.Box(-1, 1, (2, 3, 5), np.float32), ObsSpec("vector", (30,))),
        (spaces.Box(0, 9, (2, 2), np.int64), ObsSpec("vector", (4,))),
        (spaces.Box(0, 1, (), np.float32), ObsSpec("vector", (1,))),
        (spaces.Discrete(6), ObsSpec("discrete", (), 6)),
        (spaces.Discrete(6, start=3), ObsSpec("discrete", (), 6, 3)),
        (spaces.Box(0, 255, (8, 9, 12), np.uint8), ObsSpec("image", (8, 9, 12))),
        (spaces.MultiBinary((2, 3)), ObsSpec("categories", (2, 3), 2)),
        (spaces.MultiDiscrete([3, 300]), ObsSpec("categories", (2,), 300)),
        (spaces.MultiDiscrete([100, 99], np.int8, start=[-100, 20]), ObsSpec("categories", (2,), 219, -100)),
        (spaces.MultiDiscrete([2**16, 9]), ObsSpec("categories", (2,), 2**16)),
    ],
    ids=str,
)
def test_observations_are_stored_as_specified(space, expected):
    spec = spec_of(space)
    assert spec.obs == {"obs": expected}
    native = batch(space)
    packed = spec.pack_obs(native)["obs"]
    assert packed.shape == (N, *expected.shape) and packed.dtype == expected.dtype
    wide = np.asarray(native) if not expected.n else np.asarray(native, np.int64) - expected.start
    np.testing.assert_array_equal(packed.ravel(), wide.ravel().astype(packed.dtype))
    if expected.n:
        assert packed.min() >= 0 and packed.max() < expected.n


def test_dict_observation_keeps_its_keys():
    space = spaces.Dict(
        {"eye": spaces.Box(0, 255, (4, 4, 3), np.uint8), "body": spaces.Box(-1, 1, (3,)), "room": spaces.Discrete(9)}
    )
    spec = spec_of(space)
    assert {key: s.kind for key, s in spec.obs.items()} == {"eye": "image", "body": "vector", "room": "discrete"}
    native = batch(space)
    for key, packed in spec.pack_obs(native).items():
        np.testing.assert_array_equal(packed, native[key])


def test_packed_observation_of_gymnasiums_own_buffers():
    space = spaces.Dict({"a": spaces.Box(0, 255, (5, 5), np.uint8), "b": spaces.Discrete(3)})
    packed = spec_of(space).pack_obs(create_empty_array(space, N, np.zeros))
    assert packed["a"].shape == (N, 5, 5, 1) and packed["b"].shape == (N,)


NOT_FLAT = "register a single environment (entry_point), whose spaces are made flat"
REFUSED = {
    "four dimensions": (spaces.Box(0, 255, (2, 8, 8, 3), np.uint8), "(height, width, channels)"),
    "empty": (spaces.Box(0, 1, (0,)), "at least one value"),
    "many": (spaces.MultiDiscrete([2**20 + 1, 2]), "of 1,048,576 at most"),
    "nested": (spaces.Dict({"x": spaces.Discrete(2)}), NOT_FLAT),
    "tuple": (spaces.Tuple([spaces.Discrete(2)]), NOT_FLAT),
    "sequence": (spaces.Sequence(spaces.Discrete(2)), NOT_FLAT),
    "text": (spaces.Text(5), NOT_FLAT),
    "bool": (spaces.Box(0, 1, (3,), np.bool_), NOT_FLAT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_observation_names_its_key_and_the_fix(name):
    space, fix = REFUSED[name]
    with pytest.raises(UserError) as in_dict:
        spec_of(spaces.Dict({"fine": spaces.Discrete(2), name: space}))
    message = str(in_dict.value)
    assert f"observation {name!r}" in message and fix in message and "\n" not in message
    if not isinstance(space, spaces.Dict):
        with pytest.raises(UserError, match="observation 'obs'"):
            spec_of(space)


def test_empty_dict_observation_is_refused():
    with pytest.raises(UserError, match="at least one key"):
        env_spec(spaces.Dict({}), spaces.Discrete(2))


@pytest.mark.parametrize(
    ("space", "fix"),
    [
        (spaces.Box(-np.inf, np.inf, (2,)), NOT_FLAT),
        (spaces.Box(np.float32([0, 0]), np.float32([1, np.inf])), NOT_FLAT),
        (spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)), NOT_FLAT),
        (spaces.Box(-1, 1, (0,)), "at least one value"),
        (spaces.Discrete(2**40), "Discrete(1099511627776), and a choice is a vector of 1,099,511,627,776 numbers"),
        (spaces.MultiDiscrete([2**20, 2]), "of 1,048,576 at most"),
        (spaces.MultiBinary(3), NOT_FLAT),
        (spaces.Dict({"a": spaces.Discrete(2)}), NOT_FLAT),
        (spaces.Tuple([spaces.Discrete(2)]), NOT_FLAT),
    ],
    ids=str,
)
def test_refused_action_names_the_fix(space, fix):
    with pytest.raises(UserError, match=re.escape(fix)) as error:
        spec_of(action=space)
    assert "the action space" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_spec_survives_json(action):
    observation = spaces.Dict({"a": spaces.Box(0, 255, (4, 5, 3), np.uint8), "b": spaces.Discrete(4, start=2)})
    spec = env_spec(observation, action)
    restored = EnvSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert restored == spec and isinstance(restored.action, ActionSpec)
    native = batch(action)
    np.testing.assert_array_equal(restored.action.encode(native), spec.action.encode(native))
    np.testing.assert_array_equal(
        restored.action.decode(spec.action.encode(native)), spec.action.decode(spec.action.encode(native))
    )


def test_errors_have_their_base_classes_and_can_be_pickled():
    assert issubclass(UserError, ValueError)
    error = pickle.loads(pickle.dumps(EnvError("environment worker 3 of X raised", 3, "Traceback ...")))
    assert isinstance(error, RuntimeError) and (error.worker, error.trace) == (3, "Traceback ...")
    assert str(error) == "environment worker 3 of X raised\nTraceback ..."


@pytest.mark.parametrize("key", ["\ud800", "a\x00b", "line\nbreak"], ids=ascii)
def test_keys_that_cannot_be_written_are_refused(key: str) -> None:
    with pytest.raises(UserError, match="name its entries by letters and digits"):
        env_spec(spaces.Dict({key: spaces.Discrete(2)}), spaces.Discrete(2))
