"""Dreams in processes that were forked, as the workers of Gymnasium's AsyncVectorEnv are."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longdream.agent.dream_env import env as dream_env
from longdream.envs.contract import UserError

CODE = """
import sys
import gymnasium as gym
import torch
import longdream.envs

if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.ones(999, 999).matmul(torch.ones(999, 999)).exp()  # on two threads, of which a fork has one
    arguments = dict(checkpoint=sys.argv[1], horizon=5)
    dreams = gym.make_vec("longdream/Dream-v0", num_envs=2, vectorization_mode="async", **arguments)
    dreams.reset(seed=0)
    dreams.step(dreams.action_space.sample())
    dreams.close()
    print("done")
"""


def test_dreams_in_forked_workers_do_not_hang(dream_runs: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "dreams.py").write_text(CODE)
    command = [sys.executable, str(tmp_path / "dreams.py"), str(dream_runs("vectors"))]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["done"], done.stderr


def test_a_gpu_of_the_parent_is_named(monkeypatch: pytest.MonkeyPatch, dream_runs: Callable[[str], Path]) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(dream_env, "forked", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    try:
        with pytest.raises(UserError, match="was forked from one that uses the GPU"):
            dream_env.DreamVecEnv(1, dream_runs("vectors"))
        dream_env.DreamVecEnv(1, dream_runs("vectors"), device="cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
