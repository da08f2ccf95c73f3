"""What lies in runs/presets can be read, written, built and run."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from longdream.agent.config import options, ranges
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.core.learner import Learner
from longdream.agent.data.replay import Replay
from longdream.agent.data.video.actions import discrete
from longdream.agent.train import video as video_loop
from longdream.envs.contract import EnvSpec, ObsSpec, UserError
from longdream.envs.make import World

PRESETS = sorted(options.presets())


def test_the_presets_are_there() -> None:
    assert {"quickstart", "quickstart-long", "tiny", "cartpole", "pendulum"} <= set(PRESETS)
    assert all(path.suffix == ".yaml" for path in options.PRESETS.iterdir() if path.is_file())


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
    named = dict(options.leaves(yaml.safe_load((options.PRESETS / f"{name}.yaml").read_text())))
    found = {key: ranges.get(config, key) for key in named}
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()} == named


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("video-")])
def test_a_preset_builds_an_agent(name: str, tmp_path: Path) -> None:
    config = options.load(name)
    config = dataclasses.replace(config, device="cpu")
    world = World(config.env.id, config.env.copies, config.seed, config.env.kwargs)
    agent = Agent(config, world.spec)
    carry, surprise = agent.observe(agent.initial(config.env.copies), world.reset())
    action = agent.act(carry, greedy=False)
    assert action.shape == (config.env.copies, world.spec.action.size) and surprise is not None
    replay = Replay(tmp_path, world.spec, config.env.copies, config.replay.capacity)
    ranges.check_clip(config, replay.longest_clip)
    world.close()


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("video-")])
def test_a_preset_for_video_builds_v_and_m(name: str) -> None:
    config = dataclasses.replace(options.load(name), device="cpu")
    size = config.video.size
    spec = EnvSpec({"image": ObsSpec("image", (size, size, 3))}, discrete(6))
    model = Learner(config, spec).model
    assert config.video.lengths and model.encoder(dict(image=torch.zeros(2, size, size, 3))).shape[0] == 2
    changed = dict(options.leaves(yaml.safe_load((options.PRESETS / f"{name}.yaml").read_text())))
    video_loop.check(options.update(config, {"video.data": "there"}), changed)


def test_every_number_has_a_range() -> None:
    numbers = {name for name, kind in options.fields().items() if kind in (int, float, tuple[int, ...])}
    assert set(ranges.RANGES) == numbers


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"replay.length": 1}, "replay.length = 1: must be at least 2"),
        ({"worldmodel.window": 0}, "worldmodel.window = 0: must be at least 1"),
        ({"worldmodel.layers": 0}, "worldmodel.layers = 0: must be at least 1"),
        ({"learn.steps": -1}, "learn.steps = -1: must be at least 1"),
        ({"learn.explore": 1.5}, "learn.explore = 1.5: must be between 0 and 1"),
        ({"learn.explore": float("nan")}, "learn.explore = nan: must be between 0 and 1"),
        ({"learn.encoder_rate": float("inf")}, "learn.encoder_rate = inf: must be at least 0"),
        ({"env.timeout_s": 0}, "env.timeout_s = 0.0: must be greater than 0"),
        ({"worldmodel.blocks": [1, 0]}, "worldmodel.blocks = 0: must be at least 1"),
        ({"worldmodel.blocks": []}, "worldmodel.blocks is empty"),
        ({"worldmodel.frames_together": 5}, "an agent acts after every frame; set it to 1"),
        ({"forcing.stream": "one", "forcing.prefix": 0.5}, "an agent's dreams begin at clean frames"),
        ({"worldmodel.heads": 3}, "worldmodel.heads = 3 does not divide worldmodel.width = 64"),
        ({"replay.starts": 0.7, "replay.surprise": 0.7}, "their sum must not exceed 1"),
        ({"heads.dreamt": 1.0, "controller.horizon": 1}, "set controller.horizon to at least 2"),
        ({"controller.decisive": 1.0}, "between 0 and 0.99"),
        ({"learn.prefill": 20_000}, "learn.steps = 20000: nothing is learned before step 20000"),
        ({"seed": -1}, "seed = -1: must be between 0 and"),
    ],
)
def test_numbers_that_make_no_sense(settings: dict, problem: str) -> None:
    ranges.check(Config())
    with pytest.raises(UserError) as told:
        ranges.check(options.update(Config(), settings))
    assert problem in str(told.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("worldmodel: {layres: 3}", "unknown setting worldmodel.layres: did you mean worldmodel.layers"),
        ("worldmodel: 3", "worldmodel is a group of settings"),
        ("layers: 3", "unknown setting layers: did you mean worldmodel.layers or controller.layers?"),
        ("seed: [1]", "seed [1]: should be a valid integer"),
        ("seed: true", "seed True: should be a number"),
        ("learn: {ratio: much}", "learn.ratio 'much': should be a valid number"),
        ("device: gpu", "device 'gpu': should be 'auto', 'cpu' or 'cuda': did you mean cpu?"),
        ("env: {kwargs: 3}", "env.kwargs 3: should be a valid dictionary"),
        ("learn: {explore: 2}", "learn.explore = 2.0: must be between 0 and 1"),
        ("- 3", "holds a list: it must map names of settings to values"),
        ("a: b: c", "is no YAML file"),
    ],
)
def test_a_file_that_is_no_config(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        options.load(str(path))
    assert str(path) in str(told.value) and problem in str(told.value)


def test_a_file_may_leave_things_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# nothing\n")
    assert options.load(str(path)) == Config()
    path.write_text("learn: {encoder_rate: 1e-4}\nenv: {kwargs: {corridor: 5}}\nworldmodel: {blocks: [1, 1]}")
    config = options.load(str(path))
    assert config.learn.encoder_rate == 1e-4  # which YAML 1.1 takes for a string
    assert config.env.kwargs == {"corridor": 5} and config.worldmodel.blocks == (1, 1)
