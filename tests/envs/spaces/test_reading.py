"""How single spaces are read by default and otherwise, what is refused in one line, and what stays as it is."""

from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode

from longdream.envs.checks import check
from longdream.envs.contract import EnvError, ObsSpec, UserError, env_spec
from longdream.envs.make import World
from longdream.envs.spaces.flat import Flat, Reading, make_flat, split_options

BYTES = {"low": 0, "high": 255, "dtype": np.uint8}
TWO = spaces.Discrete(2)


class Shows(gym.Env):
    """Shows a value, and asks for an action."""

    def __init__(self, space: spaces.Space, value: Any = None, action: spaces.Space = TWO) -> None:
        self.observation_space = space
        self.action_space = action
        self.value = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return deepcopy(self.value), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return deepcopy(self.value), 0.0, False, False, {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register("Shows-v0", entry_point=Shows, disable_env_checker=True, order_enforce=False)
    yield
    gym.registry.pop("Shows-v0")


def read(space: spaces.Space, way: Any = None, action: spaces.Space = TWO, act_as: Any = None) -> Reading:
    return Reading(space, action, {"read_as": {} if way is None else {"obs": way}, "act_as": act_as or {}})


def spec_of(space: spaces.Space, way: Any = None) -> ObsSpec:
    reading = read(space, way)
    return env_spec(reading.observation_space, reading.action_space).obs["obs"]


@pytest.mark.parametrize(
    ("space", "way", "expected"),
    [
        (spaces.Box(shape=(7, 7, 3), **BYTES), None, ObsSpec("categories", (7, 7, 3), 256)),
        (spaces.Box(shape=(7, 7, 3), **BYTES), "image", ObsSpec("image", (7, 7, 3))),
        (spaces.Box(shape=(7, 7, 3), **BYTES), "vector", ObsSpec("vector", (147,))),
        (spaces.Box(0, 10, (5, 5), np.uint8), None, ObsSpec("categories", (5, 5), 11)),
        (spaces.Box(3, 10, (5, 5), np.int64), None, ObsSpec("vector", (25,))),
        (spaces.Box(3, 10, (5, 5), np.int64), "categories", ObsSpec("categories", (5, 5), 8, 3)),
        (spaces.Box(shape=(2, 600), **BYTES), None, ObsSpec("vector", (1200,))),
        (spaces.Box(shape=(64, 64, 3), **BYTES), "vector", ObsSpec("vector", (12288,))),
        (spaces.Box(shape=(3, 64, 64), **BYTES), "hwc", ObsSpec("image", (3, 64, 64))),
        (spaces.Box(shape=(64, 48, 3), **BYTES), "chw", ObsSpec("image", (48, 3, 64))),
        (spaces.Box(0, 1, (64, 64, 9)), None, ObsSpec("vector", (36864,))),
        (spaces.Box(0, 1, (64, 64, 9)), "image", ObsSpec("image", (64, 64, 9))),
        (spaces.Box(0, 1, (3, 64, 64)), None, ObsSpec("image", (64, 64, 3))),
        (spaces.Box(-np.inf, np.inf, (3, 64, 64)), None, ObsSpec("vector", (12288,))),
        (spaces.MultiBinary(7), "vector", ObsSpec("vector", (7,))),
        (spaces.MultiDiscrete([3, 4]), "categories", ObsSpec("categories", (2,), 4)),
        (spaces.Discrete(2**40), "vector", ObsSpec("vector", (1,))),
    ],
    ids=str,
)
def test_a_space_is_read_by_its_shape_or_as_the_flag_says(
    space: spaces.Space, way: str | None, expected: ObsSpec
) -> None:
    assert spec_of(space, way) == expected
    assert "--env.kwargs.read_as.KEY image|hwc|chw|categories|vector" in read(space, way).line()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(shape=(8, 9, 3), **BYTES),
        spaces.Box(shape=(64, 64), **BYTES),
        spaces.Box(shape=(128,), **BYTES),
        spaces.Box(-1, 1, (2, 3, 5)),
        spaces.Box(-np.inf, np.inf, (7,), np.float64),
        spaces.Discrete(6, start=3),
        spaces.Dict({"eye": spaces.Box(shape=(16, 20), **BYTES), "gear": spaces.Discrete(3, start=-1)}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "action", [spaces.Discrete(3, start=1), spaces.MultiDiscrete([[2], [3]]), spaces.Box(-2, 2, (2,), np.float64)]
)
def test_what_was_flat_stays_as_it_is(space: spaces.Space, action: spaces.Space) -> None:
    value = space.sample()
    env = make_flat(gym.spec("Shows-v0"), {"space": space, "value": value, "action": action})
    assert not isinstance(env, Flat) and env.observation_space is space and env.action_space is action
    assert data_equivalence(env.reset()[0], value)


@pytest.mark.parametrize(
    ("space", "way", "what"),
    [
        (spaces.Graph(TWO, None), None, "'obs' is a Graph space: give its nodes and edges as Boxes"),
        (spaces.Sequence(TWO), None, "of any length: say how many .* with --env.kwargs.read_as.obs 16"),
        (spaces.Sequence(TWO), "many", "'many' is no number of entries"),
        (spaces.Sequence(TWO), 0, "0 is no number of entries"),
        (spaces.Box(-1, 1, (3,)), "picture", "read_as.obs = 'picture': use one of image, hwc, chw, categories, vector"),
        (spaces.Box(-1, 1, (3,)), "image", "has no two sides"),
        (spaces.Box(shape=(8, 8), **BYTES), "chw", "has no two sides"),
        (spaces.Box(-np.inf, np.inf, (3, 64, 64)), "image", "has no bounds that 0 and 255 could stand for"),
        (spaces.Box(-1, 1, (3,)), "categories", "or no integers"),
        (spaces.Box(0, 2**40, (3,), np.int64), "categories", "more than 65,536 values"),
        (spaces.Text(4), "image", "cannot be read so"),
        (spaces.Discrete(4), "image", "cannot be read so"),
        (spaces.Dict({"a/b": TWO, "a": spaces.Dict({"b": TWO})}), None, "two entries .* are called 'a/b'"),
        (spaces.Dict({"a": spaces.Dict({"b": TWO})}), "vector", "no such entry; there are a/b"),
        (spaces.Dict({"a": spaces.Dict({1: TWO})}), None, "the key 1, a int: name its entries by strings"),  # type: ignore
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_in_one_line(space: spaces.Space, way: Any, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        read(space, way)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("space", "act_as", "what"),
    [
        (spaces.Graph(TWO, None), {}, "an action is a Graph space: use Discrete, MultiDiscrete, MultiBinary or Box"),
        (spaces.Dict({"a": spaces.Graph(TWO, None)}), {}, "the action 'a' is a Graph space"),
        (spaces.Sequence(TWO), {}, "--env.kwargs.act_as.action 16"),
        (spaces.Box(-np.inf, np.inf, (2,)), {"action": "big"}, "act_as.action = 'big': give the largest size"),
        (spaces.Box(-1, 1, (2,)), {"action": 3.0}, "has bounds of its own"),
        (spaces.Box(-1, 1, (2,)), {"other": 3.0}, "there is no such entry; there are action: 2 numbers"),
        (spaces.Tuple([]), {}, "the action space is empty"),
    ],
    ids=str,
)
def test_actions_that_cannot_be_read_are_refused_in_one_line(space: spaces.Space, act_as: Any, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        read(TWO, None, space, act_as)
    assert "\n" not in str(error.value)


def test_an_unbounded_number_has_a_stated_scale() -> None:
    wide = spaces.Dict({"turn": spaces.Box(-np.inf, np.inf, (2,)), "push": spaces.Box(0, np.inf, (1,))})
    one = read(TWO, None, wide)
    assert one.action_space == spaces.Box(np.float32([0, -1, -1]), np.float32([2, 1, 1]))
    assert "turn: 2 numbers, unbounded, as -1 to 1 (--env.kwargs.act_as.turn SCALE)" in one.line()
    five = read(TWO, None, wide, {"turn": 5, "push": 0.5})
    assert five.action_space == spaces.Box(np.float32([0, -5, -5]), np.float32([1, 5, 5]))
    built = five.action(np.float32([0.5, -5, 2.5]))
    assert wide.contains(built) and built["turn"].tolist() == [-5, 2.5]


def test_one_choice_in_a_dict_is_a_discrete_action() -> None:
    reading = read(TWO, None, spaces.Dict({"move": spaces.Discrete(5, start=1)}))
    assert reading.action_space == spaces.Discrete(5) and reading.action(np.int64(4)) == {"move": 5}


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.Discrete(5), "acts by action: one of 5"),
        (spaces.MultiDiscrete([5, 3]), "acts by action: one of 5 and one of 3"),
        (spaces.MultiDiscrete([2] * 9), "acts by action: 9 choices"),
        (spaces.MultiBinary(4), "acts by action: 4 bits"),
    ],
    ids=str,
)
def test_the_line_says_what_is_chosen(space: spaces.Space, said: str) -> None:
    assert read(TWO, None, space).line().endswith(said)


def test_numbers_beside_choices_are_values() -> None:
    mix = spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,)), spaces.Box(0, 3, (1,), np.int32)])
    reading = read(TWO, None, mix)
    assert reading.action_space == spaces.MultiDiscrete([2, 11, 4])
    assert "numbers beside choices as 11 values each" in reading.line()
    built = reading.action(np.array([1, 10, 3]))
    assert mix.contains(built) and built[1].tolist() == [1.0] and built[2].tolist() == [3]


def test_a_long_line_is_cut() -> None:
    line = read(spaces.Dict({f"k{i:03}": TWO for i in range(100)})).line()
    assert "k023 as one of 2, 76 more (otherwise:" in line


@pytest.mark.parametrize(
    "kwargs", [{"size": 3, "read_as": {"a.b": "vector", "c": 2}}, {"size": 3, "read_as.a.b": "vector", "read_as.c": 2}]
)
def test_options_are_split_from_the_environments_own_arguments(kwargs: dict[str, Any]) -> None:
    assert split_options(kwargs) == ({"size": 3}, {"read_as": {"a.b": "vector", "c": 2}})


@pytest.mark.parametrize("kwargs", [{"read_as": "vector"}, {"act_as.": 3}])
def test_an_option_names_its_entry(kwargs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"name the entry, as --env.kwargs.(read|act)_as.NAME VALUE"):
        split_options(kwargs)


NESTED = spaces.Dict({"in": spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]), "say": spaces.Text(9)})
GOOD = {"in": (1, np.zeros(2, np.float32)), "say": "go left"}


@pytest.mark.parametrize(
    ("space", "value", "what"),
    [
        (NESTED, {**GOOD, "in": (3, np.zeros(2))}, "'in/0' = 3, its space is Discrete(3), which has 0 to 2"),
        (NESTED, {**GOOD, "in": (1, np.zeros(3))}, "'in/1' as float64 of shape (3,), its space is Box"),
        (NESTED, {**GOOD, "in": (1,)}, "'in' with 1 entries, its space has 2"),
        (NESTED, {**GOOD, "in": 1}, "'in' 1, its space is a Tuple: return a tuple with 2 entries"),
        (NESTED, {"say": ""}, "an observation without 'in': return a dict with 'in', 'say'"),
        (NESTED, {**GOOD, "say": 5}, "'say' = 5, its space is text: return a str"),
        (NESTED, 5, "observation 5, its space is a Dict: return a dict with 'in', 'say'"),
        (spaces.Box(0, 9, (3, 3), np.uint8), np.full((3, 3), 10, np.uint8), "'obs' = 10, its space"),
        (spaces.MultiBinary(3), np.array([0, 1, 2], np.int8), "'obs' = 2, its space is MultiBinary(3)"),
        (spaces.OneOf([TWO, TWO]), (2, 0), "'obs' = (2, 0), its space is OneOf"),
        (spaces.Sequence(TWO), (0, 1, 1), "with 3 entries, of which 2 are read: --env.kwargs.read_as.obs takes"),
        (spaces.Sequence(TWO), 1, "'obs' = 1, its space is Sequence"),
        (spaces.Sequence(TWO, stack=True), 1, "'obs' = 1, its space is Sequence"),
    ],
)
def test_values_that_do_not_fit_are_named(space: spaces.Space, value: Any, what: str) -> None:
    kwargs: dict[str, Any] = {"space": space, "value": value}
    if isinstance(space, spaces.Sequence):
        kwargs["read_as.obs"] = 2
    with closing(World("Shows-v0", 1, 0, kwargs)) as world, pytest.raises(EnvError) as error:
        world.reset()
    assert what in str(error.value) and "\n" not in str(error.value)
    assert "worker 0 of Shows-v0 returned" in str(error.value) and str(error.value).endswith("(in reset)")


def test_the_check_says_how_it_is_read_and_takes_the_flags() -> None:
    value = {"in": (1, np.zeros(2, np.float32)), "say": "go"}
    report = check("Shows-v0", {"space": NESTED, "value": value, "read_as.in/0": "vector"}, steps=5)
    assert report.problems == []
    assert any("reads in/0 as a vector of 1, in/1 as a vector of 2, say as text" in line for line in report.passed)
    wrong = check("Shows-v0", {"space": NESTED, "value": {**value, "in": 1}}, steps=5)
    assert any("its space is a Tuple: return a tuple" in line for line in wrong.problems)


class Several(gym.vector.VectorEnv):
    """A vector form whose actions are not flat."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_observation_space = TWO
    single_action_space = spaces.MultiBinary(3)

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        self.num_envs = num_envs

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        pass


def test_a_vector_form_that_is_not_flat_gives_way_to_single_copies() -> None:
    gym.register("Several-v0", entry_point=Shows, vector_entry_point=Several, disable_env_checker=True)
    gym.register("OnlySeveral-v0", vector_entry_point=Several)
    try:
        kwargs = {"space": TWO, "value": 1, "action": spaces.MultiBinary(3)}
        with closing(World("Several-v0", 2, 0, kwargs)) as world:
            assert not world.native and world.spec.action.parts == (2, 2, 2)
            assert "acts by action: 3 bits" in world.reading()
        with pytest.raises(UserError, match=r"only a vector form, and not one with .* flat spaces"):
            World("OnlySeveral-v0", 2, 0)
    finally:
        gym.registry.pop("Several-v0")
        gym.registry.pop("OnlySeveral-v0")


def test_a_vector_form_says_how_it_is_read_too() -> None:
    with closing(World("longdream/Recall-v0", 2, 0)) as world:
        assert world.native and "reads obs as an image of" in world.reading()
