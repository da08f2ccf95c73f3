"""What every test can rely on: one thread per worker, fixed seeds, no display, the CUDA marker."""

import os

# Before torch or a drawing library is imported, and inherited by the subprocesses that tests start. More than one
# thread would make the workers fight for the cores and change the order of sums, and several tests compare bit for bit.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["SDL_VIDEODRIVER"] = "dummy"

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: the first example of a property often pays for a compilation or an import. In CI the examples are the
# same each time, so that a failure there is one that anybody can repeat; elsewhere they vary.
settings.register_profile("longdream", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("longdream")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds the global generators, so that a test gives the same result alone, in any order and on any worker."""
    torch.manual_seed(0)
    np.random.seed(0)


DEAR = (
    "test_memory_maze_identity.py",
    "test_resume.py",
    "test_fast_memory_maze_original.py",
    "test_checkpoint.py",
    "test_fast_memory_maze.py",
    "test_remote_faults.py",
    "test_bench.py",
    "test_controllers.py",
    "test_faults.py",
    "test_dream_loop.py",
    "test_minerl.py",
    "test_video_loop.py",
    "test_bench_world_model.py",
    "test_mixers.py",
)
"""Files of a minute and more: begun first, so that no worker sits at one of them when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: DEAR.index(item.path.name) if item.path.name in DEAR else len(DEAR))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
