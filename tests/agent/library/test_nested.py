"""A run whose environment has nested spaces: trained, dreamt of, played and taken by others in its flat form."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence

import longdream as ld
from longdream.agent.cli import main as cli
from longdream.agent.config.schema import EnvConfig
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.evaluation.baselines.sb3 import RealVec, seen
from longdream.agent.evaluation.policy import check_fit
from longdream.agent.play.frames import cannot_be_uploaded
from longdream.agent.run.signals import Signals
from longdream.envs.contract import EnvSpec, ObsSpec, UserError
from longdream.envs.make import World

KINDS = {
    "bag/entry/at": ObsSpec("vector", (4,)),
    "bag/entry/kind": ObsSpec("categories", (2,), 4, 1),
    "bag/length": ObsSpec("discrete", (), 3),
    "eye": ObsSpec("image", (9, 12, 2)),
    "goal/0": ObsSpec("vector", (3,)),
    "goal/1": ObsSpec("discrete", (), 3, 1),
    "grid": ObsSpec("categories", (5, 5, 2), 256),
    "words": ObsSpec("vector", (64,)),
}
SMALL: dict[str, Any] = {"pool": 10, "horizon": 3}


@pytest.fixture
def run(dream_runs: Callable[[str], Path]) -> Path:
    return dream_runs("nested")


def test_a_trained_agent_sees_the_flat_form_and_acts_in_it(run: Path) -> None:
    agent = ld.load(run)
    assert agent.spec.obs == KINDS
    assert agent.action_space == spaces.MultiDiscrete([2, 2, 2, 11])
    env = agent.make_env()
    own = gym.make("NestedForDreams-v0").unwrapped
    assert env.observation_space.keys() == KINDS.keys() and env.unwrapped.observation_space == own.observation_space
    obs, _ = env.reset(seed=0)
    memory = agent.reset()
    for t in range(3):
        assert env.observation_space.contains(obs) and obs["grid"][0, 0, 0] == 60 * t
        action, memory = agent.act(obs, memory)
        obs = env.step(action)[0]
    dream = agent.imagine(memory, horizon=4)
    assert all(dream.frames[key].shape == (4, *known.shape) for key, known in KINDS.items())
    assert dream.frames["bag/entry/kind"].min() >= 1 and dream.frames["bag/entry/kind"].max() <= 4
    back = agent.decode(agent.encode(obs))
    assert all(agent.observation_space[key].contains(back[key]) for key in ("grid", "goal/1", "eye", "bag/entry/kind"))


def test_a_channel_first_image_is_not_taken_for_one_of_channels_last(run: Path) -> None:
    agent = ld.load(run)
    obs, _ = agent.make_env().reset(seed=0)
    with pytest.raises(UserError, match=r"'eye' has shape \(2, 9, 12\), expected \(9, 12, 2\)"):
        agent.act({**obs, "eye": np.moveaxis(obs["eye"], -1, 0)}, agent.reset())
    with closing(DreamVecEnv(1, run, "image", start="observation", **SMALL)) as dreams:
        batch = {key: value[None] for key, value in obs.items()}
        with pytest.raises(UserError, match=r"'eye' has shape"):
            dreams.reset(options={"observation": {**batch, "eye": np.moveaxis(batch["eye"], -1, 1)}})
        assert dreams.observation_space.contains(dreams.reset(seed=1, options={"observation": batch})[0])


def test_dreams_have_the_flat_spaces_of_the_real_environment(run: Path) -> None:
    real = ld.load(run).make_env()
    dream = gym.make("longdream/Dream-v0", checkpoint=run, observation="image", render_mode="rgb_array", **SMALL)
    assert dream.action_space == real.action_space and dream.observation_space.keys() == real.observation_space.keys()
    obs, _ = dream.reset(seed=0)
    for _ in range(3):
        assert dream.observation_space.contains(obs)
        obs = dream.step(dream.action_space.sample())[0]
    assert dream.render().shape[2] == 3


def test_sb3_takes_dreams_and_the_environment_itself(run: Path) -> None:
    dreams = ld.sb3_env(run, 2, observation="image", **SMALL)
    config = EnvConfig("NestedForDreams-v0", {"read_as": {"bag": 2}}, copies=2)
    with Signals() as signals, RealVec(config, 0, signals) as vec:
        for each in (dreams, vec):
            shown: Any = each.reset()
            space: Any = each.observation_space
            assert space["grid"] == spaces.MultiDiscrete([256] * 50) and space["bag/entry/kind"].nvec.tolist() == [4, 4]
            for _ in range(4):
                one = {key: value[0] for key, value in shown.items()}
                assert all(part.contains(one[key]) for key, part in space.items() if key != "goal/1")
                shown = each.step(np.array([each.action_space.sample() for _ in range(2)]))[0]
        row = vec.worlds[0].reset()
        assert data_equivalence(seen(vec.spec, row.obs)["grid"], row.obs["grid"].reshape(1, 50))


def test_the_commands_take_it(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "dream.gif")
    assert cli.main(["dream", str(run), "--context", "9", "--episodes", "1", "--out", out]) == 0
    said = capsys.readouterr().out
    assert (
        "4 frames" in said and "so short that M is shown 3 in place of 9" in said and "'grid' dreamt wrongly in" in said
    )
    assert cli.main(["evaluate", str(run), "--episodes", "2"]) == 0
    flags = ["--env.kwargs.read_as.bag", "2", "--env.kwargs.act_as.wheel", "4", "--env.kwargs.read_as.grid", "vector"]
    capsys.readouterr()
    assert cli.main(["check-env", "NestedForDreams-v0", *flags, "--steps", "20"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "grid as a vector of 50" in said and "wheel: 1 number, unbounded, as -4 to 4" in said


def test_training_begins_with_the_line(tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--learn.steps", "48", "--learn.prefill", "40", "--evaluate.every", "0", "--evaluate.final_episodes", "2"]
    flags = ["--env.kwargs.read_as.bag", "2", "--env.kwargs.act_as.wheel", "4"]
    command = ["train", "tiny", "--env", "NestedForDreams-v0", *short]
    assert cli.main([*command, "--name", "x", *flags]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("NestedForDreams-v0: reads ")]
    assert len(lines) == 1 and "goal/1 as one of 3" in lines[0] and "acts by buttons: 3 bits" in lines[0]
    assert cli.main([*command, "--name", "y", "--env.kwargs.act_as.wheel", "4"]) == 2
    assert "'bag' is a Sequence, of any length: say how many" in capfd.readouterr().err


def test_an_environment_that_is_read_otherwise_does_not_fit(run: Path) -> None:
    agent = ld.load(run)
    for flags, what in (
        (
            {"read_as.grid": "vector"},
            r"'grid' is a vector .* knows 5 x 5 x 2 categories of 256 .*read_as.grid categories",
        ),
        ({"read_as.words": 3}, "read_as.words = 3"),
    ):
        with pytest.raises(UserError, match=what):
            check_fit(World("NestedForDreams-v0", 1, 0, {"read_as.bag": 2, "act_as.wheel": 4.0, **flags}), agent.spec)
    assert EnvSpec.from_json(agent.spec.to_json()) == agent.spec
    two = EnvSpec({"eye": KINDS["eye"]}, agent.spec.action)
    assert "has 2 channels" in cannot_be_uploaded(two) and "sees bag" in cannot_be_uploaded(agent.spec)
