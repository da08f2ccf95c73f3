"""One source, several compilers: body.py, rules.py and view.py hold for numba, for Triton and for plain torch.

They are written in arithmetic, comparisons, `&`, `|`, loops and a few words that this module's callers give a meaning:

    where(c, a, b)    minimum maximum absolute sqrt sin cos log2    of numbers
    floor(x)          the whole number below, as an integer
    fetch(array, i)   element i of a flat array
    some(c)           does it hold anywhere? decides whether a loop goes on or a branch is taken
    @inner            compiles a function

To numba they are functions of single numbers, one copy or pixel after another; to Triton and torch of blocks of them,
and then a loop runs until every lane is done and a branch is taken if any lane needs it. So a value that changes in a
loop or branch must be guarded lane by lane, with `where`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
SOURCES = ("scene", "body", "rules", "view")


def load(
    dialect: str, words: dict[str, Any], constant: Callable[[float], Any] | None = None
) -> tuple[ModuleType, ModuleType]:
    """The modules (rules, view) in the dialect of these words. `constant` wraps their numbers, if need be."""
    body = _load("body", dialect, words, constant)
    rules = _load("rules", dialect, {**words, **{k: v for k, v in vars(body).items() if k[0] != "_"}}, constant)
    return rules, _load("view", dialect, words, constant)


def digest() -> int:
    """A number that changes with the sources: what compilers cache under."""
    text = b"".join((HERE / f"{name}.py").read_bytes() for name in SOURCES)
    return int.from_bytes(hashlib.sha256(text).digest()[:6])


def _load(name: str, dialect: str, words: dict[str, Any], constant: Callable[[float], Any] | None) -> ModuleType:
    full = f"{__package__}.{name}_{dialect}"
    spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(words)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    if constant is not None:
        numbers = {k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, int | float)}
        vars(module).update({key: constant(value) for key, value in numbers.items()})
    return module
