"""Copies in processes of their own: none is waited for longer than agreed, and nothing that they start stays behind."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from longdream.envs import World
from longdream.envs.contract import EnvError, UserError

# Does what its argument says, in a worker only. Workers import the module by its name.
ODD = """
import multiprocessing, os, subprocess, sys, time
import gymnasium as gym
import numpy as np

class Oddly(Exception):
    def __str__(self):
        raise RuntimeError("not even this")

class Place(gym.spaces.Box):  # that only a worker can read
    def __reduce__(self):
        return eval, ("1 if __import__('multiprocessing').parent_process() else 1 / 0",)

class Odd(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(3)

    def __init__(self, how="", mark=""):
        self.how = how
        if how == "cannot be read":
            self.observation_space = Place(-1, 1, (3,))
        if how == "exits when made":
            sys.exit(3)
        if how == "dies when made":
            os._exit(4)
        if how == "hangs when made":
            time.sleep(600)
        if how == "raises when made":
            raise RuntimeError("no licence")
        if how == "has children":
            child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
            child.start()
            with open(mark, "w") as file:
                file.write(str(child.pid))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        if self.how == "raises oddly" and action == 1:
            raise Oddly
        if self.how == "exits in step" and action == 1:
            sys.exit()
        if self.how == "interrupts" and action == 1:
            raise KeyboardInterrupt
        if self.how == "dies in step" and action == 1:
            os._exit(0)
        if action == 2:
            time.sleep(600)
        return np.zeros(3, np.float32), 0.0, False, False, {}

    def close(self):
        if self.how == "hangs in close":
            time.sleep(600)
        if self.how == "exits in close":
            sys.exit(0)

gym.register("Odd-v0", entry_point="odd:Odd")
"""


@pytest.fixture(autouse=True)
def odd(tmp_path, monkeypatch) -> Iterator[None]:
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if p)])
    yield
    sys.modules.pop("odd", None)
    gym.registry.pop("Odd-v0", None)


def world(how: str = "", timeout_s: float = 60.0, mode="async") -> World:
    return World("odd:Odd-v0", 2, 0, {"how": how}, mode, timeout_s)


def act(made: World, *choices: int) -> None:
    made.step(made.spec.action.encode(np.array(choices)))


def children() -> list[str]:
    """Processes of this one that are environment workers."""
    return [process.name for process in multiprocessing.active_children() if "Odd" in process.name]


@pytest.mark.parametrize(
    ("how", "error", "what"),
    [
        ("exits when made", UserError, "cannot be made with how='exits when made': SystemExit: 3"),
        ("raises when made", UserError, "cannot be made with how='raises when made': RuntimeError: no licence"),
        ("cannot be read", EnvError, "worker 0 of odd:Odd-v0 sent what cannot be read in make: ZeroDivisionError"),
        ("dies when made", EnvError, "environment workers 0, 1 of odd:Odd-v0 died in make (exit code 4)"),
    ],
)
def test_a_copy_that_is_not_made(how, error, what):
    with pytest.raises(error) as raised:
        world(how)
    assert what in str(raised.value) and "\n" not in str(raised.value)
    assert not children()


def test_a_copy_that_hangs_while_it_is_made_is_given_up():
    began = time.monotonic()
    with pytest.raises(EnvError, match=r"workers 0, 1 of odd:Odd-v0 gave no answer to make within 3 s"):
        world("hangs when made", timeout_s=3)
    assert time.monotonic() - began < 60 and not children()


def test_a_copy_that_hangs_in_close_is_given_up(recwarn):
    made = world("hangs in close", timeout_s=3)
    made.reset()
    began = time.monotonic()
    made.close()
    assert 2.5 < time.monotonic() - began < 30 and not children()
    assert "environment workers 0, 1 of odd:Odd-v0 did not close within 3 s" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("how", "name"),
    [("exits in step", "SystemExit"), ("interrupts", "KeyboardInterrupt"), ("raises oddly", "Oddly")],
)
def test_an_environment_does_not_end_the_program(mode, how, name):
    made = world(how, mode=mode)
    made.reset()
    act(made, 0, 0)
    with pytest.raises(EnvError, match=rf"environment worker 1 of odd:Odd-v0 raised in step: {name}") as error:
        act(made, 0, 1)
    assert error.value.worker == 1 and "odd.py" in error.value.trace


def test_ctrl_c_in_an_environment_is_still_ctrl_c():
    made = world(mode="sync")
    made.reset()
    subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({os.getpid()}, 2)"])
    with pytest.raises(KeyboardInterrupt):
        act(made, 0, 2)
    made.close()


def test_too_many_workers_for_the_machine(monkeypatch):
    def no_more(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", no_more)
    with pytest.raises(UserError, match=r"no worker process of odd:Odd-v0 can be started .* lower --env.copies"):
        world()


def test_a_worker_that_dies_with_code_0_is_named():
    made = world("dies in step")
    made.reset()
    with pytest.raises(EnvError, match=r"environment worker 1 of odd:Odd-v0 died in step \(exit code 0\)"):
        act(made, 0, 1)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_exits_in_close_are_survived(mode):
    made = world("exits in close", mode=mode)
    made.reset()
    made.close()
    assert not children()


@pytest.mark.parametrize("end", ["close", "kill"])
def test_workers_may_have_children_which_end_with_them(tmp_path, end):
    mark = tmp_path / "child"
    made = World("odd:Odd-v0", 1, 0, {"how": "has children", "mark": str(mark)}, "async", 60)
    made.reset()
    child = int(mark.read_text())
    assert Path(f"/proc/{child}").exists()
    if end == "kill":
        made.vector.send("step", [{"action": 2}])  # it hangs: there is no time for a farewell
    else:
        made.vector.timeout_s = 1.0
    made.close()
    deadline = time.monotonic() + 20
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(child)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_folder_too_long_for_sockets_is_named(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    code = "from longdream.envs import World\nWorld('CartPole-v1', 1, 0, mode='async')"
    environ = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert f"UserError: TMPDIR = {folder} is too long" in done.stderr
    assert "--env.workers sync" in done.stderr
    assert tempfile.gettempdir() != str(folder)
