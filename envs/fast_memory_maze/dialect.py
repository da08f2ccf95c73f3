"""One source for three compilers: body.py, rules.py and view.py run under numba, under Triton and as plain torch.

These files contain only arithmetic, comparisons, `&`, `|`, loops, and calls of the primitives below. Each backend
(cpu.py, cuda.py, plain.py) defines the primitives in its own terms, its *dialect*:

    where(c, a, b)    minimum maximum absolute sqrt sin cos log2    on numbers
    floor(x)          the largest integer not above x
    fetch(array, i)   element i of a flat array
    any_lane(c)       whether c holds in any lane; decides whether a loop continues or a branch is taken
    @inner            compiles a function

Under numba the functions take scalars: one copy or one pixel after another. Under Triton and torch they take blocks,
with a lane for each copy or pixel. A loop then runs until every lane has finished, and a branch is taken if any lane
needs it. A value that changes within a loop or a branch must therefore be selected lane by lane, with `where`.
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
    dialect: str, primitives: dict[str, Any], constant: Callable[[float], Any] | None = None
) -> tuple[ModuleType, ModuleType]:
    """Load the modules (rules, view) with these primitives.

    Args:
        dialect: name of the backend, unique among backends.
        primitives: what the names in the module docstring mean there.
        constant: wraps the modules' numeric constants, if the compiler requires that.
    """
    body = _load("body", dialect, primitives, constant)
    of_body = {name: value for name, value in vars(body).items() if name[0] != "_"}
    rules = _load("rules", dialect, {**primitives, **of_body}, constant)
    return rules, _load("view", dialect, primitives, constant)


def digest() -> int:
    """A hash of the sources, for the keys of compilers' caches."""
    text = b"".join((HERE / f"{name}.py").read_bytes() for name in SOURCES)
    return int.from_bytes(hashlib.sha256(text).digest()[:6])


def _load(name: str, dialect: str, primitives: dict[str, Any], constant: Callable[[float], Any] | None) -> ModuleType:
    full_name = f"{__package__}.{name}_{dialect}"
    spec = importlib.util.spec_from_file_location(full_name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(primitives)
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    if constant is not None:
        numbers = {k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, int | float)}
        vars(module).update({key: constant(value) for key, value in numbers.items()})
    return module
