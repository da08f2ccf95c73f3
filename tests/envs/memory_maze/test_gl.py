"""The choice of the OpenGL backend. Each test needs a new process, because MuJoCo chooses only once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longdream.envs.contract import UserError
from longdream.envs.memory_maze import gl

ROOT = Path(__file__).resolve().parents[2]


def choose_in_process(**environment: str) -> tuple[str, str]:
    """The result of `choose`, and MUJOCO_GL after it, with only these environment variables about OpenGL."""
    code = "import os\nfrom longdream.envs.memory_maze import gl\nfrom longdream.envs.contract import UserError\n"
    code += "try: print(gl.choose(), os.environ['MUJOCO_GL'])\nexcept UserError as error: print('UserError', error)"
    clean = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True
    )
    first, _, rest = done.stdout.strip().partition(" ")
    return first, rest


def test_a_backend_that_works_is_chosen() -> None:
    works = [name for name, probe in gl.PROBES.items() if probe() is None]
    assert choose_in_process() == (works[0], works[0])  # the tests need a machine that can render


def test_mujoco_gl_is_respected() -> None:
    works = next(name for name, probe in gl.PROBES.items() if probe() is None)
    assert choose_in_process(MUJOCO_GL=works.upper()) == (works, works)
    assert choose_in_process(MUJOCO_GL="glfw") == ("glfw", "glfw")
    assert choose_in_process(PYOPENGL_PLATFORM=works) == (works, works)


def test_invalid_values_are_reported_with_a_fix() -> None:
    assert choose_in_process(MUJOCO_GL="off") == (
        "UserError",
        "MUJOCO_GL=off turns rendering off: unset it, or set it to egl or osmesa",
    )
    kind, message = choose_in_process(MUJOCO_GL="egl", PYOPENGL_PLATFORM="glx")
    assert kind == "UserError" and "PYOPENGL_PLATFORM must be the same as MUJOCO_GL" in message


def test_without_libraries_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(gl.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match=r"egl: no libEGL; osmesa: no libOSMesa.*apt install libegl1.*libosmesa6"):
        gl.choose()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(UserError, match=r"\(osmesa: no libOSMesa\): apt install libosmesa6$"):
        gl.choose()
    assert os.environ["MUJOCO_GL"] == "osmesa"


def test_the_environment_reports_an_opengl_failure() -> None:
    code = "import longdream, gymnasium as gym\nenv = gym.make('longdream/MemoryMaze-9x9-v0')\n"
    code += "try: env.reset()\nexcept ValueError as error: print(error)"
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "PYOPENGL_PLATFORM")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"MUJOCO_GL": "glfw"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("MUJOCO_GL=glfw gives no OpenGL") and "longdream doctor" in done.stdout
