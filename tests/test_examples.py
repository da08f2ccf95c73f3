"""The notebooks of examples/ run from top to bottom, on a tiny budget, and are kept without outputs."""

import os
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ORDER = ("first_agent", "open_a_dream", "your_environment", "swap_a_mixer", "sb3_in_the_dream", "probe_a_memory")
"""The first one trains the run that others open: these tests run in this order, in one folder."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def test_every_notebook_is_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_the_notebook_runs(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("LONGDREAM_EXAMPLE_STEPS", "150")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) >= 3 and not any(cell.outputs or cell.execution_count for cell in code)
    nbclient.NotebookClient(book, timeout=280, resources={"metadata": {"path": str(here)}}).execute()
    printed = "".join(out.get("text", "") for cell in code for out in cell.outputs)
    assert "Traceback" not in printed and "longdream: " not in printed, printed
    if name == "swap_a_mixer":
        assert (here / "mixers.png").stat().st_size > 5_000
