"""New runs: the claim to a name, and the configuration that they begin with."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from longdream.agent.config import options
from longdream.agent.run import folder as run_folder


def together(folder: Path, count: int, *flags: str) -> list[int]:
    """Exit codes of trainings that begin at the same moment."""
    short = ["--steps", "80", "--evaluate.every", "0", "--evaluate.final_episodes", "1"]
    command = [sys.executable, "-m", "longdream", "train", "tiny", *short, *flags]
    begun = [subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) for _ in range(count)]
    return [process.wait(200) for process in begun]


def test_trainings_that_begin_together_take_a_name_each(tmp_path: Path) -> None:
    assert together(tmp_path, 2) == [0, 0]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["tiny-s0-1", "tiny-s0-2"]
    assert all((run / "summary.json").exists() for run in runs)


def test_of_two_that_begin_together_with_one_name_one_is_refused(tmp_path: Path) -> None:
    assert sorted(together(tmp_path, 2, "--name", "r")) == [0, 2]
    assert (tmp_path / "runs" / "r" / "summary.json").exists()


def test_a_name_that_was_taken_meanwhile_leads_to_the_next(tmp_path: Path) -> None:
    config = options.load("tiny")
    chosen = []

    def choose() -> Path:
        chosen.append(run_folder.unused(None, "tiny", 0, tmp_path))
        return chosen[-1]

    def start(folder: Path) -> Path:
        if len(chosen) == 1:
            run_folder.create(folder, config)  # another process
        return run_folder.create(folder, config)

    assert run_folder.claim(choose, start, fixed=False) == tmp_path / "tiny-s0-2"
    chosen.clear()
    with pytest.raises(run_folder.InUse, match="is in use"):
        run_folder.claim(choose, start, fixed=True)


def test_a_configuration_that_was_edited_before_the_first_checkpoint(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "run", options.load("tiny"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_folder.newest(folder) is None
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 3"))
    with pytest.warns(RuntimeWarning, match=r"has changed since the run began: seed = 3, was 0$"):
        assert run_folder.newest(folder) is None
    for text in ("", "[]", "{", '{"seed": 7}', "\udcff"):  # of another program, or damaged
        (folder / run_folder.BEGUN).write_text(text, errors="surrogateescape")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert run_folder.newest(folder) is None
