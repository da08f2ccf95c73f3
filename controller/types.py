"""The interface of controllers (C)."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from longdream.controller.distributions import Distribution
from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.types import Loss


class Controller(Protocol):
    """Any C. An `nn.Module` built as `Class(config, features, parts, actions)`: features is F; parts are the sizes of
    categorical action factors, none for a box; actions is A, the length of an encoded action.

    It may also set `capturable = True`: a CUDA graph can capture `act`, which does the same work at every call and
    moves nothing to the host. It may also be `Planning`, `Judging`, `Improving`, `Replaying` or
    `Exporting`. The loss of a C
    without trainable parameters is never computed.
    """

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        """feat `(B, F)` to an encoded action `(B, A)`; box actions may need clipping to [-1, 1]."""
        ...

    def loss(self, dream: Dream) -> Loss:
        """The loss to minimise, given dreams under `act`."""
        ...

    def after_update(self) -> None:
        """Called once the optimiser has stepped."""
        ...


@runtime_checkable
class Planning(Protocol):
    """A C that plans in M before it acts in reality. In the dreams that it learns from, it acts by `act`."""

    def plan(self, model: Dreamer, feat: Tensor, state: State, greedy: bool) -> Tensor:
        """The encoded action `(B, A)` at feat `(B, F)` and M's state there, without gradient."""
        ...


@runtime_checkable
class Judging(Protocol):
    """A C that can tell what it thinks of a moment: `longdream play` shows it."""

    def value(self, feat: Tensor) -> Tensor:
        """The expected return `(...)` at feat `(..., F)`."""
        ...

    def policy(self, feat: Tensor) -> Distribution:
        """The distribution over actions at feat `(..., F)`."""
        ...


@runtime_checkable
class Improving(Protocol):
    """A C that learns in a way of its own, not by the gradient of `loss`."""

    def improve(self, model: Dreamer, starts: Starts) -> dict[str, Tensor]:
        """One update in dreams from `starts`; returns scalars to log."""
        ...


@runtime_checkable
class Replaying(Protocol):
    """A C that can learn from real clips as well (`controller.replay_value`)."""

    def replay_loss(self, clip: Clip) -> Loss:
        """A loss to minimise in addition to the one in dreams, given real clips as M sees them."""
        ...


@runtime_checkable
class Exporting(Protocol):
    """A C that can write files for other programs."""

    def export(self, folder: Path) -> None:
        """Write its files into the run's folder, at the end of training."""
        ...
