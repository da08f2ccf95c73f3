"""Environments share this process without changing what the rest of it computes and where it writes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from longdream.envs import World
from longdream.envs.process import environments_turn


class Rude(gym.Env):
    """Changes the settings of the process in every call, and notes those that it finds."""

    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, folder, found):
        self.folder = folder
        self.found = found

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        os.chdir(self.folder)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(1 + torch.get_num_threads() % 2)
        torch.manual_seed(5)
        np.seterr(all="raise")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.setrecursionlimit(5000)
        sys.stdout = self.found
        torch.set_autocast_enabled("cpu", True)
        torch.use_deterministic_algorithms(True)
        torch.inference_mode().__enter__()
        return np.zeros(1, np.float32), {}

    def step(self, action):
        noise = float(torch.rand(()))
        self.found.append((os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled(), noise))
        return np.ones(1, np.float32), 0.0, False, False, {}


@pytest.fixture
def rude(tmp_path) -> Iterator[tuple[World, list]]:
    gym.register("Rude-v0", entry_point=Rude)
    (tmp_path / "elsewhere").mkdir()
    found: list = []
    before = os.getcwd()
    world = World("Rude-v0", 1, 0, {"folder": str(tmp_path / "elsewhere"), "found": found})
    yield world, found
    world.close()
    os.chdir(before)
    gym.registry.pop("Rude-v0")


def settings() -> tuple:
    of_torch = [torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()]
    of_torch += [torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled()]
    of_torch += [torch.is_inference_mode_enabled(), sys.getrecursionlimit(), sys.stdout]
    return (os.getcwd(), *of_torch, np.geterr(), signal.getsignal(signal.SIGTERM))


def test_what_an_environment_sets_holds_for_environments_alone(rude, tmp_path):
    world, found = rude
    state = torch.get_rng_state()
    ours = settings()
    world.reset()
    for _ in range(3):
        world.step(np.array([[1.0, 0.0]], np.float32))
    assert settings() == ours
    assert torch.get_rng_state().equal(state)
    generator = torch.Generator().manual_seed(5)
    noise = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(3)]
    assert found == [(str(tmp_path / "elsewhere"), torch.float64, False, value) for value in noise]


def test_a_folder_of_ours_is_not_changed_back(rude, tmp_path):
    world, found = rude
    world.reset()
    here = tmp_path / "here"
    here.mkdir()
    os.chdir(here)
    world.step(np.array([[1.0, 0.0]], np.float32))
    assert os.getcwd() == str(here) == found[-1][0]


def test_failures_put_everything_back():
    before = os.getcwd()
    with pytest.raises(SystemExit), environments_turn():
        os.chdir("/")
        sys.exit()
    assert os.getcwd() == before
    with environments_turn():
        assert os.getcwd() == "/"
        os.chdir(before)
    assert os.getcwd() == before


def test_exits_without_a_word_are_exceptions_while_an_environment_has_its_turn():
    real = os._exit
    for call, what in ((lambda: os._exit(3), r"os\._exit\(3\)"), (lambda: os.abort(), r"os\.abort\(\)")):
        with pytest.raises(SystemExit, match=what), environments_turn():
            call()
    with environments_turn():
        child = os.fork()
        if not child:
            os._exit(7)  # a process of the environment's own ends
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        kept = os._exit
    assert os._exit is real
    child = os.fork()
    if not child:
        kept(9)  # nor is it held up by what was kept for later
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_descriptors_that_an_environment_closes_are_no_files_of_a_run(tmp_path):
    """In a process of its own, whose console is gone then."""
    code = """
import os
from longdream.envs.process import environments_turn
with environments_turn():
    os.close(1), os.close(2)
handle = os.open("record", os.O_CREAT | os.O_WRONLY)
print("words", flush=True)
assert handle > 2
"""
    path = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0 and (tmp_path / "record").read_text() == ""
