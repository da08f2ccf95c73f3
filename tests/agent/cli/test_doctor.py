"""`longdream doctor` and `longdream check-env`, as commands."""

import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from longdream.agent.cli import doctor
from longdream.agent.cli import main as cli
from longdream.envs import extras


class Beyond(gym.Env):
    """Shows what its space does not announce."""

    observation_space = gym.spaces.Box(0, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.full(2, 7, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.full(2, 7, np.float32), 0.0, True, False, {}


class Molecule(gym.Env):
    """Shows what is not supported."""

    observation_space = gym.spaces.Graph(gym.spaces.Box(0, 1, (2,)), None)
    action_space = gym.spaces.Discrete(2)


gym.register("Beyond-v0", entry_point=Beyond)
gym.register("Molecule-v0", entry_point=Molecule)


def test_the_doctor_finds_what_the_install_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["ok"] is True
    assert list(report) == ["ok", "python", "torch", "opengl", "memory maze", "video", "disk", "minerl"]
    assert report["memory maze"]["steps_per_s"] > 0 and report["disk"]["free_bytes"] > 0
    assert set(report["opengl"]["tried"]) == {"egl", "osmesa"} and None in report["opengl"]["tried"].values()
    assert printed.err.count("\n") >= 6 and "FAILS" not in printed.err


def test_an_extra_that_cannot_be_installed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert doctor._memory_maze()["found"].endswith("numba: pip install 'longdream[maze]'")
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    assert doctor._memory_maze()["found"].endswith("labmaze has no wheels for Python 3.13, use 3.11 or 3.12")
    assert doctor._video()["found"] == "needs av, torchmetrics: pip install 'longdream[video]'"


def test_where_minerl_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LONGDREAM_MINERL_PYTHON", raising=False)
    assert doctor._minerl()["found"].startswith("LONGDREAM_MINERL_PYTHON names no interpreter")
    monkeypatch.setenv("LONGDREAM_MINERL_PYTHON", sys.executable)
    assert doctor._minerl()["found"] == f"not in {sys.executable}: it is not installed there"
    (tmp_path / "minerl").mkdir()
    (tmp_path / "minerl" / "__init__.py").touch()
    about = tmp_path / "minerl-0.4.4.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: minerl\nVersion: 0.4.4\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._minerl() == {"ok": None, "found": f"0.4.4 in {sys.executable}", "version": "0.4.4"}


def test_what_fails_ends_in_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "off")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "memory maze  FAILS  MUJOCO_GL=off turns rendering off: unset it" in out
    assert "python       ok" in out


def test_check_env_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-env", "longdream/Recall-v0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert cli.main(["check-env", "Blackjack-v1", "--json"]) == 0  # a Tuple
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert cli.main(["check-env", "Beyond-v0"]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert cli.main(["check-env", "Beyond-v0", "--json"]) == 1
    assert "7" in " ".join(json.loads(capsys.readouterr().out)["problems"])
    assert cli.main(["check-env", "Molecule-v0"]) == 2
    assert "observation 'obs' is a Graph space: give its nodes" in capsys.readouterr().err
    assert cli.main(["check-env", "longdream/Recal-v0"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert cli.main(["check-env", "longdream/Recall-v0", "--steps", "0"]) == 2
    assert cli.main(["check-env", "longdream/Recall-v0", "--env-kwargs", '{"corridor": 0}']) == 2
