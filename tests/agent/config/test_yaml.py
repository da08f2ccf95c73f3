"""YAML of a stranger: what would take all time or memory, or says nothing, is refused at once and in one line."""

import time
from pathlib import Path

import pytest
import yaml

from longdream.agent.config import flags, options
from longdream.envs.contract import UserError

BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 28))
REFUSED = {
    "aliases of aliases": BOMB,
    "aliases in lists": "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "merged aliases": "a: &a {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*a, *a], k{i}: *a}}\n" for i in range(9_000)),
    "a mapping in itself": "worldmodel: &e {worldmodel: *e}\n",
    "a list in itself": "env: &e [*e]\n",
    "a key in itself": "? &e [*e]\n: 1\n",
    "brackets": "env: " + "[" * 5000 + "]" * 5000,
    "open brackets": "[" * 100_000,
    "braces": "env: " + "{a: " * 3000 + "}" * 3000,
    "blocks": "\n".join(" " * i + "a:" for i in range(500)),
    "dashes": "- " * 5000 + "a",
    "many values": "env: [" + "1, " * 30_000 + "]",
    "a long number": "seed: " + "9" * 5000,
    "a long hexadecimal number": "seed: 0x" + "f" * 100_000,
    "no such day": "seed: 2024-99-99",
    "no such time": "seed: 2024-01-01 99:99:99",
    "an unknown alias": "seed: *nothing",
    "a tag of Python": "seed: !!python/object/apply:os.system [id]",
    "a list as key": "? [1]\n: 1\n",
    "binary that is none": "seed: !!binary 'é'",
    "control characters": "seed: \x07",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a megabyte": "#" * (1 << 20) + "\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(REFUSED[name])
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        options.load(str(path))
    assert time.monotonic() - began < 10
    assert len(str(refused.value)) < 700 and str(path) in str(refused.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_says_so_too(name: str) -> None:
    if name in ("control characters", "two documents", "a megabyte"):  # which a shell would not pass, or which is empty
        return
    with pytest.raises(UserError, match="cannot be read"):
        flags.read_yaml("env.kwargs", REFUSED[name])


def test_anchors_may_still_be_used() -> None:
    assert flags.parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: [*a, *a]}") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": [{"x": 1}, {"x": 1}]},
    }
    assert flags.parse_yaml("[1e-3, 12:30, 0x1F, -7, .5, inf]")[:5] == [0.001, "12:30", 31, -7, 0.5]


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    shared = [1, 2]
    config = options.update(options.load("tiny"), {"env.kwargs": {"one": shared, "other": shared, "größe": "日本"}})
    (tmp_path / "config.yaml").write_text(options.dump(config), encoding="ascii")
    assert options.load(str(tmp_path / "config.yaml")) == config


def test_a_value_in_a_message_is_short() -> None:
    with pytest.raises(UserError) as refused:
        options.update(options.load("tiny"), {"seed": "x" * 10_000 + "\x1b[2J"})
    assert len(str(refused.value)) < 400


def test_yaml_errors_are_of_one_kind() -> None:
    with pytest.raises(yaml.YAMLError):
        flags.parse_yaml("2024-99-99")


def test_a_file_builds_on_a_preset(tmp_path: Path) -> None:
    """`preset: NAME`: what the file does not say is as in that preset, which may itself build on one."""
    path = tmp_path / "mine.yaml"
    path.write_text("preset: quickstart-long\nenv:\n  kwargs: {corridor: 20}\nseed: 4\n")
    long = options.load("quickstart-long")
    expected = options.update(long, {"env.kwargs": {"corridor": 20}, "seed": 4})
    assert options.load(str(path)) == expected != long
    path.write_text("preset: quikstart\n")
    with pytest.raises(UserError, match="unknown preset 'quikstart': did you mean quickstart"):
        options.load(str(path))
    path.write_text(f"preset: {path}\n")  # only a preset: a file elsewhere may have changed since
    with pytest.raises(UserError, match="unknown preset"):
        options.load(str(path))


def test_the_larger_mazes_are_learned_as_the_smallest_is() -> None:
    small = options.load("memory-maze-9x9")
    for size in (11, 13, 15):
        config = options.load(f"memory-maze-{size}x{size}")
        names = {"env.id", "evaluate.env"}
        changed = {
            name for name in options.fields() if options.field_value(config, name) != options.field_value(small, name)
        }
        assert changed == names and all(f"{size}x{size}" in options.field_value(config, name) for name in names)
