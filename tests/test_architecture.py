"""Rules about the source as a whole: which way imports point, what may not be used, how long a file may be.

They read the syntax tree, so an import inside a function or behind TYPE_CHECKING counts like any other.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# Package -> the packages of the project that it may import, itself included: envs <- agent -> controller -> worldmodel.
MAY_IMPORT = {
    "agent": {"agent", "controller", "envs", "worldmodel"},
    "controller": {"controller", "worldmodel"},
    "envs": {"envs"},
    "worldmodel": {"worldmodel"},
}
DISTRIBUTION_OF = {"PIL": "pillow", "yaml": "pyyaml", "triton": "torch", "mlflow": "mlflow-skinny"}
"""(The CUDA builds of torch bring Triton.)"""
OPTIONAL = ("maze", "video", "minerl", "sweep", "onnx", "play", "wandb", "mlflow")
"""Extras whose packages the project imports when they are asked for."""
# Distribution -> the import that needs it: the project itself never names it.
NEEDED_BY = {"tensorboard": "torch.utils.tensorboard", "onnx": "torch.onnx", "onnxscript": "torch.onnx"}
MAX_LINES = 500


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) for each import; `package` is the dotted package that holds the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).strip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def wrong_way(tree: ast.AST, package: str) -> list[str]:
    allowed = MAY_IMPORT[package.split(".")[0]]
    names = [(line, name.split(".")) for line, name in imports(tree, f"longdream.{package}")]
    tops = [(line, parts[1]) for line, parts in names if parts[0] == "longdream" and len(parts) > 1]
    return [f"line {line} imports {top}" for line, top in tops if top in MAY_IMPORT and top not in allowed]


def unpickling(tree: ast.AST) -> list[str]:
    """Lists what could run code out of a file: pickle and its kin, torch.load, allow_pickle, unsafe YAML loaders."""
    modules = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = {"torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
    found = [
        f"line {line} imports {name}"
        for line, name in imports(tree, "")
        if name.split(".")[0] in modules or name in calls
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in calls:
            found.append(f"line {node.lineno} uses {ast.unparse(node)}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"line {node.value.lineno} passes allow_pickle={ast.unparse(node.value)}")
    return found


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def declared(*extras: str) -> set[str]:
    """What the project needs; or what extras add."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    texts = [text for extra in extras for text in optional[extra]] if extras else project["dependencies"]
    return {canonicalize_name(Requirement(text).name) for text in texts} - {"longdream"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    files = sources(package)
    assert files, f"no source in {package}/"
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in files
        if (wrong := wrong_way(ast.parse(path.read_text()), package_of(path)))
    }
    assert not found


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("envs", "import longdream.agent.train"),
        ("envs", "def f():\n    from longdream.worldmodel import scan"),
        ("worldmodel", "import importlib\nimportlib.import_module('longdream.controller.returns')"),
        ("controller", "if TYPE_CHECKING:\n    from longdream.envs.contract import Row"),
    ],
)
def test_a_wrong_import_is_seen(package: str, source: str) -> None:
    assert wrong_way(ast.parse(source), package)


def test_relative_imports_stay_in_their_package() -> None:
    tree = ast.parse("from . import walls\nfrom .walls import Wall\nfrom ..make import World\nfrom .. import agent")
    names = [name for _, name in imports(tree, "longdream.envs.maze")]
    assert names == [f"longdream.envs.{name}" for name in ("maze.walls", "maze.walls.Wall", "make.World", "agent")]
    assert not wrong_way(tree, "envs.maze")


def test_importing_envs_is_light() -> None:
    heavy = ["torch", "mujoco", "dm_control", "memory_maze", "labmaze", "numba", "matplotlib", "tensorboard"]
    code = f"import sys, longdream.envs; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_nothing_unpickles() -> None:
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sources(*MAY_IMPORT)
        if (wrong := unpickling(ast.parse(path.read_text())))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from torch import load",
        "torch.load('weights.pt', weights_only=True)",
        "np.load('rows.npy', allow_pickle=True)",
        "np.load('rows.npy', allow_pickle=flag)",
        "yaml.load(text, Loader)",
    ],
)
def test_unpickling_is_seen(source: str) -> None:
    assert unpickling(ast.parse(source))


def test_no_test_folder_is_a_package() -> None:
    # a folder of tests with an __init__.py would be imported by its bare name, in place of a user's own package
    assert sorted((ROOT / "tests").rglob("__init__.py")) == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*MAY_IMPORT, "tests")}
    assert {str(path): lines for path, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_dependencies_are_those_that_are_imported() -> None:
    trees = [(ast.parse(path.read_text()), package_of(path)) for path in sources(*MAY_IMPORT)]
    names = {name for tree, package in trees for _, name in imports(tree, package)}
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"longdream"}
    imported = {canonicalize_name(DISTRIBUTION_OF.get(top, top)) for top in tops}
    imported |= {dist for dist, user in NEEDED_BY.items() if any(name.startswith(user) for name in names)}
    optional = declared(*OPTIONAL)
    assert not declared() & optional
    assert imported - declared() - optional == set(), "imported but not declared in pyproject.toml"
    assert (declared() | optional) - imported == set(), "declared in pyproject.toml but imported nowhere"


def test_what_an_extra_brings_is_imported_where_it_is_needed() -> None:
    """And not when a module is imported that works without it."""
    optional = {name for name in DISTRIBUTION_OF if DISTRIBUTION_OF[name] in declared(*OPTIONAL)}
    optional |= {name.replace("-", "_") for name in declared(*OPTIONAL)}
    modules = (
        "cli.evaluate",
        "cli.sweep",
        "library.export",
        "train.video",
        "evaluation.similarity",
        "evaluation.baselines.sb3",
    )
    code = "import sys; import " + ", ".join(f"longdream.agent.{module}" for module in modules)
    code += f"; print(*[name for name in {sorted(optional)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_dependency_has_an_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==" for pin in pins)
    pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert declared() | declared(*OPTIONAL, "docs", "dev") <= set(pinned)
    # CUDA libraries are pinned by torch itself and a local tag would name one build: either would break other machines.
    assert pinned["torch"] == "==2.13.0"
    assert not [name for name in pinned if name.startswith("nvidia")]


# -- how large things may grow ----------------------------------------------------------------------------------------

MAX_MODULES = 15
MAX_AGENT_ENTRIES = 12
MAX_OPTIONS = 105
MAX_PARALLEL = 0.04
COMMAND_TO_UPDATE = ("agent/cli/main.py", "agent/train/trainer.py", "agent/core/agent.py")
"""What one reads from `longdream train` to an update of V, M and C; docs/architecture.md names them."""
OLD_NAMES = {
    "Consequence", "Part", "Sight", "Turned", "blank", "bound", "centred", "decisive", "finest", "fineness", "found",
    "frames_together", "keyed", "landing", "longest", "motion", "pace", "phases", "recorded", "see_latents", "sight",
    "slow_rate", "told",
}  # fmt: skip
"""Names that were replaced in 0.2 by the field's (docs/history)."""


def parallel_assignments(tree: ast.AST) -> tuple[int, int]:
    """Assignments of several values to several names in one statement, and all assignments."""
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)]
    several = ast.Tuple | ast.GeneratorExp | ast.ListComp | ast.IfExp
    parallel = [
        node
        for node in assignments
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, several)
    ]
    return len(parallel), len(assignments)


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that the code gives: of variables, attributes, arguments, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def test_folders_are_small() -> None:
    folders = {path.parent for path in sources(*MAY_IMPORT, "tests")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}
    entries = [path.name for path in (ROOT / "agent").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_AGENT_ENTRIES, entries


def test_from_the_command_to_the_update_is_short() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert [path for path in COMMAND_TO_UPDATE if path not in page] == []
    assert sum(len((ROOT / path).read_text().splitlines()) for path in COMMAND_TO_UPDATE) <= 900


def test_options_are_few() -> None:
    from longdream.agent.config import options

    assert len(options.fields()) <= MAX_OPTIONS


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_one_statement_is_one_thought(package: str) -> None:
    counts = [parallel_assignments(ast.parse(path.read_text())) for path in sources(package)]
    assert sum(parallel for parallel, _ in counts) < MAX_PARALLEL * sum(total for _, total in counts)


def test_parallel_assignments_are_seen() -> None:
    tree = ast.parse("a, b = 1, 2\nc, d = f()\ne: int = 3\ng, h = (x for x in 'ab')\na, b = b, a")
    assert parallel_assignments(tree) == (3, 5)


def test_old_names_are_gone() -> None:
    used = {
        f"{path.relative_to(ROOT)}:{line}": name
        for path in sources(*MAY_IMPORT)
        for line, name in names_in(ast.parse(path.read_text()))
        if name in OLD_NAMES
    }
    assert used == {}
