"""A run that is opened executes nothing that is neither built in nor of an installed package, without consent."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.actor import CONTROLLERS
from longdream.agent.run import trust
from longdream.agent.run.folder import create, open_run
from longdream.agent.run.sinks import SINKS
from longdream.envs.contract import UserError
from longdream.worldmodel.mixers.base import MIXERS

FOREIGN = [
    {"env.id": "longdream/Remote-v0", "env.kwargs": {"python": "python3", "env": "os:system"}},
    {"env.id": "longdream:longdream/Remote-v0"},
    {"env.id": "remote:/bin/sh:anything"},
    {"env.id": "a_module_here:Id-v0"},
    {"env.id": "antigravity:CartPole-v1"},
    {"env.id": "GymV21Environment-v0", "env.kwargs": {"env_id": "a_module_here:Id-v0"}},
    {"env.id": "longdream/MineRL-Treechop-v0", "env.kwargs": {"python": "/bin/sh"}},
    {"env.id": "longdream/MineRL-Treechop-v0", "env.kwargs": {"environ": {"LD_PRELOAD": "here.so"}}},
    {"evaluate.env": "a_module_here:Id-v0"},
    {"controller.kind": "a_module_here:Thing"},
    {"controller.kind": "os:system"},
    {"controller.kind": "stable_baselines3:get_system_info"},
    {"controller.kind": "stable_baselines3:PPO", "controller.kwargs": {"callback": "a_module_here:Thing"}},
    {"controller.kind": "stable_baselines3:PPO", "controller.kwargs": {"tensorboard_log": "/somewhere/else"}},
    {"log.to": ["somewhere_else:Sink"]},
    {"forcing.objective": "a_module_here:Thing"},
    {"worldmodel.mixer": "a_module_here:Thing"},
]
BUILT_IN = [
    {},
    {"env.id": "CartPole-v1"},
    {"env.id": "longdream:longdream/Recall-v0"},
    {"env.id": "gymnasium:CartPole-v1"},
    {"env.id": "longdream/MineRL-Treechop-v0", "env.kwargs": {"size": 32}},
    {"controller.kind": "planner", "controller.kwargs": {"rounds": 2}},
    {"controller.kind": "stable_baselines3:PPO", "controller.kwargs": {"copies": 4}},
]
WORLD = """
import gymnasium as gym, numpy as np


class Mine(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(3, np.float32), 0.0, self.t >= 6, False, {}


gym.register("Mine-v0", entry_point=Mine)
"""
MODULE = "from pathlib import Path\nPath('EXECUTED').touch()\n"


def ids(settings: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())[:60]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module that leaves a trace when it is imported, and a list of trust of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "a_module_here.py").write_text(MODULE)
    yield tmp_path
    trust.consent(False)


def run_of(settings: dict, folder: Path = Path("run")) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(options.dump(options.update(options.load("tiny"), settings)))
    return folder


@pytest.mark.parametrize("requires", ["gymnasium>=1.0", "gymnasium[box2d]; extra == 'worlds'", "numpy"])
@pytest.mark.parametrize("where", ["site", "editable", "elsewhere"])
def test_a_module_of_an_installed_package(
    here: Path, monkeypatch: pytest.MonkeyPatch, requires: str, where: str
) -> None:
    """Where site-packages is a folder of the test: `elsewhere` has the metadata of a package, but is none."""
    info = here / ("elsewhere" if where == "elsewhere" else "site") / "own_worlds-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: own-worlds\nVersion: 1.0\nRequires-Dist: {requires}\n"
    )
    (info / "top_level.txt").write_text("own_worlds\n")
    source = here / "project" if where == "editable" else info.parent
    source.mkdir(exist_ok=True)
    (source / "own_worlds.py").write_text("")
    if where == "editable":
        (info / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}}))
    monkeypatch.setattr(trust, "_site_folders", lambda: {(here / "site").resolve()})
    monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent), str(source)])
    config = options.update(Config(), {"env.id": "own_worlds:Id-v0"})
    assert bool(trust.code_of(config)) == (requires == "numpy" or where == "elsewhere")
    assert trust.code_of(options.update(Config(), {"env.id": "own_worlds.inner:Id-v0"}))
    assert trust.code_of(options.update(Config(), {"controller.kind": "own_worlds:Thing"}))


def test_the_words_are_those_that_are_known() -> None:
    assert tuple(CONTROLLERS) == trust.CONTROLLERS
    assert trust.MIXERS == MIXERS
    assert tuple(SINKS) == trust.SINKS
    with pytest.raises(ValueError, match=", ".join(sorted(trust.OBJECTIVES))):
        from longdream.worldmodel.objectives import objective_class

        objective_class("none of them")


@pytest.mark.parametrize("settings", FOREIGN, ids=ids)
def test_what_a_folder_names_is_not_run(here: Path, settings: dict) -> None:
    folder = run_of(settings)
    name, value = next(reversed(settings.items()))
    with pytest.raises(UserError, match="--trust") as refused:
        open_run(folder)
    shown = value if isinstance(value, str) else value[0] if isinstance(value, list) else next(iter(value.values()))
    assert str(shown if isinstance(shown, str) else next(iter(shown))) in str(refused.value), name
    assert not Path("EXECUTED").exists() and "a_module_here" not in sys.modules


@pytest.mark.parametrize("settings", BUILT_IN, ids=ids)
def test_what_is_built_in_needs_no_consent(here: Path, settings: dict) -> None:
    assert open_run(run_of(settings)).config.seed == 0
    assert not (here / "settings").exists()


@pytest.mark.parametrize("command", ["evaluate {}", "dream {}", "train --resume {}", "train --world {}"])
def test_every_command_that_opens_a_run_refuses(here: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of({"controller.kind": "a_module_here:Thing"})
    assert cli.main([*command.format(folder).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "controller.kind = a_module_here:Thing" in line and "--trust" in line
    assert cli.main(["train", f"{folder}/config.yaml"]) == 2
    assert not Path("EXECUTED").exists()


def test_trust_is_of_one_folder_and_one_configuration(here: Path) -> None:
    folder = run_of({"env.id": "a_module_here:Id-v0"})
    trust.consent(True)
    open_run(folder)
    trust.consent(False)
    open_run(folder)  # remembered
    assert json.loads((here / "settings/longdream/trusted.json").read_text()).keys() == {str(folder.resolve())}
    with pytest.raises(UserError, match="--trust"):
        open_run(run_of({"env.id": "a_module_here:Id-v0"}, Path("another")))
    with pytest.raises(UserError, match="--trust"):
        open_run(run_of({"env.id": "a_module_here:Id-v0", "env.kwargs": {"more": 1}}))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_run_that_was_made_here_is_trusted(here: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    config = options.update(Config(), {"env.id": "a_module_here:Id-v0"})
    if loaded:  # as it is when a run has been made
        monkeypatch.setitem(sys.modules, "a_module_here", sys)
    create(Path("mine"), config)
    monkeypatch.delitem(sys.modules, "a_module_here", raising=False)
    assert open_run("mine").config == config


def test_a_run_of_a_module_here_is_opened_again_by_its_maker(here: Path) -> None:
    """By processes of their own, as on the command line."""
    (here / "a_module_here.py").write_text(WORLD)
    command = [sys.executable, "-c", "import sys; from longdream.agent.cli.main import main; sys.exit(main())"]
    short = ["--steps", "80", "--evaluate.final_episodes", "1", "--evaluate.every", "0"]
    train = ["train", "tiny", "--env", "a_module_here:Mine-v0", "--name", "r", *short]
    for arguments in (train, ["train", "--resume", "runs/r"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    Path("runs/r").rename("runs/moved")
    evaluate = [*command, "evaluate", "runs/moved", "--episodes", "1"]
    assert subprocess.run(evaluate, capture_output=True).returncode == 2
    assert subprocess.run([*evaluate, "--trust"], capture_output=True).returncode == 0
    assert subprocess.run(evaluate, capture_output=True).returncode == 0  # remembered


@pytest.mark.parametrize(("answer", "opens"), [("y\n", True), ("\n", False), ("n\n", False), ("", False)])
def test_a_terminal_is_asked(here: Path, monkeypatch: pytest.MonkeyPatch, answer: str, opens: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    folder = run_of({"env.id": "a_module_here:Id-v0"})
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", Terminal())
    if opens:
        assert open_run(folder).config.env.id == "a_module_here:Id-v0"
    else:
        with pytest.raises(UserError, match="--trust"):
            open_run(folder)


@pytest.mark.parametrize("damage", ["", "[1]", "[" * 5000, "{", "\xff"])
def test_a_damaged_list_of_trust_trusts_nothing(here: Path, damage: str) -> None:
    folder = run_of({"env.id": "a_module_here:Id-v0"})
    (here / "settings" / "longdream").mkdir(parents=True)
    (here / "settings" / "longdream" / "trusted.json").write_text(damage, encoding="latin-1")
    with pytest.raises(UserError, match="--trust"):
        open_run(folder)


def test_a_module_beside_a_run_is_not_found_while_it_is_opened(
    here: Path, capsys: pytest.CaptureFixture[str], dream_runs
) -> None:
    """Packages try to import others that are not installed, as tensorboard tries tensorflow: not from here."""
    before = [path for path in sys.path if path != str(here)]
    sys.path[:] = before
    assert cli.main(["evaluate", str(dream_runs("vectors")), "--episodes", "1"]) == 0
    assert str(here) not in sys.path


def test_messages_show_no_control_characters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of({})
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["env"]["id"] = "a_module_here:\x1b]0;owned\x07\n"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["evaluate", str(folder)]) == 2
    assert "\x1b" not in capsys.readouterr().err
