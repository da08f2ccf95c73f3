"""An environment that fails in every way that real ones do: `Faulty-v0`, for `longdream bench faults`."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

ID = f"{__name__}:Faulty-v0"


class Faulty(gym.Env):
    """Episodes of ten steps, of three numbers in -1 to 1.

    Args:
        fault: what goes wrong, once `at` steps are made.
        mark: a file that is made when it goes wrong; while there is one, it does not go wrong again.
        size: numbers of an observation.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (as Gymnasium declares it)
    action_space: gym.spaces.Space = gym.spaces.Discrete(2)

    def __init__(self, fault: str = "none", mark: str = "", at: int = 30, size: int = 3) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (size,), np.float32)
        self.fault = fault
        self.mark = mark
        self.at = at
        self.size = size
        self.steps = 0
        self.time = 0
        if fault == "prints":
            atexit.register(lambda: os.write(1, b"and at the end\n"))
        if fault == "hang in init":
            self._once(lambda: time.sleep(1e6))
        if fault == "exit in init":
            self._once(lambda: os._exit(4))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        if self.fault == "changes settings":
            import torch

            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            os.chdir(tempfile.gettempdir())
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.steps += 1
        self.time += 1
        if self.fault == "prints":
            os.write(1, b"a step\n")
            print("of an environment that says so")
        row: list[Any] = [self._seen(), float(action), False, self.time >= 10 and self.fault != "endless"]
        if self.steps >= self.at:
            self._once(lambda: self._fail(row))
        return *row, {}  # type: ignore[return-value]

    def close(self) -> None:
        if self.fault == "hang in close":
            time.sleep(1e6)

    def _seen(self) -> np.ndarray:
        return np.full(self.size, 0.1 * self.time, np.float32)

    def _once(self, call: Any) -> None:
        """Make the mark and call, unless it is there."""
        with contextlib.suppress(FileExistsError):
            if self.mark:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            call()

    def _fail(self, row: list[Any]) -> None:
        if self.fault == "raise":
            raise ZeroDivisionError("a bug of the environment")
        if self.fault == "exit":
            sys.exit()
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        if self.fault == "os._exit":
            os._exit(3)
        if self.fault == "hang":
            time.sleep(1e6)
        if self.fault == "blocks tensorboard":
            (next(iter(sorted(Path("runs").iterdir()))) / "tensorboard").write_text("in its place")
        wrong = {
            "another shape": (0, np.zeros(self.size + 1, np.float32)),
            "another type": (0, np.array(["a"] * self.size)),
            "not finite": (0, np.full(self.size, np.nan, np.float32)),
            "reward is a list": (1, [1.0, 2.0]),
            "reward is None": (1, None),
            "reward is not finite": (1, float("nan")),
            "flag is text": (2, "no"),
        }
        if self.fault in wrong:
            i, value = wrong[self.fault]
            row[i] = value


if "Faulty-v0" not in gym.registry:
    gym.register("Faulty-v0", entry_point=f"{__name__}:Faulty")
