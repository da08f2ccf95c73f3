"""From the thread that reads to the device that learns, beside what that is working on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from longdream.worldmodel.types import Batch


class Transfer:
    """Rows of clips as a `Batch` on a device. On CUDA they are copied from pinned memory in a stream of their own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def bring(self, rows: dict[str, Any]) -> Batch:
        """In the thread that reads: the batch, which is there when this returns."""
        if self.stream is None:
            return Batch.of(rows, self.device)
        with torch.cuda.stream(self.stream):
            pinned = pytree.tree_map(lambda array: torch.from_numpy(array).pin_memory(), rows)
            batch = Batch.of(pinned, self.device)
            self.stream.synchronize()
        return batch

    def take(self, batch: Batch) -> Batch:
        """In the thread that learns: its stream uses this memory from now on."""
        if self.stream is not None:
            using = torch.cuda.current_stream(self.device)
            for tensor in pytree.tree_leaves(batch.fields()):
                tensor.record_stream(using)
        return batch
