"""Text in observations becomes vectors, which are the same in every copy and process."""

import subprocess
import sys
from contextlib import closing
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.envs.checks import check
from longdream.envs.contract import UserError, env_spec
from longdream.envs.make import World
from longdream.envs.text import SIZE, embed

WORDS = ("fetch the red key", "fetch the blue key", "open the door")


class Words(spaces.Space):
    """A custom space of strings, as MiniGrid has for its missions."""

    def __init__(self) -> None:
        super().__init__(dtype=str)

    def sample(self, *args: Any, **kwargs: Any) -> str:
        return WORDS[self.np_random.integers(3)]

    def contains(self, x: Any) -> bool:
        return x in WORDS

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words)


class Mission(gym.Env):
    """The mission determines the action that is rewarded: 0, 1 or 2."""

    def __init__(self, form: Literal["dict", "bare", "own"] = "dict") -> None:
        text = Words() if form == "own" else spaces.Text(40, charset="abcdefghijklmnopqrstuvwxyz ")
        self.form = form
        dims = {"mission": text, "place": spaces.Box(-1, 1, (2,), np.float32)}
        self.observation_space = text if form == "bare" else spaces.Dict(dims)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        self.goal = int(self.np_random.integers(3))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        return self._observe(), float(action == self.goal), self.t == 4, False, {}

    def _observe(self) -> Any:
        text = WORDS[self.goal]
        return text if self.form == "bare" else {"mission": text, "place": np.full(2, self.t / 4, np.float32)}


gym.register("Mission-v0", entry_point=Mission)


def test_texts_differ_by_their_words_and_by_their_order() -> None:
    a, b, c = (embed(text) for text in WORDS)
    assert a.shape == (SIZE,) and a.dtype == np.float32
    assert (a != b).any() and (b != c).any()
    assert (embed("the key, to the LEFT of it") == embed("the key to the left of it")).all()
    assert (embed("a before b") != embed("b before a")).any()
    assert (embed("") == 0).all()


def test_it_is_the_same_in_another_process() -> None:
    code = f"from longdream.envs.text import embed; print(embed({WORDS[0]!r}).tolist())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(embed(WORDS[0]).tolist())


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("form", ["dict", "bare", "own"])
def test_a_world_returns_vectors(mode: Literal["sync", "async"], form: str) -> None:
    with closing(World("Mission-v0", 2, 0, {"form": form}, mode)) as world:
        key = "obs" if form == "bare" else "mission"
        assert (world.spec.obs[key].kind, world.spec.obs[key].shape) == ("vector", (SIZE,))
        known = {embed(text).tobytes() for text in WORDS}
        row = world.reset()
        seen = set()
        for _ in range(40):
            assert row.obs[key].dtype == np.float32
            seen |= {each.tobytes() for each in row.obs[key]}
            row = world.step(world.random_action(np.random.default_rng(0)))
        assert seen == known


@pytest.mark.parametrize("form", ["dict", "bare", "own"])
def test_it_passes_the_check(form: str) -> None:
    assert check("Mission-v0", {"form": form}).problems == []


def test_an_agent_accepts_it() -> None:
    with closing(World("Mission-v0", 3, 0)) as world:
        agent = Agent(options.load("tiny"), world.spec)
        carry, _ = agent.observe(agent.initial(3), world.reset())
        assert agent.act(carry, greedy=False).shape == (3, 3)


def test_a_text_space_is_no_flat_one() -> None:
    with pytest.raises(UserError, match=r"'obs' is Text.* not flat: register a single environment"):
        env_spec(spaces.Text(5), spaces.Discrete(2))
