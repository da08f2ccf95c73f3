"""Images are the maze's own whatever else draws, or is freed, in the same process."""

import gc
from contextlib import closing

import gymnasium as gym
import pytest

from longdream.envs.memory_maze import gl
from longdream.envs.memory_maze.env import MemoryMazeEnv


def test_another_renderer_beside_the_maze() -> None:
    with closing(MemoryMazeEnv(9)) as env:
        first, _ = env.reset(seed=123)
        for closes in (True, False):
            other = gym.make("InvertedPendulum-v5", render_mode="rgb_array")
            other.reset(seed=0)
            other.render()  # its context is current now, which dm_control does not know
            assert (env.simulation.image() == first).all()
            if closes:
                other.close()
            del other
            gc.collect()
            assert (env.simulation.image() == first).all()
            assert (env.reset(seed=123)[0] == first).all()


def test_a_maze_that_was_not_closed_is_collected_while_another_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    import mujoco

    draw, thresholds = mujoco.mjr_render, gc.get_threshold()

    def allocating(*args: object) -> None:
        gc.set_threshold(*thresholds)
        kept = [[] for _ in range(10 * thresholds[0])]  # enough for a collection, if the collector is on
        gc.set_threshold(10**9)
        draw(*args)
        del kept

    with closing(MemoryMazeEnv(9)) as env:
        first, _ = env.reset(seed=123)
        gc.collect()
        gc.set_threshold(10**9)
        try:
            lost = MemoryMazeEnv(9)
            lost.reset(seed=1)
            lost.metadata["a cycle"] = lost  # only the collector frees it
            del lost
            monkeypatch.setattr(mujoco, "mjr_render", allocating)
            assert (env.reset(seed=123)[0] == first).all()
        finally:
            gc.set_threshold(*thresholds)


def test_the_collector_is_left_as_it_was() -> None:
    with gl.no_garbage_collection():
        with gl.no_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with gl.no_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
