"""Help is quick: it imports none of what takes seconds."""

import inspect
import subprocess
import sys
from importlib import import_module
from typing import get_type_hints

import pytest

from longdream.agent import bench

LINES = {
    "evaluate --help": "usage: longdream evaluate RUN_FOLDER",
    "doctor --help": "usage: longdream doctor",
    "check-env --help": "usage: longdream check-env ENV",
    "dream --help": "--steps INT",
    "demo --help": "usage: longdream demo",
    "play --help": "--open BOOL",
    "watch --help": "usage: longdream watch WHAT",
    "baseline --help": "--evaluate_every INT",
    "collect --help": "--policy oracle|navigator|random",
    "train --help": "--worldmodel.mixer STR",
    "train tiny --help": "Every option, with its value in tiny",
    **{f"bench {name} --help": f"usage: longdream bench {name}" for name in bench.BENCHES},
    "bench --help": "world-model  Train M with each mixer",
}


@pytest.mark.parametrize(("line", "part"), LINES.items(), ids=LINES)
def test_help_imports_nothing_heavy(line: str, part: str) -> None:
    heavy = ["torch", "matplotlib", "stable_baselines3", "mujoco", "numba", "tensorboard"]
    code = f"import sys\nfrom longdream.agent.cli.main import main\ncode = main({line.split()})\n"
    code += f"print('heavy:', *[name for name in {heavy} if name in sys.modules])\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert part in done.stdout and done.stdout.endswith("heavy:\n") and not done.stderr


@pytest.mark.parametrize("name", bench.BENCHES)
def test_a_benchmark_is_declared_as_it_is(name: str) -> None:
    real = import_module(f"longdream.agent.bench.{bench.BENCHES[name]}").measure
    declared = bench.find(name)
    assert inspect.signature(declared) == inspect.signature(real) and declared.__doc__ == real.__doc__
    assert get_type_hints(declared) == get_type_hints(real)
