"""One word for the size of V, M and C; and the recipe for environments without a preset."""

from pathlib import Path

import pytest

from longdream.agent.cli.main import main, prepare
from longdream.agent.config import options, sizes
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.envs import World
from longdream.envs.contract import UserError


@pytest.mark.parametrize("size", sizes.SIZES)
def test_every_size_makes_an_agent(size: str) -> None:
    config = options.update(options.load("recipe"), {"size": size})
    world = World(config.env.id, 1, 0, config.env.kwargs)
    agent = Agent(options.update(config, {"device": "cpu"}), world.spec)
    assert agent.config.worldmodel.width == sizes.SIZES[size]["worldmodel.width"]


def test_sizes_grow() -> None:
    for name in next(iter(sizes.SIZES.values())):
        values = [size[name] for size in sizes.SIZES.values()]
        assert values == sorted(values)


def test_what_is_named_beside_a_size_holds(tmp_path: Path) -> None:
    named = {"worldmodel.width": 96, "size": "small", "worldmodel.num_heads": 6}
    flags = {name: str(value) for name, value in named.items()}
    for config in (options.update(Config(), named), options.update(Config(), options.from_flags(flags))):
        assert (config.worldmodel.width, config.worldmodel.num_heads, config.heads.hidden) == (96, 6, 256)
    file = tmp_path / "mine.yaml"
    file.write_text("preset: recipe\nsize: small\nworldmodel: {width: 96}\n", encoding="utf-8")
    assert options.load(str(file)).worldmodel.width == 96
    assert options.load(str(file)).encoder.channels == 256
    with pytest.raises(UserError, match="size = hug: there are tiny, small"):
        options.update(Config(), {"size": "hug"})


def test_the_size_of_a_run_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size cannot change in a run that goes on"):
        prepare(None, {"size": "small"}, None, tmp_path / "run")


def test_an_environment_alone_is_trained_by_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config, label = prepare(None, {"env.id": "CartPole-v1"}, None, None)
    recipe = options.load("recipe")
    assert label == "recipe" and config.forcing == recipe.forcing and config.learn == recipe.learn
    assert config.worldmodel.width == sizes.SIZES["tiny"]["worldmodel.width"]  # on a CPU
    chosen, _ = prepare("recipe", {"env.id": "CartPole-v1", "size": "medium"}, None, None)
    assert chosen.worldmodel.width == 256
    assert main(["train", "--env", "CartPole-v1", "--size", "enormous"]) == 2
    assert "size = enormous: there are tiny, small, medium, large" in capsys.readouterr().err
    assert main(["train", "--size", "small"]) == 2
    assert "a .yaml file or --env ID" in capsys.readouterr().err


def test_the_size_follows_device_and_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = options.load("recipe")
    assert sizes.default_size(options.update(recipe, {"device": "cpu"})) == "tiny"
    monkeypatch.setattr("longdream.agent.core.device.resolve_device", lambda name: "cuda")
    assert sizes.default_size(recipe) == "medium"  # Recall shows images
    assert sizes.default_size(options.changed(recipe, {"env.id": "CartPole-v1"})) == "small"
