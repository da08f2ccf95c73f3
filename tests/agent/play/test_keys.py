"""Keys mean what the environment says that they mean, and otherwise what the printed map says."""

from enum import IntEnum

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from longdream.agent.play.keys import Keys
from longdream.envs import World
from longdream.envs.contract import ActionSpec, env_spec
from longdream.envs.meaning import Meaning, meaning_of


def spec_of(space: spaces.Space) -> ActionSpec:
    return env_spec(spaces.Discrete(1), space).action


def chosen(keys: Keys, *held: str) -> int | None:
    action = keys.action(held)
    return None if action is None else int(action.argmax())


@pytest.mark.parametrize("env", ["longdream/MemoryMaze-9x9-v0", "longdream/FastMemoryMaze-9x9-v0"])
def test_memory_maze(env: str) -> None:
    world = World(env, 1, 0)
    keys = Keys(world.spec.action, world.meaning())
    world.close()
    up, left, right = "ArrowUp", "ArrowLeft", "ArrowRight"
    pressed = [(), (up,), (left,), (right,), (up, left), (right, up)]
    assert [chosen(keys, *held) for held in pressed] == [0, 1, 2, 3, 4, 5] and keys.idle
    assert chosen(keys, "KeyW", "KeyA") == 4  # they stand for the arrows
    assert chosen(keys, "KeyX") == 0 and chosen(keys, left, right) == 3  # the last that was pressed
    assert keys.label(np.eye(6, dtype=np.float32)[[4]]) == "forward left"


@pytest.mark.parametrize("limit", [{}, {"max_episode_steps": 9}])  # its vector form, and single copies
def test_recall_has_no_action_that_does_nothing(limit: dict) -> None:
    world = World("longdream/Recall-v0", 1, 0, {"doors": 2, **limit})
    keys = Keys(world.spec.action, world.meaning())
    assert chosen(keys) is None and not keys.idle
    assert [chosen(keys, key) for key in ("ArrowUp", "Digit1", "Digit2")] == [0, 1, 2]
    assert keys.labels() == [["forward", "door 1", "door 2"]]


class Atari(gym.Env):
    """Says what its actions mean as ale-py's environments do."""

    observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = spaces.Discrete(4)

    def get_action_meanings(self):
        return ["NOOP", "FIRE", "UP", "UPRIGHTFIRE"]

    def get_keys_to_action(self):
        return {(): 0, (ord(" "),): 1, (ord("w"),): 2, (ord(" "), ord("d"), ord("w")): 3}


class Grid(gym.Env):
    """Says what its actions mean as MiniGrid does."""

    class Actions(IntEnum):
        left = 0
        right = 1
        forward = 2
        pickup = 3
        drop = 4
        toggle = 5
        done = 6

    observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = spaces.Discrete(7)
    actions = Actions


class Crafter(gym.Env):
    """Says what its actions mean as Crafter does."""

    observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = spaces.Discrete(6)
    action_names = ("noop", "move_left", "move_right", "do", "sleep", "place_stone")


def test_keys_of_gymnasium() -> None:
    keys = Keys(spec_of(Atari.action_space), meaning_of(gym.wrappers.TimeLimit(Atari(), 5)))
    assert [chosen(keys), chosen(keys, "Space"), chosen(keys, "KeyW")] == [0, 1, 2] and keys.idle
    assert chosen(keys, "KeyW", "KeyD", "Space") == 3 and chosen(keys, "ArrowUp") == 2
    assert {binding.label for binding in keys.bindings} == {"fire", "up", "uprightfire"}


def test_names_alone_give_keys() -> None:
    atari = Keys(spec_of(Atari.action_space), meaning_of(Atari())._replace(keys=()))
    assert [chosen(atari, "ArrowUp"), chosen(atari, "ArrowUp", "ArrowRight", "Space")] == [2, 3]
    grid = Keys(spec_of(Grid.action_space), meaning_of(Grid()))
    held = ("ArrowLeft", "ArrowRight", "ArrowUp", "PageUp", "PageDown", "Space", "Enter")
    assert [chosen(grid, key) for key in held] == list(range(7)) and not grid.idle
    crafter = Keys(spec_of(Crafter.action_space), meaning_of(Crafter()))
    pressed = (None, "ArrowLeft", "ArrowRight", "Space", "KeyZ", "Digit1")
    assert [chosen(crafter, *([key] if key else [])) for key in pressed] == list(range(6)) and crafter.idle


@pytest.mark.parametrize("told", [Meaning(("a", "b")), Meaning(keys=((("w",), 9),))])
def test_a_meaning_that_does_not_fit_is_not_used(told: Meaning) -> None:
    keys = Keys(spec_of(spaces.Discrete(3)), told)
    assert [chosen(keys, f"Digit{i}") for i in (1, 2, 3)] == [0, 1, 2] and not keys.names


def test_attributes_of_another_kind_tell_nothing() -> None:
    env = Atari()
    env.action_names = {"left": 3}  # pyright: ignore[reportAttributeAccessIssue]
    env.get_keys_to_action = lambda wanted: wanted  # pyright: ignore[reportAttributeAccessIssue]
    assert meaning_of(env) == Meaning()


def test_factors_have_keys_of_their_own() -> None:
    keys = Keys(spec_of(spaces.MultiDiscrete([2, 3])))
    assert keys.action(()).tolist() == [[1, 0, 1, 0, 0]] and keys.idle
    assert keys.action(("Digit1", "Digit3")).tolist() == [[0, 1, 0, 0, 1]]


def test_boxes_by_arrows_and_mouse() -> None:
    keys = Keys(spec_of(spaces.Box(-2, 2, (3,), np.float32)))
    assert keys.action(()).tolist() == [[0, 0, 0]] and keys.idle and keys.mouse
    assert keys.action(("ArrowLeft", "ArrowUp", "KeyD")).tolist() == [[-1, 1, 1]]
    assert keys.action((), (0.5, -0.25)).tolist() == [[0.5, -0.25, 0]]
    assert keys.action(("ArrowRight",), (0.5, -0.25)).tolist() == [[1, -0.25, 0]]
    assert keys.label(keys.action(("ArrowLeft",))) == "-1.00, +0.00, +0.00"
