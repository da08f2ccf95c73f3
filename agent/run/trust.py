"""What a run that is opened may execute: what is built in, or what its user has consented to (docs/security.md).

A configuration names code: its environment, controller, objective and mixer may be dotted paths, which are imported, or
an environment in another interpreter, which is started. What one types is consent. What a folder brings along is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from longdream.agent.config.flags import shown
from longdream.envs.contract import UserError

if TYPE_CHECKING:  # whose import takes seconds, and help is to be quick
    from longdream.agent.config.schema import Config, EnvConfig

CONTROLLERS = ("actor_critic", "planner", "tree", "evolution")
OBJECTIVES = ("flow", "mask", "prior", "teacher")
MIXERS = ("hybrid", "ssm", "ssm+local", "rotary", "rotary+local", "gru", "causal", "window")
SINKS = ("tensorboard", "wandb", "mlflow")
"""The words for `controller.kind`, `forcing.objective`, `worldmodel.mixer` and `log.to`, kept here so that nothing is
imported before it is judged. A test compares them with those that are known."""
ALGORITHMS = {
    "stable_baselines3": ("A2C", "DDPG", "DQN", "PPO", "SAC", "TD3"),
    "sb3_contrib": ("ARS", "CrossQ", "MaskablePPO", "QRDQN", "RecurrentPPO", "TQC", "TRPO"),
}
"""Algorithms of Stable-Baselines3 by their package."""
REACHING_OUT = ("callback", "tensorboard_log")
"""`controller.kwargs` by which an algorithm imports a module, or writes outside of the run."""
STARTING = ("python", "env", "kwargs", "environ")
"""`env.kwargs` by which longdream/MineRL-* starts something else than what LONGDREAM_MINERL_PYTHON names."""
PROGRAMS = re.compile(r"longdream/Remote-|GymV2\d")
"""Environments whose arguments name the program or the module that is run."""
MAX_BYTES = 1 << 20
"""Size of the list of trusted runs, at most."""

_state = {"consent": False}


def consent(given: bool) -> None:
    """Whether every run that this process opens is trusted: `--trust` on the command line."""
    _state["consent"] = given


def consented() -> bool:
    """Whether it is."""
    return _state["consent"]


def code_of(config: Config, loaded: bool = True) -> list[str]:
    """What the configuration would execute that is neither built in nor part of an installed package, in words.

    Args:
        loaded: modules that this process has imported already count as known: naming one imports nothing.
    """
    foreign = _environment("env.id", config.env, loaded)
    if config.evaluate.env:
        foreign += _environment("evaluate.env", config.evaluation_env, loaded)
    foreign += _class("controller.kind", config.controller.kind, CONTROLLERS)
    if ":" in config.controller.kind:
        kwargs = config.controller.kwargs
        foreign += [f"controller.kwargs.{key} = {kwargs[key]}" for key in REACHING_OUT if kwargs.get(key)]
    foreign += _class("forcing.objective", config.forcing.objective, OBJECTIVES)
    foreign += _class("worldmodel.mixer", config.worldmodel.mixer, MIXERS)
    for sink in config.log.to:
        foreign += _class("log.to", sink, SINKS)
    return foreign


def require(folder: Path, config: Config) -> None:
    """Let a run be opened whose code is built in, or was consented to; others are asked for on a terminal.

    Raises:
        UserError: there is no consent. The message says what would be run.
    """
    code = code_of(config)
    if not code:
        return
    what = shown("; ".join(code), 400)
    if not (_state["consent"] or _is_remembered(folder, config)):
        if not _asked(folder, what):
            raise UserError(
                f"{folder} would run code that is neither built in nor of an installed package: {what}; if you trust "
                f"it, add --trust (docs/security.md)"
            )
        _state["consent"] = True  # for what this command opens next
    remember(folder, config)
    find_modules_here()


def remember(folder: Path, config: Config) -> None:
    """Note that the user trusts this run as it is configured: it was made here, or there was consent.

    The note lies outside of the run, in longdream/trusted.json in XDG_CONFIG_HOME (or ~/.config). Where that cannot be
    written, there will be a question again.
    """
    if not code_of(config, loaded=False):
        return
    path = _list_path()
    known = _remembered()
    entry = _digest(config)
    name = str(folder.resolve())
    if known.get(name) == entry:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with _discarded_if_left(temporary):
            temporary.write_text(json.dumps(known | {name: entry}, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)


def find_modules_here() -> None:
    """Let modules of the working directory be imported. Only what the user typed or trusts may find them there: a
    downloaded folder may be the working directory, and packages try to import others that are not installed."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


# -- what is foreign ---------------------------------------------------------------------------------------------------


def _environment(field: str, env: EnvConfig, loaded: bool) -> list[str]:
    """What making this environment would run that is not known; none or one sentence."""
    module, _, name = env.id.rpartition(":")
    arguments = f" with {json.dumps(env.kwargs, default=str)}" if env.kwargs else ""
    if env.id.startswith("remote:"):
        _, _, rest = env.id.partition(":")
        return [f"{field} = {env.id} (starts the program {rest.partition(':')[0]}){arguments}"]
    if PROGRAMS.match(name):
        return [f"{field} = {env.id}{arguments}"]
    if name.startswith("longdream/MineRL-") and any(env.kwargs.get(key) for key in STARTING):
        return [f"{field} = {env.id}{arguments}"]
    known = module in ("", "longdream") or (loaded and module in sys.modules)
    if not (known or _brings_environments(module)):
        return [f"{field} = {env.id} (imports the module {module}){arguments}"]
    return []  # an id that nobody has registered cannot be made: that is said elsewhere


def _brings_environments(module: str) -> bool:
    """Whether a top-level module belongs to an installed package that is made for Gymnasium."""
    return any(
        re.split(r"[^\w-]", requirement.strip(), maxsplit=1)[0].lower() == "gymnasium"
        for package in _packages_of(module)
        for requirement in metadata.requires(package) or ()
    )


def _packages_of(module: str) -> list[str]:
    """The installed packages that a top-level module belongs to; none for one that lies elsewhere, such as here."""
    if not module.isidentifier():
        return []
    spec = importlib.util.find_spec(module)  # imports nothing, as the module has no parent
    if spec is None or not spec.origin or not spec.has_location:
        return []
    origin = Path(spec.origin).resolve()
    names = set(metadata.packages_distributions().get(module, ()))
    return [name for name in names if any(origin.is_relative_to(place) for place in _places_of(name))]


def _places_of(package: str) -> list[Path]:
    """Where the modules of an installed package lie: a folder of site-packages; its source, if it is editable."""
    installed = metadata.distribution(package)
    home = Path(str(installed.locate_file(""))).resolve()
    if home not in _site_folders():
        return []
    try:
        direct = json.loads(installed.read_text("direct_url.json") or "{}")
        source = urlparse(direct["url"]) if direct.get("dir_info", {}).get("editable") else None
    except (ValueError, KeyError, AttributeError):
        return [home]
    return [home] if source is None else [home, Path(unquote(source.path)).resolve()]


def _site_folders() -> set[Path]:
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    return {Path(folder).resolve() for folder in folders | set(site.getsitepackages())}


def _class(field: str, name: str, known: tuple[str, ...]) -> list[str]:
    """What finding this class would run that is not known; none or one sentence."""
    if name in known or ":" not in name:  # another word is a mistake, which is said elsewhere
        return []
    module, _, attribute = name.partition(":")
    if field == "controller.kind" and attribute in ALGORITHMS.get(module, ()) and _packages_of(module):
        return []
    return [f"{field} = {name}"]


# -- what was consented to ---------------------------------------------------------------------------------------------


def _asked(folder: Path, what: str) -> bool:
    """Ask on a terminal; false where there is none."""
    try:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return False
        print(f"{folder} would run code that is not built in: {what}", file=sys.stderr)
        print("Do you trust it? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except (OSError, ValueError, AttributeError):  # closed
        return False


def _digest(config: Config) -> str:
    """A hash of all that says which code runs, and with which arguments."""
    parts: dict[str, Any] = {
        "env": [config.env.id, config.env.kwargs],
        "evaluate.env": config.evaluate.env,
        "controller": [config.controller.kind, config.controller.kwargs],
        "objective": config.forcing.objective,
        "mixer": config.worldmodel.mixer,
        "log": list(config.log.to),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _list_path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "longdream" / "trusted.json"


def _remembered() -> dict[str, str]:
    """Digest by folder; nothing where the list is missing or damaged."""
    path = _list_path()
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _is_remembered(folder: Path, config: Config) -> bool:
    return _remembered().get(str(folder.resolve())) == _digest(config)


@contextlib.contextmanager
def _discarded_if_left(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
