"""Copies batches from the reading thread to the device while the device computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from longdream.worldmodel.types import Batch


class Transfer:
    """Turns rows of clips into a `Batch` on a device. On CUDA a separate stream copies them from pinned memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def bring(self, rows: dict[str, Any]) -> Batch:
        """Copy the rows and wait for the copy. Called in the reading thread."""
        if self.stream is None:
            return Batch.of(rows, self.device)
        with torch.cuda.stream(self.stream):
            pinned = pytree.tree_map(lambda array: torch.from_numpy(array).pin_memory(), rows)
            batch = Batch.of(pinned, self.device)
            self.stream.synchronize()
        return batch

    def take(self, batch: Batch) -> Batch:
        """Tell the allocator that the current stream uses the batch's memory. Called in the learning thread."""
        if self.stream is not None:
            using = torch.cuda.current_stream(self.device)
            for tensor in pytree.tree_leaves(batch.fields()):
                tensor.record_stream(using)
        return batch
