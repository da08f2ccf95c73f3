"""The compiled backends of the fast Memory Maze, compared with the reference in plain torch, at odd sizes."""

from typing import Any

import numpy as np
import pytest
import torch

from longdream.envs.fast_memory_maze import cpu, dialect, plain, scene, textures
from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv

COPIES = 5
MOTION = ("body", "prompt", "key", "picks")


def make_env(size: int, **kwargs: Any) -> FastMemoryMazeVecEnv:
    """An environment whose copies are at different positions, one of them next to its prompted target."""
    env = FastMemoryMazeVecEnv(COPIES, size, **kwargs)
    env.reset_tensors(3)
    for step in range(6):
        env.step_unseen(torch.tensor([1, 1, 4, 5, step % 6]))
    env.body[0, :2] = (env.spheres[0, env.prompt[0], :2] * scene.CELL + torch.tensor([0.6, 0.5])).double()
    return env


def advance(backend: Any, env: FastMemoryMazeVecEnv, substeps: int, device: str = "cpu") -> list[torch.Tensor]:
    state = [getattr(env, key).to(device).clone() for key in MOTION]
    reward, rewards = torch.zeros(COPIES, device=device), []
    cells, spheres = env.cells.to(device), env.spheres.to(device)
    actions = torch.tensor([1, 4, 5, 0, 1], device=device)
    for _ in range(3):
        backend.advance(cells, spheres, env.count, substeps, actions, *state, reward)
        rewards.append(reward.clone())
    return [value.cpu() for value in (*state, *rewards)]


def draw(backend: Any, env: FastMemoryMazeVecEnv, top: bool, side: int, device: str = "cpu") -> np.ndarray:
    env._backend, env.device = backend, torch.device(device)
    env.texels = torch.from_numpy(textures.texels()).to(device)
    for key in ("cells", "spheres", "colours", *MOTION):
        setattr(env, key, getattr(env, key).to(device))
    return env._draw(top, side).cpu().numpy()


@pytest.mark.parametrize(("size", "good_visibility", "substeps"), [(9, False, 7), (11, True, 5)])
def test_backends_agree_on_physics(size: int, good_visibility: bool, substeps: int) -> None:
    env = make_env(size, good_visibility=good_visibility)
    fast, slow = (advance(backend, env, substeps) for backend in (cpu, plain))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert good_visibility or fast[4].any(), "the prompted target should have been touched"
    env.close()


@pytest.mark.parametrize(
    ("size", "good_visibility", "top", "side"), [(9, False, False, 65), (15, True, False, 51), (11, False, True, 67)]
)
def test_backends_agree_on_images(size: int, good_visibility: bool, top: bool, side: int) -> None:
    env = make_env(size, good_visibility=good_visibility)
    fast, slow = (draw(backend, env, top, side).astype(int) for backend in (cpu, plain))
    difference = np.abs(fast - slow)
    # numba's approximate logarithm and order of sums may change a rounding, or the side of an edge that a ray hits
    assert (difference > 1).mean() < 1e-3 and (difference > 0).mean() < 0.01 and fast.std() > 10
    env.close()


def test_mipmaps_are_means_of_the_level_before() -> None:
    texels = textures.texels()
    edge, size = 1024, (4 * 1024 * 1024 - 1) // 3
    assert texels.shape == (10 * size,)
    first = texels[size : 2 * size]
    level, begin = first[: edge * edge].reshape(edge, edge), edge * edge
    below = first[begin : begin + edge * edge // 4].reshape(edge // 2, edge // 2)
    for shift in (0, 20, 40):
        fine, coarse = level >> shift & 255, below >> shift & 255
        mean = (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]) / 4
        assert np.abs(mean - coarse).max() <= 0.5


def test_the_digest_covers_every_source() -> None:
    assert {f"{name}.py" for name in dialect.SOURCES} <= {path.name for path in dialect.HERE.iterdir()}
    assert dialect.digest() == dialect.digest() > 0


@pytest.mark.cuda
@pytest.mark.parametrize(("size", "good_visibility", "substeps"), [(9, False, 50), (15, True, 5)])
def test_cuda_agrees_on_physics(size: int, good_visibility: bool, substeps: int) -> None:
    from longdream.envs.fast_memory_maze import cuda

    env = make_env(size, good_visibility=good_visibility)
    fast, slow = advance(cuda, env, substeps, "cuda"), advance(cpu, env, substeps)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    env.close()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("size", "good_visibility", "top", "side"), [(9, False, False, 65), (15, True, False, 51), (11, False, True, 67)]
)
def test_cuda_agrees_on_images(size: int, good_visibility: bool, top: bool, side: int) -> None:
    from longdream.envs.fast_memory_maze import cuda

    env = make_env(size, good_visibility=good_visibility)
    slow, fast = draw(cpu, env, top, side).astype(int), draw(cuda, env, top, side, "cuda").astype(int)
    difference = np.abs(fast - slow)
    assert (difference > 1).mean() < 5e-3 and (difference > 0).mean() < 0.02  # CUDA computes in float32
    env.close()


@pytest.mark.cuda
def test_frames_stay_on_the_device() -> None:
    env, host = FastMemoryMazeVecEnv(3, device="cuda"), FastMemoryMazeVecEnv(3)
    assert env.reset_tensors(0).is_cuda
    host.reset_tensors(0)
    for step in range(20):
        actions = torch.tensor([1, step % 6, 4])
        rows = env.step_tensors(actions)
        expected = host.step_tensors(actions)
    assert all(value.is_cuda for value in rows)
    assert (rows.obs.cpu().int() - expected.obs.int()).abs().float().mean() < 0.05
    np.testing.assert_allclose(env.get_probes()["agent_pos"], host.get_probes()["agent_pos"], atol=1e-5)
    state = env.get_state()
    host.set_state(state)
    np.testing.assert_array_equal(host.get_probes()["agent_pos"], env.get_probes()["agent_pos"])
    env.close()
    host.close()
