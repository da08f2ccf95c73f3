"""What every C is, and how it is configured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from longdream.worldmodel.dream import Clip, Dream, Dreamer, Starts
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.types import Loss


class Controller(Protocol):
    """What every C offers. An `nn.Module` built as `Class(config, features, parts, actions)`: features F, the sizes of
    categorical action factors (empty for a box) and A, the length of an encoded action.

    It may also say `capturable = True`: `act` can be recorded in a CUDA graph (the same work at every call, nothing
    moved to the host). It may be `Planning`, `Improving`, `Replaying`, `Exporting`. One without weights that have
    gradients is never asked for a loss.
    """

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        """feat `(B, F)` to an encoded action `(B, A)`; boxes may need clipping to [-1, 1]."""
        ...

    def loss(self, dream: Dream) -> Loss:
        """What to minimise, given dreams that `act` was followed in."""
        ...

    def after_update(self) -> None:
        """Called once the optimiser has stepped."""
        ...


@runtime_checkable
class Planning(Protocol):
    """A C that looks ahead in M before it acts in reality. In dreams that it learns from, `act` decides."""

    def plan(self, model: Dreamer, feat: Tensor, state: State, greedy: bool) -> Tensor:
        """What to do at feat `(B, F)` with M's state there: an encoded action `(B, A)`. Without gradient."""
        ...


@runtime_checkable
class Improving(Protocol):
    """A C that learns in a way of its own instead of by the gradient of `loss`."""

    def improve(self, model: Dreamer, starts: Starts) -> dict[str, Tensor]:
        """One update from moments to dream from; returns scalars to log."""
        ...


@runtime_checkable
class Replaying(Protocol):
    """A C that can learn from what really happened too (`controller.replay_value`)."""

    def replay_loss(self, clip: Clip) -> Loss:
        """What to minimise beside the loss in dreams, given real clips as M sees them."""
        ...


@runtime_checkable
class Exporting(Protocol):
    """A C that other programs can read."""

    def export(self, folder: Path) -> None:
        """Write its files into the folder of the run, whose training has ended."""
        ...


@dataclass(frozen=True)
class PlannerConfig:
    """How `planner` plans. M's cost of a real step is iterations * horizon dreamt steps of `candidates` copies."""

    method: Literal["cem", "mppi"] = "mppi"
    """cem: the cross-entropy method on dreamt rewards alone; nothing is learned but M. mppi: candidates weighted by
    their return, with a learnt value at the horizon and a learnt policy that proposes some of them."""
    candidates: int = 64
    """Sequences of actions that are dreamt at a time."""
    elites: int = 8
    """The best of them, that the next ones are drawn around."""
    iterations: int = 3
    horizon: int = 12
    """Steps of a plan."""
    proposals: int = 8
    """How many more candidates the policy proposes (mppi)."""
    temperature: float = 0.5
    """Softness of the elites' weights, in units of the gap between the best and the worst of them (mppi)."""


@dataclass(frozen=True)
class TreeConfig:
    """How `tree` searches."""

    simulations: int = 16
    """Dreamt steps per real step and copy."""
    considered: int = 4
    """Actions at the root that are tried at all."""
    visit_weight: float = 50.0
    """Values count as much as if an action had been tried so many times more often (c_visit)."""
    value_weight: float = 0.1
    """Weight of values, scaled to [0, 1], against the policy's logits (c_scale)."""


@dataclass(frozen=True)
class EvolutionConfig:
    """How `evolution` searches."""

    population: int = 64
    """Candidates per generation; an update is a generation."""
    moments: int = 16
    """Dreams that each candidate is judged by, the same for all."""
    horizon: int = 24
    """Steps of each: as far as to a reward from where an episode begins, since no value stands for what comes later."""
    deviation: float = 0.1
    """Of the first generation's weights."""


@dataclass(frozen=True)
class Sb3Config:
    """How an algorithm of Stable-Baselines3 learns (`kind` = stable_baselines3:PPO, sb3_contrib:TRPO, ...)."""

    copies: int = 64
    """Dreams side by side. An update of C is controller.horizon steps of each."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the algorithm; gamma and n_steps are controller.gamma and controller.horizon."""
    callback: str = ""
    """A callback of SB3, as dotted path `package.module:Class`."""


@dataclass(frozen=True)
class ControllerConfig:
    """Which C, how it dreams, how it learns."""

    kind: str = "actor_critic"
    """actor_critic, planner, tree, evolution, an algorithm of Stable-Baselines3 (stable_baselines3:PPO), or a dotted
    path `package.module:Class` to a Controller of your own."""
    hidden: int = 128
    layers: int = 2
    bins: int = 255
    """Bins of the two-hot critic."""
    starts: int = 24
    """Dreams per replayed clip."""
    horizon: int = 15
    """Steps per dream."""
    decisive: float = 0.0
    """Share of the dreams that begin at most `horizon` rows before a real reward, in clips that have one. Where rewards
    are rare, few other dreams meet any."""
    gamma: float = 0.997
    lam: float = 0.95
    entropy: float = 3e-4
    unimix: float = 0.01
    """Share of a uniform distribution in categorical policies."""
    return_floor: float = 1.0
    """Advantages are divided by the spread of returns, or by this if it is larger."""
    slow_rate: float = 0.02
    """Rate at which the slow critic follows."""
    centred: bool = False
    """Take the mean off advantages. Values lag behind returns by hundreds of updates; until they have caught up, all
    actions look good or bad together, and a policy loses its entropy, or all else, whatever is better (Chung et al.
    2021, arXiv 2008.13773)."""
    replay_value: float = 0.0
    """Weight of learning values from real clips too, which holds them to what really came where dreams err. 0: C sees
    no reward but through M."""
    temperature: float = 1.0
    """Randomness of the dreams, 1 as learned."""
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    sb3: Sb3Config = field(default_factory=Sb3Config)
