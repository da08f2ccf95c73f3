"""Checkpoints written beside training: complete, of the moment when they were asked for, and their errors are heard."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from longdream.agent.run import checkpoint
from longdream.agent.run.checkpoint import DiskFull
from longdream.agent.run.saver import Saver


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the state of the moment when it was asked for, and nothing follows from it before it is on disk."""
    go_on = threading.Event()
    write = checkpoint.save

    def slow(root: Path, step: int, tree: dict) -> None:
        assert go_on.wait(20)
        write(root, step, tree)

    monkeypatch.setattr(checkpoint, "save", slow)
    written = []
    saver = Saver(
        lambda step, tree: checkpoint.save(tmp_path, step, tree), lambda: written.append(threading.current_thread())
    )
    weight = torch.arange(6.0)
    tree = {"weights": {"a": weight, "b": weight[::2]}, "rows": np.arange(3), "list": [1, (weight, "x")], "n": 3}
    saver.save(7, tree)
    saver.poll()
    weight += 100
    tree["rows"] += 100
    tree["list"].append(2)
    assert not written and checkpoint.latest(tmp_path) is None
    go_on.set()
    saver.settle()
    assert written == [threading.main_thread()]
    saved, step = checkpoint.load(tmp_path)
    assert step == 7 and saved["n"] == 3 and saved["rows"].tolist() == [0, 1, 2]
    assert saved["weights"]["a"].tolist() == [0, 1, 2, 3, 4, 5] and saved["weights"]["b"].tolist() == [0, 2, 4]
    assert saved["list"][1][0] is saved["weights"]["a"] and len(saved["list"]) == 2
    saver.settle()
    assert len(written) == 1


def test_an_error_is_raised_where_it_can_be_handled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, by the next call; what was saved before is intact."""
    written = []
    saver = Saver(lambda step, tree: checkpoint.save(tmp_path, step, tree), lambda: written.append(1))
    saver.save(1, {"n": 1})
    saver.settle()

    def full(root: Path, step: int, tree: dict) -> None:
        raise DiskFull(root, 10, OSError(28, "No space left on device"))

    monkeypatch.setattr(checkpoint, "save", full)
    saver.save(2, {"n": 2})
    with pytest.raises(DiskFull, match="disk full"):
        saver.settle()
    saver.settle()
    assert len(written) == 1 and checkpoint.load(tmp_path)[0] == {"n": 1}
