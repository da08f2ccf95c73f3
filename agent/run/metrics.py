"""The state of a training run as a tree, and back: all that the future of the run depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longdream.agent.run import folder as run

if TYPE_CHECKING:
    from longdream.agent.train.online import Training


class Window:
    """Sums of metrics since the last line; tensors stay on their device until their mean is asked for."""

    def __init__(self, sums: dict[str, Any] | None = None, numbers: dict[str, Any] | None = None):
        self.sums, self.numbers = sums or {}, numbers or {}

    def add(self, metrics: dict[str, Any], counts: Tensor | bool = True) -> None:
        """Add to the sums, unless these do not count: an update that was skipped has no finite metrics. On CUDA that is
        decided there, without waiting for it."""
        later = counts if isinstance(counts, Tensor) and counts.is_cuda else None
        if later is None and not counts:
            return
        for key, value in metrics.items():
            told = value if later is None else torch.where(later, value, 0.0)
            self.sums[key] = self.sums.get(key, 0.0) + told
            self.numbers[key] = self.numbers.get(key, 0) + (1 if later is None else later.long())

    def means(self) -> dict[str, float]:
        return {key: float(total) / int(self.numbers[key]) for key, total in self.sums.items() if self.numbers[key]}


def tree(training: Training) -> dict[str, Any]:
    """What `restore` goes on from, for a checkpoint. A world that is lost has no state: new episodes will begin.

    Raises:
        EnvError: the world failed now; a second call saves the run without it.
    """
    agent, collector = training.agent, training.collector
    collected = None
    if not training.world_is_lost:
        with training.in_world():
            collected = collector.get_state()
    return {
        **agent.state_dict(),
        "spec": training.world.spec.to_json(),
        "collector": collected,
        "acted": [collector.env_steps, collector.episodes],
        "replay": training.replay.state(),
        "logger": training.logger.state(),
        "window": {"sums": dict(training.window.sums), "numbers": dict(training.window.numbers)},
        "random": {
            "numpy": {name: rng.bit_generator.state for name, rng in training.rng.items()},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if agent.device.type == "cuda" else [],
        },
        "count": training.count | {"wall": training.wall(), "faults": training.faults()},
    }


def restore(training: Training, saved: dict[str, Any]) -> list[str]:
    """Put a training run that was just built, and whose logger is restored, back to `saved`; returns warnings.

    Raises:
        UserError: the checkpoint is of another configuration.
    """
    run.fill(training.agent, saved, training.folder)
    warnings = training.replay.restore(saved["replay"])
    if saved["collector"]:
        training.collector.set_state(saved["collector"])
    training.collector.env_steps, training.collector.episodes = saved["acted"]
    training.window = Window(saved["window"]["sums"], saved["window"]["numbers"])
    random = saved["random"]
    for name, state in random["numpy"].items():
        training.rng[name].bit_generator.state = state
    torch.set_rng_state(random["torch"])
    if training.agent.device.type == "cuda" and random["cuda"]:
        torch.cuda.set_rng_state_all(random["cuda"])
    return warnings
