"""What every test can rely on: one thread per worker, fixed seeds, no display, the CUDA marker."""

import atexit
import gc
import os
from pathlib import Path

# Before torch or a drawing library is imported, and inherited by the subprocesses that tests start. More than one
# thread would make the workers fight for the cores and change the order of sums, and several tests compare bit for bit.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["SDL_VIDEODRIVER"] = "dummy"
# Subprocesses find the package in a checkout that is not installed, and whatever this process was told to find.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).resolve().parents[1] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# As the command line does: what imports make is no garbage, and is not searched again and again.
gc.set_threshold(10_000)
atexit.register(gc.freeze)

# No deadline: the first example of a property often pays for a compilation or an import. In CI the examples are the
# same each time, so that a failure there is one that anybody can repeat; elsewhere they vary.
settings.register_profile("longdream", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("longdream")


@pytest.fixture(autouse=True, scope="session")
def no_trust_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of tests are remembered as trusted, here and in subprocesses, but not in the list of who runs the tests."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What is imported by now is never garbage, and collections need not look at it. Each would take a third of a
    second, and imageio asks for one whenever it closes a film."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds the global generators, so that a test gives the same result alone, in any order and on any worker."""
    torch.manual_seed(0)
    np.random.seed(0)


SLOW = (
    "agent/ranks/test_faults.py",
    "agent/play/test_browser.py",
    "envs/memory_maze/test_identity.py",
    "envs/minerl/test_minerl.py",
    "agent/bench/test_bench.py",
    "envs/memory_maze/test_memory_maze.py",
    "envs/fast_memory_maze/test_original.py",
    "agent/bench/test_faults.py",
    "agent/train/test_resume.py",
    "agent/train/test_collector_process.py",
    "agent/library/test_export.py",
    "test_examples.py",
    "agent/evaluation/test_environments.py",
    "agent/cli/test_compare.py",
    "agent/run/test_trust.py",
    "agent/cli/test_output.py",
    "worldmodel/test_dynamics.py",
    "agent/ranks/test_equal.py",
    "agent/train/test_video.py",
    "agent/run/test_hostile.py",
    "agent/train/test_imagined.py",
    "agent/train/test_faults.py",
    "agent/train/test_collector.py",
    "agent/ranks/test_scale.py",
    "docs/test_library_page.py",
    "agent/bench/test_world_model.py",
    "envs/fast_memory_maze/test_fast_memory_maze.py",
    "agent/cli/test_report.py",
    "agent/cli/test_sweep.py",
    "agent/train/test_trainer.py",
    "envs/test_checks.py",
    "test_wheel.py",
    "agent/run/test_beginning.py",
    "agent/train/test_controllers.py",
    "agent/ranks/test_video.py",
    "envs/memory_maze/test_policies.py",
    "agent/evaluation/baselines/test_scripted.py",
    "agent/play/test_server.py",
)
"""Files that take longest: begun first, so that no worker sits at one of them when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {path: place for place, path in enumerate(SLOW)}
    here = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(here).as_posix(), len(SLOW)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
