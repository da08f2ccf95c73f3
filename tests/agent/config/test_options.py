"""From words to a Config: YAML files, names with dots, and what cannot be read as either."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from longdream import __version__
from longdream.agent.config import flags, options
from longdream.agent.config.schema import Config
from longdream.envs.contract import UserError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("worldmodel: {layres: 3}", "unknown setting worldmodel.layres: did you mean worldmodel.layers"),
        ("worldmodel: 3", "worldmodel is a group of settings"),
        ("layers: 3", "unknown setting layers: did you mean worldmodel.layers or controller.layers?"),
        ("seed: [1]", "seed [1]: should be a valid integer"),
        ("seed: true", "seed True: should be a number"),
        ("learn: {train_ratio: much}", "learn.train_ratio 'much': should be a valid number"),
        ("device: gpu", "device 'gpu': should be 'auto', 'cpu' or 'cuda': did you mean cpu?"),
        ("kind: film", "kind 'film': should be 'online', 'imagination' or 'video'"),
        ("env: {kwargs: 3}", "env.kwargs 3: should be a valid dictionary"),
        ("learn: {explore: 2}", "learn.explore 2: must be at most 1"),
        ("- 3", "holds a list: it must map names of settings to values"),
        ("a: b: c", "is no YAML file"),
    ],
)
def test_a_file_that_is_no_config(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        options.load(str(path))
    assert str(path) in str(caught.value) and problem in str(caught.value)


def test_a_file_may_leave_things_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# nothing\n")
    assert options.load(str(path)) == Config()
    path.write_text("learn: {encoder_rate: 1e-4}\nenv: {kwargs: {corridor: 5}}\nworldmodel: {blocks: [1, 1]}")
    config = options.load(str(path))
    assert config.learn.encoder_rate == 1e-4  # which YAML 1.1 takes for a string
    assert config.env.kwargs == {"corridor": 5} and config.worldmodel.blocks == (1, 1)


def test_a_file_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(options.dump(Config()))
    assert yaml.safe_load(path.read_text())["version"] == __version__
    assert options.load(str(path)) == Config()
    major, minor, *_ = __version__.split(".")
    path.write_text(f"version: {major}.{minor}.99\nseed: 3\n")  # a patch changes no setting
    assert options.load(str(path)).seed == 3


@pytest.mark.parametrize("rest", ["", "seed: 3\n", "how_slow: 3\n"])
def test_a_file_of_another_version_is_refused(rest: str, tmp_path: Path) -> None:
    """Whatever else it holds: unknown names would only be a consequence."""
    path = tmp_path / "config.yaml"
    path.write_text(f"version: 0.1.0\n{rest}")
    with pytest.raises(UserError) as caught:
        options.load(str(path))
    expected = f"{path} was written by longdream 0.1.0, this is {__version__}: use that version to read it"
    assert str(caught.value) == expected


def test_entries_of_a_dict_have_names() -> None:
    config = options.update(Config(), {"env.kwargs": {"corridor": 5, "size": 16}})
    other = options.update(config, {"env.kwargs.corridor": 24, "env.kwargs.doors": 3})
    assert other.env.kwargs == {"corridor": 24, "size": 16, "doors": 3}
    assert config.env.kwargs == {"corridor": 5, "size": 16}  # the one that was given stays as it is
    assert options.update(config, {"controller.kwargs.population": 6}).controller.kwargs == {"population": 6}
    for name in ("env.kwarg.corridor", "env.id.corridor", "video.lengths.first"):
        with pytest.raises(UserError, match=f"unknown setting {re.escape(name)}"):
            options.update(config, {name: 3})


def test_another_environment_or_controller_does_not_inherit_arguments() -> None:
    settings = {"env.kwargs.corridor": 5, "controller.kind": "planner", "controller.kwargs.elites": 2}
    config = options.update(Config(), settings)
    other = options.changed(config, {"env.id": "CartPole-v1", "controller.kind": "tree"})
    assert other.env.kwargs == {} and other.controller.kwargs == {}
    named = {"env.id": "CartPole-v1", "env.kwargs.sutton_barto_reward": True, "controller.kwargs.elites": 3}
    other = options.changed(config, named)
    assert other.env.kwargs == {"sutton_barto_reward": True} and other.controller.kwargs == {"elites": 3}
    same = options.changed(config, {"env.id": config.env.id, "seed": 1})
    assert same.env.kwargs == {"corridor": 5} and same.controller.kwargs == {"elites": 2}


def test_flags_reach_the_config() -> None:
    words = ["--seed=3", "--env", "CartPole-v1", "--learn.encoder-rate", "1e-4", "--worldmodel.blocks", "2", "1"]
    words += ["--forcing.ramp", "false", "--env.kwargs.a", "1", "--env.kwargs.b", "[x, 2]", "--device", "cpu"]
    _, given = flags.split(words, options.hint)
    assert given is not None
    config = options.update(options.load("quickstart"), options.from_flags(given))
    assert config.seed == 3 and config.env.id == "CartPole-v1" and config.learn.encoder_rate == 1e-4
    assert config.worldmodel.blocks == (2, 1) and config.forcing.ramp is False and config.device == "cpu"
    assert config.env.kwargs == {"corridor": 12, "doors": 2, "a": 1, "b": ["x", 2]}
    config = options.changed(options.load("quickstart"), options.from_flags(given))
    assert config.env.kwargs == {"a": 1, "b": ["x", 2]}  # the preset's are those of its own environment


def test_a_file_of_0_1_is_refused_in_one_line(tmp_path: Path) -> None:
    """Its configurations did not say a version, and have settings by other names."""
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\nexact: false\nrecorded: false\nlearn: {ratio: 8.0}\n")
    with pytest.raises(
        UserError, match=r"unknown setting exact: .*; longdream 0\.1 reads the files that it wrote, this"
    ):
        options.load(str(path))
    path.write_text("version: 0.3.0\nlearn: {train_ration: 8.0}\n")
    with pytest.raises(UserError, match=r"did you mean learn\.train_ratio or learn\.encoder_rate\?$"):
        options.load(str(path))


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """In files and flags alike: YAML 1.1 took 1e-3 for a word, 12:30 for 750 and 010 for 8."""
    texts = {
        "1e-3": 1e-3,
        "1e5": 1e5,
        "inf": float("inf"),
        "-.5": -0.5,
        "0x1f": 31,
        "0o17": 15,
        "010": 10,
        "-3": -3,
        "2.": 2.0,
    }
    texts |= {"12:30": "12:30", "1_000": "1_000", "a1": "a1", "true": True, "null": None}
    path = tmp_path / "mine.yaml"
    for text, value in texts.items():
        path.write_text(f"env: {{kwargs: {{x: {text}}}}}\n")
        read = options.load(str(path)).env.kwargs["x"]
        flag = options.from_flags({"env.kwargs.x": text})["env.kwargs.x"]
        assert read == flag == value and type(read) is type(flag) is type(value), text


@pytest.mark.parametrize(
    ("text", "value"), [("1e3", 1000), ("0x1F", 31), ("0o17", 15), ("1_0", 10), ("-7", -7), (["1e1", "2"], (10, 2))]
)
def test_a_whole_number_may_be_written_in_any_way(text: Any, value: Any) -> None:
    hint = int if isinstance(value, int) else tuple[int, ...]
    assert flags.read("--n", text, hint) == value and flags.read("--n", text, hint | None) == value


@pytest.mark.parametrize("text", ["1.5", "inf", "nan", "1e400", "0b1", "9" * 60, "", "-", "1e", "true"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--n "):
        flags.read("--n", text, int)


def test_json_in_files_may_be_indented_by_tabs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('{\n\t"seed":\t3,\n\t"env": {\n\t\t"kwargs": {"corridor": 1e1, "word": "a\\tb"}\n\t}\n}')
    config = options.load(str(path))
    assert config.seed == 3 and config.env.kwargs == {"corridor": 10, "word": "a\tb"}


def test_a_folder_is_no_file_of_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(UserError, match=r"mine\.yaml is a folder, not a file"):
        options.load(str(tmp_path / "mine.yaml"))
