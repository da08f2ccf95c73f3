"""The interface of controllers (C), and their configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge
from torch import Tensor

from longdream.controller.distributions import Distribution
from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.fields import AT_LEAST_0, AT_LEAST_1, POSITIVE, SHARE
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


@dataclass(frozen=True)
class ControllerConfig:
    """Which C, how it dreams and how it learns."""

    kind: str = "actor_critic"
    """actor_critic, planner, tree, evolution, an algorithm of Stable-Baselines3 (stable_baselines3:PPO), or a dotted
    path `package.module:Class` to a Controller of your own."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings of that kind of C, listed in docs/controllers.md. For an algorithm of Stable-Baselines3, its
    arguments."""
    hidden: Annotated[int, AT_LEAST_1] = 128
    """Width of the policy's and the critic's MLP."""
    layers: Annotated[int, AT_LEAST_1] = 2
    """Hidden layers of these MLPs."""
    bins: Annotated[int, Ge(3)] = 255
    """Bins of the two-hot critic."""
    imagination_starts: Annotated[int, AT_LEAST_1] = 24
    """Dreams per replayed clip."""
    horizon: Annotated[int, AT_LEAST_1] = 15
    """Steps per dream."""
    gamma: Annotated[float, SHARE] = 0.997
    """Discount per step."""
    lam: Annotated[float, SHARE] = 0.95
    """Lambda of the lambda-returns."""
    entropy: Annotated[float, AT_LEAST_0] = 3e-4
    """Weight of the policy's entropy."""
    unimix: Annotated[float, SHARE] = 0.01
    """Share of a uniform distribution in categorical policies."""
    return_floor: Annotated[float, POSITIVE] = 1.0
    """Advantages are divided by the spread of returns, or by this if it is larger."""
    target_ema: Annotated[float, SHARE] = 0.02
    """Rate at which the target critic follows the critic (an exponential moving average)."""
    center_advantages: bool = False
    """Subtract the mean of the advantages. Values lag behind returns by hundreds of updates. Until they have caught up,
    all actions look good or all look bad, and the policy collapses whichever is better (Chung et al. 2021, arXiv
    2008.13773)."""
    replay_value: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of the critic's loss on real clips, in addition to the one in dreams; it corrects values where dreams are
    wrong. 0: C sees rewards through M alone."""
