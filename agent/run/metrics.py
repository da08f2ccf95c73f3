"""Averages of metrics between two lines of metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Averages:
    """Sums and counts of metrics since the last line. Tensors stay on their device until `means` is called."""

    def __init__(self, sums: dict[str, Any] | None = None, numbers: dict[str, Any] | None = None):
        self.sums = sums or {}
        self.numbers = numbers or {}

    def add(self, metrics: dict[str, Any], finite: Tensor | bool = True) -> None:
        """Add metrics of an update, unless it was skipped because it was not finite. On CUDA this is decided on the
        device, without waiting for it."""
        if isinstance(finite, Tensor) and finite.is_cuda:
            for key, value in metrics.items():
                self.sums[key] = self.sums.get(key, 0.0) + torch.where(finite, value, 0.0)
                self.numbers[key] = self.numbers.get(key, 0) + finite.long()
        elif finite:
            for key, value in metrics.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
                self.numbers[key] = self.numbers.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: float(total) / int(self.numbers[key]) for key, total in self.sums.items() if self.numbers[key]}
