"""Every space of Gymnasium, nested at random: what arrives is what the environment gave, and so with its actions."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from longdream.envs.make import World
from longdream.envs.spaces.actions import VALUES
from longdream.envs.text import embed

MOST = 3
"""Entries of a Sequence that are read; the environment gives no more."""
Expected = dict[str, np.ndarray]
Told = list[tuple[str, Any]]

# -- observations: spaces, each with what a value of it must arrive as, said apart from the code under test ------------


def _bytes(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def _vector(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32).reshape(-1)


LEAVES: list[tuple[spaces.Space, Callable[[Any], Any]]] = [
    (spaces.Discrete(5), np.asarray),
    (spaces.Discrete(4, start=-2), lambda value: np.asarray(value) + 2),
    (spaces.MultiDiscrete([2, 5, 3]), np.asarray),
    (spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[-1, -1], [-1, -1]]), lambda value: value + 1),
    (spaces.MultiBinary(6), np.asarray),
    (spaces.MultiBinary((2, 3)), np.asarray),
    (spaces.Text(8), embed),
    (spaces.Box(-1, 1, (3,)), _vector),
    (spaces.Box(-np.inf, np.inf, (2, 2), np.float64), _vector),
    (spaces.Box(0, 1, (), np.float32), _vector),
    (spaces.Box(-5, 5, (4,), np.int16), _vector),
    (spaces.Box(0, 1, (2, 4), np.bool_), np.asarray),
    (_bytes(9), _vector),
    (_bytes(5, 5), np.asarray),
    (_bytes(7, 7, 3), np.asarray),
    (_bytes(8, 10), lambda value: value[..., None]),
    (_bytes(9, 8, 3), np.asarray),
    (_bytes(3, 8, 9), lambda value: np.moveaxis(value, 0, -1)),
    (_bytes(6, 12, 9), lambda value: np.moveaxis(value, 0, -1)),
    (_bytes(12, 9, 6), np.asarray),
    (_bytes(2, 8, 9, 3), lambda value: np.concatenate(list(value), -1)),
    (_bytes(2, 3, 8, 9), lambda value: np.moveaxis(value.reshape(6, 8, 9), 0, -1)),
    (spaces.Box(0, 1, (16, 16, 3)), lambda value: np.rint(value * np.float32(255)).astype(np.uint8)),
    (spaces.Box(0, 255, (4, 16, 17), np.int32), lambda value: np.moveaxis(value, 0, -1).astype(np.uint8)),
]


def _lowest(space: spaces.Space, name: str, reader: Callable[[Any, str], Expected]) -> Expected:
    """What stands in the place of a value that is not there."""
    sample = reader(sampled(space), name)
    return {key: np.zeros_like(value) for key, value in sample.items()}


def nested(rng: np.random.Generator, depth: int) -> tuple[spaces.Space, Callable[[Any, str], Expected]]:
    """A random space, and what a value of it must arrive as, by name."""
    kind = rng.choice(["leaf", "dict", "tuple", "sequence", "stacked", "one of"]) if depth else "leaf"
    if kind == "leaf":
        space, expected = LEAVES[rng.integers(len(LEAVES))]
        return space, lambda value, name: {name: np.asarray(expected(value))}
    if kind in ("sequence", "stacked"):
        inner, read = nested(rng, 0)
        stacked = kind == "stacked" and not isinstance(inner, spaces.Text)
        space = spaces.Sequence(inner, stack=stacked)

        def expect(value: Any, name: str) -> Expected:
            rows = [read(each, f"{name}/entry") for each in value]
            blank = _lowest(inner, f"{name}/entry", read)
            joined = {}
            for key, zero in blank.items():
                values = [row[key] for row in rows] + [zero] * (MOST - len(rows))
                image = zero.dtype == np.uint8 and zero.ndim == 3 and min(zero.shape[:2]) >= 8
                flat = zero.dtype == np.float32
                stack = np.concatenate(values, -1) if image else np.stack(values)
                joined[key] = stack.reshape(-1) if flat else stack
            return {f"{name}/length": np.asarray(len(rows)), **joined}

        return space, expect
    parts = [nested(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    if kind == "one of":

        def expect_one(value: Any, name: str) -> Expected:
            which = int(value[0])
            expected: Expected = {f"{name}/which": np.asarray(which)}
            for i, (each, read) in enumerate(parts):
                part = read(value[1], f"{name}/{i}") if i == which else _lowest(each, f"{name}/{i}", read)
                expected |= part
            return expected

        return spaces.OneOf([each for each, _ in parts]), expect_one
    names = [f"k{i}" for i in range(len(parts))] if kind == "dict" else list(range(len(parts)))
    whole = [each for each, _ in parts]
    space = spaces.Dict(dict(zip(names, whole, strict=True))) if kind == "dict" else spaces.Tuple(whole)

    def expect_all(value: Any, name: str) -> Expected:
        expected: Expected = {}
        for key, (_, read) in zip(names, parts, strict=True):
            expected |= read(value[key], f"{name}/{key}" if name else str(key))
        return expected

    return space, expect_all


# -- actions: what an action says, as its flat form must say it -------------------------------------------------------

ACTS: list[spaces.Space] = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=5),
    spaces.MultiDiscrete([2, 3], start=[1, -1]),
    spaces.MultiBinary(19),
    spaces.MultiBinary((2, 2)),
    spaces.Box(-2, 2, (2,)),
    spaces.Box(-np.inf, np.inf, (1,), np.float64),
    spaces.Box(np.float32([0, -np.inf]), np.float32([np.inf, 3])),
    spaces.Box(0, 4, (2, 1), np.int64),
    spaces.Box(0, 1, (2,), np.bool_),
    spaces.Text(3, min_length=0, charset="abc"),
]


def acting(rng: np.random.Generator, depth: int) -> spaces.Space:
    kind = rng.choice(["leaf", "dict", "tuple", "sequence", "one of"]) if depth else "leaf"
    if kind == "leaf":
        return ACTS[rng.integers(len(ACTS))]
    if kind == "sequence":
        return spaces.Sequence(acting(rng, 0))
    parts = [acting(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    if kind == "dict":
        return spaces.Dict({f"k{i}": part for i, part in enumerate(parts)})
    return spaces.Tuple(parts) if kind == "tuple" else spaces.OneOf(parts)


def said(space: spaces.Space, action: Any, flat: Iterator[Any], mixed: bool, matters: bool = True) -> None:
    """Check that an action of the environment says what the values of its flat form say, which are taken in order.

    matters: whether this part of the flat form is used."""
    if isinstance(space, spaces.Dict):
        for key, part in space.items():
            said(part, action[key] if matters else None, flat, mixed, matters)
    elif isinstance(space, spaces.Tuple):
        for i, part in enumerate(space.spaces):
            said(part, action[i] if matters else None, flat, mixed, matters)
    elif isinstance(space, spaces.OneOf):
        which = int(next(flat))
        assert not matters or action[0] == which
        for i, part in enumerate(space.spaces):
            used = matters and i == which
            said(part, action[1] if used else None, flat, mixed, used)
    elif isinstance(space, spaces.Sequence):
        length = int(next(flat))
        assert not matters or len(action) == length
        for i in range(MOST):
            used = matters and i < length
            said(space.feature_space, action[i] if used else None, flat, mixed, used)
    elif isinstance(space, spaces.Text):
        length = int(next(flat))
        letters = [int(next(flat)) for _ in range(space.max_length)][:length]
        assert not matters or action == "".join(space.character_list[i] for i in letters)
    elif isinstance(space, spaces.Box):
        values = [next(flat) for _ in range(int(np.prod(space.shape)))]
        low = np.where(np.isfinite(space.low), space.low, np.where(np.isfinite(space.high), space.high - 2.0, -1.0))
        high = np.where(np.isfinite(space.high), space.high, np.where(np.isfinite(space.low), space.low + 2.0, 1.0))
        if mixed and space.dtype.kind != "b":
            count = np.where(space.dtype.kind == "i", high - low, VALUES - 1.0)
            values = (low + np.reshape(values, space.shape) * (high - low) / count).ravel()
        if matters:
            np.testing.assert_allclose(np.ravel(action), np.rint(values) if space.dtype.kind == "i" else values, 1e-5)
    else:
        values = [next(flat) for _ in range(max(1, int(np.prod(space.shape, dtype=int))))]
        start = np.ravel(getattr(space, "start", 0))
        assert not matters or (np.ravel(action) == np.array(values) + start).all()


# -- both through a World ---------------------------------------------------------------------------------------------

given: Told = []
"""Values that the environments below have given and were given, in order: ("observation" or "action", value)."""


class Given(gym.Env):
    """Gives samples of its observation space, and keeps what it is told."""

    def __init__(self, observation: spaces.Space, action: spaces.Space) -> None:
        self.observation_space = observation
        self.action_space = action
        self.t = 0

    def sample(self) -> Any:
        value = sampled(self.observation_space)
        given.append(("observation", value))
        return value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        self.observation_space.seed(seed)
        return self.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        given.append(("action", action))
        self.t += 1
        return self.sample(), 0.0, self.t == 3, False, {}


def sampled(space: spaces.Space) -> Any:
    """A random value whose Sequences are all short enough."""
    value = space.sample()
    while not short(space, value):
        value = space.sample()
    return value


def short(space: spaces.Space, value: Any) -> bool:
    """Whether all Sequences in it have MOST entries at most."""
    if isinstance(space, spaces.Sequence):
        return len(value) <= MOST
    if isinstance(space, spaces.OneOf):
        return short(space.spaces[int(value[0])], value[1])
    if isinstance(space, spaces.Dict):
        return all(short(part, value[key]) for key, part in space.items())
    return not isinstance(space, spaces.Tuple) or all(map(short, space.spaces, value))


def sequences(space: spaces.Space, name: str, root: str) -> Iterator[str]:
    """The names of all Sequences in a space."""
    if isinstance(space, spaces.Sequence):
        yield name or root
    inner = space.spaces if isinstance(space, spaces.Dict | spaces.Tuple | spaces.OneOf) else {}
    prefix = (name or root) if isinstance(space, spaces.OneOf) else name
    for key, each in inner.items() if isinstance(inner, dict) else enumerate(inner):
        yield from sequences(each, f"{prefix}/{key}" if prefix else str(key), root)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register("Given-v0", entry_point=Given, disable_env_checker=True, order_enforce=False)
    given.clear()
    yield
    gym.registry.pop("Given-v0")


@pytest.mark.filterwarnings("ignore")  # Gymnasium warns of precision, and of spaces in other spaces
@pytest.mark.parametrize("seed", range(60))
def test_what_arrives_is_what_was_given(seed: int) -> None:
    rng = np.random.default_rng(seed)
    observation, expect = nested(rng, depth=seed % 3)
    action = acting(rng, depth=seed % 3)
    kwargs: dict[str, Any] = {"observation": observation, "action": action}
    kwargs |= {f"read_as.{name}": MOST for name in sequences(observation, "", "obs")}
    kwargs |= {f"act_as.{name}": MOST for name in sequences(action, "", "action")}
    with closing(World("Given-v0", 1, seed, kwargs)) as world:
        row = world.reset()
        for _ in range(5):
            check_row(row.obs, observation, expect)
            encoded = world.random_action(rng)
            given.clear()
            ended = bool(row.terminated[0])
            row = world.step(encoded)
            if not ended:
                kind, told = given[0]
                assert kind == "action"
                flat = np.ravel(world.spec.action.decode(encoded)[0])
                mixed = bool(world.spec.action.parts)
                start = np.ravel(getattr(action, "start", 0)) if world.single_action_space == action else 0
                rest = iter(flat - start)
                said(action, told, rest, mixed)
                assert not list(rest)


def check_row(obs: dict[str, np.ndarray], space: spaces.Space, expect: Callable[[Any, str], Expected]) -> None:
    kind, value = given[-1]
    assert kind == "observation"
    nameless = isinstance(space, spaces.Dict | spaces.Tuple)
    expected = expect(value, "" if nameless else "obs")
    assert obs.keys() == expected.keys()
    for key, wanted in expected.items():
        np.testing.assert_array_equal(obs[key][0], wanted, err_msg=key)
