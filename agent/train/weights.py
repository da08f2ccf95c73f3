"""An actor's weights in memory that two processes share."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor, nn

from longdream.agent.core.actor import Actor
from longdream.agent.core.device import HostCopy
from longdream.envs.contract import UserError

HEADER = 64
"""Bytes before the weights, of which the first eight are their version."""
NONE = -1
"""Version of weights that nobody has handed over."""


class SharedWeights:
    """The weights of V, M and C, handed from the process that learns to one that acts, without a stop of either.

    The memory is locked while weights are copied into it or out of it, and by nothing else. It is the lock of a file,
    which the system opens when a process dies that holds it.

    Args:
        actor: whose weights are handed over, or set.
        file: descriptor of the memory; None makes it.

    Raises:
        UserError: the controller keeps weights that are neither parameters nor buffers.
    """

    def __init__(self, actor: Actor, file: int | None = None):
        assert isinstance(actor.controller, nn.Module)
        if not all(isinstance(value, Tensor) for value in actor.controller.state_dict().values()):
            raise UserError(
                f"env.workers = beside (--collect.async): the weights of controller.kind = "
                f"{actor.config.controller.kind} are its own, and cannot be handed over; use --env.workers async"
            )
        self.actor = actor
        size = HEADER + sum(tensor.nbytes for tensor in self._tensors())
        self.file = _new_memory(size) if file is None else file
        weakref.finalize(self, os.close, self.file)
        memory = mmap.mmap(self.file, size)
        self.version = np.frombuffer(memory, np.int64, 1)
        self.weights = torch.frombuffer(memory, dtype=torch.uint8, offset=HEADER)
        if file is None:
            self.version[0] = NONE
        self.known = NONE
        """Version of the weights that were taken last, or of which a copy was last begun."""
        self.copying: HostCopy | None = None

    @torch.no_grad()
    def publish(self, version: int) -> None:
        """Hand over the weights of now under this number, unless it is that of the last ones.

        Nothing is waited for. From a GPU they are on their way until the next call, which then hands them over; so they
        are if the other process is just reading. Only the first ones are there at once.
        """
        self._pass_on()
        if self.copying is not None or version == self.known:
            return
        first = self.known == NONE
        self.known = version
        tensors = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in self._tensors()]
        self.copying = HostCopy(torch.cat(tensors))
        if first:
            self.copying.read()
        self._pass_on()

    def _pass_on(self) -> None:
        if self.copying is None or not self.copying.done():
            return
        with suppress(BlockingIOError, PermissionError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            self.weights.copy_(self.copying.read())
            self.version[0] = self.known
            self.copying = None

    @torch.no_grad()
    def take(self) -> int:
        """Set the actor's weights to the newest ones; returns their number."""
        if self.version[0] == self.known:
            return self.known
        with self._locked(fcntl.LOCK_EX):
            self.known = int(self.version[0])
            newest = self.weights.to(self.actor.device, copy=True)
        tensors = self._tensors()
        for tensor, part in zip(tensors, newest.split([tensor.nbytes for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
        return self.known

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fcntl.lockf(self.file, how)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)

    def _tensors(self) -> list[Tensor]:
        """Those of the largest elements first, so that each begins at a multiple of the size of its own."""
        return sorted(self.actor.tensors(), key=lambda tensor: -tensor.element_size())


def _new_memory(size: int) -> int:
    """The descriptor of a file of `size` bytes that has no name and, on Linux, lies in memory."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("longdream-weights")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file
