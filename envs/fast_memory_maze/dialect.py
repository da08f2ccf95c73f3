"""One source, two compilers: the body's and the camera's equations as functions for numba, Triton or plain torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load(name: str, dialect: str, words: dict[str, Any]) -> ModuleType:
    full = f"{__package__}.{name}_{dialect}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    vars(module).update(words)
    spec.loader.exec_module(module)
    sys.modules[full] = module
    return module
