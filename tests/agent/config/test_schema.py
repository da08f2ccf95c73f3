"""What a field says of itself: its range, the runs that it concerns, whether a resumed run may change it."""

from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from longdream.agent.config import flags, options
from longdream.agent.config.options import Setting
from longdream.agent.config.schema import Config, EnvConfig, EvaluateConfig, Kind

KINDS = set(get_args(Kind))


def ranges(hint: Any) -> list[Any]:
    """The bounds that stand at a type, or at what it holds."""
    own = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Ge | Gt | Le | Lt | Interval)]
    return own + [bound for part in get_args(hint) for bound in ranges(part)]


def is_number(hint: Any) -> bool:
    """Whether a type is a number, or holds some."""
    return hint in (int, float) or any(is_number(part) for part in get_args(hint))


def test_every_number_has_a_range() -> None:
    numbers = {name: field.hint for name, field in options.fields().items() if is_number(field.hint)}
    assert {"seed", "learn.explore", "worldmodel.blocks", "video.lengths", "forcing.prefix"} <= numbers.keys()
    assert len(numbers) > 60
    assert [name for name, hint in numbers.items() if len(ranges(hint)) != 1] == []
    assert [name for name, field in options.fields().items() if name not in numbers and ranges(field.hint)] == []


def test_every_default_is_in_its_range() -> None:
    for name, field in options.fields().items():
        value = options.field_value(Config(), name)
        assert flags.read(name, value, field.hint) == value


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("seed", KINDS),
        ("kind", KINDS),
        ("cuda_graphs", KINDS),
        ("world", {"imagination"}),
        ("env.id", {"online"}),
        ("env.kwargs", {"online"}),
        ("replay.batch", {"online", "imagination"}),
        ("replay.capacity", {"online"}),  # a field narrows what its group says
        ("video.data", {"video"}),
        ("encoder.depth", {"online", "video"}),
        ("worldmodel.layers", {"online", "video"}),
        ("forcing.history", {"online", "video"}),
        ("controller.gamma", {"online", "imagination"}),
        ("learn.steps", {"online"}),
        ("learn.updates", {"imagination", "video"}),
        ("evaluate.every", {"online"}),
        ("evaluate.times", {"imagination", "video"}),
        ("evaluate.save_seconds", KINDS),
    ],
)
def test_the_kinds_of_runs_that_a_field_concerns(name: str, kinds: set[str]) -> None:
    assert set(options.fields()[name].kinds) == kinds
    assert all(field.kinds and set(field.kinds) <= KINDS for field in options.fields().values())


def test_what_a_resumed_run_may_change() -> None:
    may = {name for name, field in options.fields().items() if field.on_resume}
    single = {"device", "threads", "learn.steps", "learn.updates", "video.data", "log.to"}
    assert may == single | {f"evaluate.{name}" for name in EvaluateConfig.__dataclass_fields__}


def test_an_entry_of_a_dict_is_of_the_kinds_of_its_field() -> None:
    assert isinstance(options.setting("env.kwargs.corridor"), Setting)
    assert options.setting("env.kwargs.corridor") == options.fields()["env.kwargs"]
    assert options.entry("controller.kwargs.population") == ("controller.kwargs", "population")
    assert options.entry("controller.gamma") == ("controller.gamma", "")
    assert options.entry("env.kwargs.read_as.goal/a.b") == ("env.kwargs", "read_as.goal/a.b")
    assert options.entry("env.id.x") == ("env.id.x", "")
    assert options.setting("env.kwargs.read_as.board").on_resume and options.setting("env.kwargs.act_as.a").on_resume


def test_where_an_agent_is_evaluated() -> None:
    config = options.update(Config(), {"env.kwargs": {"corridor": 3}})
    assert config.evaluation_env == config.env
    elsewhere = options.update(config, {"evaluate.env": "CartPole-v1"})
    assert elsewhere.evaluation_env == EnvConfig("CartPole-v1")
    limited = options.update(elsewhere, {"env.kwargs.max_episode_steps": 9, "env.kwargs.corridor": 3})
    assert limited.evaluation_env == EnvConfig("CartPole-v1", {"max_episode_steps": 9})
    read = options.update(elsewhere, {"env.kwargs.read_as.obs": "vector", "env.kwargs.corridor": 3})
    assert read.evaluation_env == EnvConfig("CartPole-v1", {"read_as.obs": "vector"})
