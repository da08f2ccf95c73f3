"""Configuration of C. Nothing is imported here that takes long: help reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from longdream.worldmodel.fields import AT_LEAST_0, AT_LEAST_1, POSITIVE, SHARE


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
