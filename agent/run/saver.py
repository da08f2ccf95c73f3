"""Checkpoints that are written beside training: a thread writes a copy of the state while learning goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Saver:
    """Writes checkpoints, one at a time.

    Args:
        write: writes a tree as the checkpoint of a step; called in a thread.
        written: called in the caller's thread by `poll` or `settle` once a checkpoint is on disk.
    """

    def __init__(self, write: Callable[[int, dict[str, Any]], object], written: Callable[[], None]):
        self.write = write
        self.written = written
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tree: dict[str, Any]) -> None:
        """Copy the tree, and begin to write it as the checkpoint of `step`; waits for the one before.

        Raises:
            DiskFull, OSError: the one before could not be written.
        """
        self.settle()
        copy = snapshot(tree, {})
        self._thread = threading.Thread(target=self._write, args=(step, copy), name="checkpoint")
        self._thread.start()

    def poll(self) -> None:
        """Finish with a checkpoint that has been written meanwhile. Raises as `save`."""
        if self._thread is not None and not self._thread.is_alive():
            self.settle()

    def settle(self) -> None:
        """Wait until everything is on disk. Raises as `save`."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error
        self.written()

    def _write(self, step: int, tree: dict[str, Any]) -> None:
        try:
            self.write(step, tree)
        except BaseException as error:  # raised where it can be handled, by `settle`
            self._error = error


def snapshot(tree: Any, seen: dict[tuple, Tensor]) -> Any:
    """A copy of a tree for a checkpoint, with tensors on the CPU, which later changes of the tree do not reach.

    seen: what was copied, by its place in memory: a tensor that occurs twice is one tensor in the copy too.
    """
    if isinstance(tree, dict):
        return {key: snapshot(value, seen) for key, value in tree.items()}
    if isinstance(tree, list):
        return [snapshot(value, seen) for value in tree]
    if type(tree) is tuple:
        return tuple(snapshot(value, seen) for value in tree)
    if isinstance(tree, torch.Tensor):
        place = (tree.data_ptr(), tree.shape, tree.stride(), tree.dtype, tree.device)
        if place in seen and tree.numel():
            return seen[place]
        seen[place] = tree.detach().clone() if tree.device.type == "cpu" else tree.detach().cpu()
        return seen[place]
    if isinstance(tree, np.ndarray):
        return tree.copy()
    return tree
