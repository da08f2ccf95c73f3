"""Our Memory Maze compared with upstream's environment: images, rewards and probes are equal, bit for bit."""

import os

import numpy as np
import pytest

from longdream.envs.memory_maze.env import MemoryMazeEnv, upstream_imports

EPISODES = int(os.environ.get("LONGDREAM_EPISODES", "0"))  # of 1,000 steps: a minute each


def upstream(size: int, **options):
    """Upstream's dm_env environment, made by its own constructor."""
    with upstream_imports():
        from memory_maze import tasks
    return getattr(tasks, f"memory_maze_{size}x{size}")(**options)


def assert_equal_steps(ours: MemoryMazeEnv, theirs, actions: np.ndarray) -> None:
    """Step both environments with the same actions and compare every image and reward."""
    for t, action in enumerate(actions):
        obs, reward, terminated, truncated, _ = ours.step(action)
        step = theirs.step(action)
        np.testing.assert_array_equal(obs, step.observation, err_msg=f"step {t}")
        assert reward == step.reward and truncated == step.last() and not terminated, f"step {t}"
        assert step.discount == 1.0


@pytest.mark.parametrize("seed", range(2 + EPISODES))
def test_random_steps_equal_upstreams(seed: int) -> None:
    """Beginnings of episodes; the end of one, after the clocks of both were put forward; whole ones of 1,000 steps."""
    ours, theirs = MemoryMazeEnv(9), upstream(9, seed=seed, image_only_obs=True)
    obs, _ = ours.reset(seed=seed)
    np.testing.assert_array_equal(obs, theirs.reset().observation)
    actions = np.random.default_rng(seed).integers(6, size=1000 if seed > 1 else 60)
    assert_equal_steps(ours, theirs, actions)
    assert ours.running == (seed < 2)  # an episode has 1,000 steps
    if seed == 0:
        for physics in (ours.simulation.physics, theirs.physics):
            physics.data.time = 240.0
        assert_equal_steps(ours, theirs, actions[:40])
        assert not ours.running  # it has 250 seconds
    np.testing.assert_array_equal(ours.reset()[0], theirs.reset().observation)  # and so is the next episode
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("size", "options", "steps"),
    [
        (11, {"randomize_colors": True}, 15),
        (13, {"top_camera": True, "camera_resolution": 128}, 10),
        (15, {"good_visibility": True}, 15),
        (9, {"control_freq": 40.0}, 40),
    ],
)
def test_sizes_and_options_equal_upstreams(size: int, options: dict, steps: int) -> None:
    ours, theirs = MemoryMazeEnv(size, **options), upstream(size, seed=7, image_only_obs=True, **options)
    ours.reset(seed=3)
    ours.step(1)  # a new seed must not depend on earlier episodes
    actions = np.random.default_rng(7).integers(6, size=steps)
    for episode in range(2):
        obs, _ = ours.reset(seed=7) if episode == 0 else ours.reset()
        np.testing.assert_array_equal(obs, theirs.reset().observation)
        assert_equal_steps(ours, theirs, actions)
    ours.close()
    theirs.close()


def test_probes_are_upstreams_global_observables() -> None:
    ours, theirs = MemoryMazeEnv(11, probes=True), upstream(11, seed=4, global_observables=True)
    _, info = ours.reset(seed=4)
    step = theirs.reset()
    for action in [1, 1, 4, 4, 2, 5, 1, 1]:
        seen = step.observation
        for key in ("maze_layout", "agent_pos", "agent_dir", "targets_pos", "targets_vec", "target_color"):
            np.testing.assert_array_equal(info[key], seen[key], err_msg=key)
            assert info[key].dtype == seen[key].dtype
        np.testing.assert_array_equal(info["targets_pos"][info["target_index"]], seen["target_pos"])
        step = theirs.step(action)
        *_, info = ours.step(action)
    ours.close()
    theirs.close()
