"""Annotations of configuration fields: their range, and the kinds of runs that they apply to.

    width: Annotated[int, AT_LEAST_1] = 64
    dreamt: Annotated[float, AT_LEAST_0, Mode("online")] = 0.0

Ranges are those of the package annotated-types; pydantic checks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from annotated_types import Ge, Gt, Interval
from pydantic import TypeAdapter, ValidationError

AT_LEAST_0 = Ge(0)
AT_LEAST_1 = Ge(1)
AT_LEAST_2 = Ge(2)
POSITIVE = Gt(0)
SHARE = Interval(ge=0, le=1)

T = TypeVar("T")


class Mode:
    """The kinds of runs that a field, or a group of fields, applies to: `online`, `imagination`, `video`. Without this
    annotation it applies to all."""

    def __init__(self, *kinds: str):
        self.kinds = kinds


@dataclass(frozen=True)
class OnResume:
    """This field, or this group of fields, may change when a run is resumed."""


def validated(kind: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """An instance of the dataclass `kind` from values of its fields, checked for type and range.

    Raises:
        ValueError: an unknown field or an invalid value, in one line that begins with `prefix` and the field's name.
    """
    names = getattr(kind, "__dataclass_fields__", {})
    for name in values:
        if name not in names:  # pydantic would ignore it
            raise ValueError(f"{prefix}.{name}: there is no such setting; there are {', '.join(names)}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{prefix}.{name} {first['input']!r}: {problem(error)}") from None


def problem(error: ValidationError) -> str:
    """The first problem, such as "must be at least 1"; in pydantic's words unless it is about a range."""
    first = error.errors()[0]
    limits = first.get("ctx", {})
    for key, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if key in limits:
            return f"must be {words} {limits[key]:g}"
    message = first["msg"].removeprefix("Input ").partition(", unable")[0]
    return message[:1].lower() + message[1:]
