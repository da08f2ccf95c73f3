"""MineRL's tasks against MineRL's own code: its spaces, its conversion of actions and observations, its fake
environment, in an interpreter that can run them. Without Minecraft."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minerl_side
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from other_pythons import interpreters

from longdream.agent.config import options
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.minerl.actions import Flat, action_set
from longdream.envs.minerl.controls import CONTROLS, Controls
from longdream.envs.minerl.env import MineRLEnv
from longdream.envs.remote import RemoteEnv

TASKS = [task for task in CONTROLS if task != "ObtainDiamondShovel"]  # which 0.4.4 does not have
KINDS = ("flat", "factored", "vpt")


@pytest.fixture(scope="session")
def side() -> dict[str, Any]:
    """Arguments that lead to the side environment; it is made once a machine."""
    candidates = [(v, path) for v in minerl_side.VERSIONS for path in interpreters(v)]
    if not candidates:
        pytest.skip(f"there is no Python {', '.join(minerl_side.VERSIONS)} with pip here")
    version, python = candidates[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "longdream"
    folder = cache / minerl_side.recipe(version)
    made = minerl_side.interpreter(folder)
    if not made.exists():
        minerl_side.build(python, folder)
    return {"python": str(made), "environ": {"PYTHONPATH": str(folder)}, "env": "minerl_fake:make"}


@pytest.fixture
def make(side: dict[str, Any]) -> Iterator[Callable[..., MineRLEnv]]:
    made: list[MineRLEnv] = []

    def game(task: str, drawn: bool = False, steps: int = 10_000, **kwargs: Any) -> MineRLEnv:
        there = {"task": task, "drawn": drawn, "steps": steps}
        env = gym.make(f"longdream/MineRL-{task}-v0", kwargs=there, restarts=0, **side, **kwargs).unwrapped
        assert isinstance(env, MineRLEnv)
        made.append(env)
        return env

    yield game
    for env in made:
        env.close()


@pytest.mark.parametrize("task", TASKS)
def test_every_action_of_every_set_lies_in_the_action_space(task: str, make: Callable[..., MineRLEnv]) -> None:
    env = make(task, sticky_attack=0, sticky_jump=0)
    assert env.controls == CONTROLS[task]  # what recordings are read by is what MineRL says
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    rng = np.random.default_rng(0)
    for kind in KINDS:
        env.actions = action_set(kind, env.controls, task)
        sizes = [len(names) for names in env.actions.names]
        if kind == "flat":
            actions = list(range(sizes[0]))
        else:  # every number of every factor, the others by chance
            actions = []
            for factor, size in enumerate(sizes):
                drawn = rng.integers(0, sizes, (size, len(sizes)))
                drawn[:, factor] = np.arange(size)
                actions += [*drawn]
        for action in actions:
            env._pitch = 0.0
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a refused action would be a fault that is survived with a warning
                _, _, _, truncated, info = env.step(action)
            assert not truncated
            sent, meant = info["action"], env.actions.decode(action)
            assert sent.keys() == meant.keys()
            for key, value in meant.items():
                assert sent[key] == pytest.approx(value) if key == "camera" else sent[key] == value
    assert env.faults == 0


@pytest.mark.parametrize("task", TASKS)
def test_every_observation_converts(task: str, make: Callable[..., MineRLEnv]) -> None:
    env = make(task, drawn=True)
    shown = env.observation_space
    assert isinstance(shown, gym.spaces.Dict)
    assert shown["image"].shape == (64, 64, 3)
    seen = [env.reset(seed=0)[0]] + [env.step(env.action_space.sample())[0] for _ in range(30)]
    for obs in seen:
        assert shown.contains(obs)
        assert all(len(obs[key]) == len(names) for key, names in env.names.items())
    for key in env.names:
        assert len({obs[key].tobytes() for obs in seen}) > 5, f"{key} does not change with what the task shows"
    if "equipped_items" in env.names:
        words = [i for i, name in enumerate(env.names["equipped_items"]) if name.startswith("mainhand.type.")]
        assert words and all(obs["equipped_items"][words].sum() == 1 for obs in seen)
    if "compass" in env.names:
        assert env.names["compass"] == ["angle.sin", "angle.cos"]
        np.testing.assert_allclose([np.square(obs["compass"]).sum() for obs in seen], 1, rtol=1e-5)


def test_entries_match_their_names(make: Callable[..., MineRLEnv]) -> None:
    env = make("NavigateDense", drawn=True)
    far = env.remote.reset(seed=1)[0]
    obs = env._convert(far)
    assert obs["inventory"][env.names["inventory"].index("dirt")] == far["inventory"]["dirt"]
    assert np.rad2deg(np.arctan2(*obs["compass"])) == pytest.approx(far["compass"]["angle"], abs=1e-3)


def test_it_is_a_gymnasium_environment(make: Callable[..., MineRLEnv]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(make("ObtainDiamond", actions="factored"), skip_render_check=True)


def test_ticks_of_an_action(make: Callable[..., MineRLEnv]) -> None:
    env = make("ObtainDiamond", repeat=3, sticky_attack=4, sticky_jump=1, pitch=20)
    assert isinstance(env.actions, Flat)
    number = {name: i for i, name in enumerate(env.actions.names[0])}
    env.reset(seed=0)
    assert env.step(number["attack"])[1] == 3  # the rewards of the three ticks, one for each attack
    assert env.step(number["noop"])[1] == 3  # it stays down for four ticks after the one that pressed it last
    assert env.step(number["noop"])[1] == 0
    assert env.step(number["craft_planks"])[4]["action"]["craft"] == "none"  # once, in the first of the three
    single = make("ObtainDiamond", sticky_attack=0, sticky_jump=2, pitch=20)
    single.reset(seed=0)
    sent = [
        single.step(number[name])[4]["action"] for name in ("forward_jump", "noop", "noop", "look_down", "look_down")
    ]
    assert [tick["jump"] for tick in sent] == [1, 1, 0, 0, 0]
    assert [tick["camera"][0] for tick in sent] == pytest.approx([0, 0, 0, 15, 5])
    single.reset()
    assert single.step(number["look_down"])[4]["action"]["camera"][0] == 15  # a new episode begins level
    assert env.step(number["noop"])[0]["image"].dtype == np.uint8


def test_other_action_spaces_are_refused(side: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="no action space of a MineRL task"):
        MineRLEnv("Treechop", side["python"], env="gym:CartPole-v1", environ=side["environ"])
    plain = RemoteEnv(**side, kwargs={"task": "ObtainDiamond"})
    assert Controls.of(plain.action_space) == CONTROLS["ObtainDiamond"]
    plain.close()


def test_a_training_run_goes_through_the_whole_loop(side: dict[str, Any], tmp_path: Path) -> None:
    config = options.update(
        options.load("tiny"),
        {
            "env.id": "longdream/MineRL-ObtainDiamond-v0",
            "env.kwargs": {**side, "kwargs": {"task": "ObtainDiamond", "steps": 8}, "size": 16, "restarts": 0},
            "env.copies": 1,
            "learn.steps": 100,
            "evaluate.every": 0,
            "evaluate.final_episodes": 1,
        },
    )
    summary = OnlineTrainer.train(config, tmp_path / "run", console=False)
    assert summary["updates"] > 0 and summary["episodes"] == 1 and summary["length_mean"] == 8
