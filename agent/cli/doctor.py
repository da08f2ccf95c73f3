"""`longdream doctor` and `longdream check-env`: checks of the installation and of environments."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longdream.envs.contract import UserError

STEPS = 100
"""Steps over which Memory Maze's speed is measured."""
ROOM = 5 << 30
"""Free bytes below which there is a warning: a replay of a million 64 x 64 images takes 12 GB."""


def doctor() -> dict[str, Any]:
    """Check the installation: Python, torch, OpenGL, Memory Maze, video, disk, MineRL.

    Exit code 1 if a required part does not work.

    examples
      longdream doctor
      longdream doctor --json

    Returns:
        ok, and for each part: ok (null if it is optional), found (a description), and values.
    """
    report: dict[str, Any] = {}
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "python": _python,
        "torch": _torch,
        "opengl": _opengl,
        "memory maze": _memory_maze,
        "video": _video,
        "disk": _disk,
        "minerl": _minerl,
    }
    for name, check in checks.items():
        try:
            report[name] = check()
        except Exception as error:  # any failure belongs in the report
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            report[name] = {"ok": False, "found": " ".join(f"{kind}{error}".split())}
        mark = {True: "ok", False: "FAILS", None: "-"}[report[name]["ok"]]
        print(f"{name:12} {mark:6} {report[name]['found']}")
    return {"ok": all(entry["ok"] is not False for entry in report.values()), **report}


def check_env(env: str, env_kwargs: dict[str, Any] | None = None, steps: int = 300) -> dict[str, Any]:
    """Check an environment; report what is wrong with it and how to fix it. Exit code 1 if something is wrong.

    It runs Gymnasium's own checker, and checks the spaces, whole rows, determinism, and exact continuation from a
    saved state.

    examples
      longdream check-env longdream/MemoryMaze-9x9-v0
      longdream check-env my_package.envs:MyEnv-v0 --env.kwargs.size 5

    Args:
        env: a registered id, or module:Id.
        env_kwargs: its arguments, one by one as --env.kwargs.size 5, or all as JSON.
        steps: steps with random actions.

    Returns:
        ok; problems, notes, passed (sentences); and steps_per_s with random actions.

    Raises:
        UserError: the environment is not registered, or cannot be made.
    """
    from longdream.envs import checks

    if steps < 1:
        raise UserError(f"--steps {steps}: must be at least 1")
    report = checks.check(env, env_kwargs, steps)
    for sign, lines in (("ok", report.passed), ("note", report.notes), ("WRONG", report.problems)):
        for line in lines:
            print(f"{sign:6} {line}")
    print(f"{env} is fit for training" if not report.problems else f"{env} is not fit for training yet")
    return {"env": env, "ok": not report.problems, **vars(report)}


def _python() -> dict[str, Any]:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    text = f"{platform.python_version()} at {sys.executable}" + ("" if ok else ": longdream needs 3.11 to 3.13")
    return {"ok": ok, "found": text}


def _torch() -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = float(torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device)).sum())
    text = f"{torch.__version__}, computes on {device}"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        text += f" ({torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free)"
    elif shutil.which("nvidia-smi"):
        text += ": there is an NVIDIA driver, but this build of torch cannot use it (pytorch.org/get-started)"
    else:
        text += f" with {torch.get_num_threads()} threads"
    return {"ok": value == 512.0, "found": text, "device": device}


def _opengl() -> dict[str, Any]:
    from longdream.envs.memory_maze import gl

    tried = {name: probe() for name, probe in gl.PROBES.items()}
    text = ", ".join(
        f"{name} {'works' if reason is None else f'does not ({reason})'}" for name, reason in tried.items()
    )
    if "MUJOCO_GL" in os.environ:
        text = f"MUJOCO_GL={os.environ['MUJOCO_GL']}; {text}"
    return {"ok": None, "found": f"{text}; used: {gl.choose()}", "tried": tried}


def _memory_maze() -> dict[str, Any]:
    import gymnasium as gym

    from longdream.envs.extras import needs

    if lacking := needs("maze"):
        return {"ok": None, "found": lacking}

    env = gym.make("longdream:longdream/MemoryMaze-9x9-v0")
    began = time.perf_counter()
    obs, _ = env.reset(seed=0)
    reset = time.perf_counter() - began
    if obs.std() < 1:
        raise RuntimeError("its pictures are of one colour: OpenGL draws nothing")
    began = time.perf_counter()
    for t in range(STEPS):
        env.step(1 + t % 5)
    rate = STEPS / (time.perf_counter() - began)
    env.close()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("memory-maze", "dm-control", "mujoco")
    )
    text = f"renders: {rate:.0f} steps/s in this process, a reset takes {reset:.1f} s ({versions})"
    return {"ok": True, "found": text, "steps_per_s": round(rate, 1), "reset_s": round(reset, 2)}


def _video() -> dict[str, Any]:
    from longdream.envs.extras import needs

    if lacking := needs("video"):
        return {"ok": None, "found": lacking}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("av", "torchmetrics"))
    return {"ok": True, "found": f"mp4 files are read and written, frames compared ({versions})"}


def _disk() -> dict[str, Any]:
    folder = Path("runs") if Path("runs").is_dir() else Path(".")
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.0f} GB free for {folder.resolve()}"
    return {"ok": None, "found": text if free > ROOM else f"{text}: little for a replay", "free_bytes": free}


def _minerl() -> dict[str, Any]:
    from longdream.envs.minerl.env import PYTHON

    python = os.environ.get(PYTHON, "")
    if not python:
        return {"ok": None, "found": f"{PYTHON} names no interpreter that has it (docs/minerl.md)", "version": None}
    # minerl is not imported, which would take seconds; Minecraft itself is not checked
    code = "import importlib.util as u; spec = u.find_spec('minerl'); print(spec.origin if spec else '')"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    if result.returncode or not result.stdout.strip():
        reason = (result.stderr.strip().splitlines() or ["it is not installed there"])[-1]
        return {"ok": None, "found": f"not in {python}: {reason}", "version": None}
    code = "import importlib.metadata as m; print(m.version('minerl'))"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() or None
    return {"ok": None, "found": f"{version or 'of an unknown version'} in {python}", "version": version}
