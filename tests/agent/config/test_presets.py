"""What lies in runs/presets can be read, written, built and run."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from longdream.agent.config import checks, options
from longdream.agent.config.sizes import expanded
from longdream.agent.core.agent import Agent
from longdream.agent.core.learner import Learner
from longdream.agent.data.replay import Replay
from longdream.agent.data.video.actions import discrete
from longdream.envs.contract import EnvSpec, ObsSpec
from longdream.envs.make import World

PRESETS = sorted(options.presets())


def test_the_presets_are_there() -> None:
    assert {"quickstart", "quickstart-long", "tiny", "cartpole", "pendulum"} <= set(PRESETS)
    assert all(path.suffix == ".yaml" for path in options.PRESETS.iterdir() if path.is_file())


def settings(name: str) -> dict:
    """What the file of a preset sets, by dotted name."""
    tree = yaml.safe_load((options.PRESETS / f"{name}.yaml").read_text())
    tree.pop("preset", None)
    return expanded(dict(options.leaves(tree)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is(name: str) -> None:
    path = options.PRESETS / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    assert 10 < len(options.presets()[name]) < 160


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_through_yaml_and_back(name: str, tmp_path: Path) -> None:
    config = options.load(name)
    (tmp_path / "config.yaml").write_text(options.dump(config))
    assert options.load(str(tmp_path / "config.yaml")) == config
    named = settings(name)
    values = {key: options.field_value(config, key) for key in named}
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()} == named


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_only_what_concerns_its_kind_of_run(name: str) -> None:
    named = settings(name)
    config = options.load(name)
    assert config.kind == ("video" if name.startswith("video-") else "online")
    checks.check_given(config, named)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("video-")])
def test_a_preset_builds_an_agent(name: str, tmp_path: Path) -> None:
    config = options.load(name)
    config = dataclasses.replace(config, device="cpu")
    world = World(config.env.id, 2, config.seed, config.env.kwargs)
    checks.check(config)
    agent = Agent(config, world.spec)
    carry, surprise = agent.observe(agent.initial(2), world.reset())
    action = agent.act(carry, greedy=False)
    assert action.shape == (2, world.spec.action.size) and surprise is not None
    replay = Replay(tmp_path, world.spec, config.env.copies, config.replay.capacity)
    checks.check_clip(config, replay.longest_clip)
    world.close()


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("video-")])
def test_a_preset_for_video_builds_v_and_m(name: str) -> None:
    config = dataclasses.replace(options.load(name), device="cpu")
    size = config.video.size
    spec = EnvSpec({"image": ObsSpec("image", (size, size, 3))}, discrete(6))
    model = Learner(config, spec).model
    assert config.video.lengths and model.encoder(dict(image=torch.zeros(2, size, size, 3))).shape[0] == 2
    checks.check(options.update(config, {"video.data": "there"}))
