"""The notebooks of examples/ run from top to bottom, on a tiny budget, and are kept without outputs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ORDER = ("first_agent", "open_a_dream", "your_environment", "swap_a_mixer", "sb3_in_the_dream", "probe_a_memory")
"""The first one trains the run that others open: these tests run in this order, in one folder."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def test_every_notebook_is_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == sorted(ORDER)


@pytest.fixture(scope="module")
def kernel(here: Path) -> Iterator[Any]:
    """The manager of one kernel for all notebooks: each that starts imports torch anew."""
    pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    own = {
        "LONGDREAM_EXAMPLE_STEPS": "110",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    manager.start_kernel(cwd=str(here), env=os.environ | own)
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("name", ORDER)
def test_the_notebook_runs(here: Path, kernel: Any, name: str) -> None:
    import nbclient
    import nbformat

    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) >= 3 and not any(cell.outputs or cell.execution_count for cell in code)
    book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # no name is left of the notebook before
    nbclient.NotebookClient(book, km=kernel, timeout=280).execute()
    printed = "".join(out.get("text", "") for cell in code for out in cell.outputs)
    assert "Traceback" not in printed and "longdream: " not in printed, printed
    if name == "swap_a_mixer":
        assert (here / "mixers.png").stat().st_size > 5_000
