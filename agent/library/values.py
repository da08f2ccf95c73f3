"""What a trained agent takes and gives: its memory and its dreams, in numpy or torch, of one stream or of n."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from longdream.agent.core.actor import Carry
from longdream.envs.contract import UserError

if TYPE_CHECKING:
    from longdream.agent.library.trained import TrainedAgent

Array: TypeAlias = np.ndarray | Tensor
"""What is given back: tensors where tensors were given, arrays elsewhere."""
Values: TypeAlias = ArrayLike | Tensor
Observation: TypeAlias = Values | Mapping[str, Values]
"""As the environment gives it; a mapping where its space is a Dict."""


@dataclass(frozen=True, repr=False)
class Memory:
    """What an agent has seen, of one stream of observations or of n. It is a value: no call changes it, so it can be
    kept, and dreams can branch from it.

    carry: of n streams (n = 1 for a single one): the last feature, M's state, the last action.
    started: `(n,)` bool, whether anything has been seen. single: whether values come without a batch axis.
    tensors: whether values are given as tensors, as the observations were, rather than as arrays.

    >>> import longdream as ld
    >>> agent = ld.load("runs/demo")
    >>> obs, _ = agent.make_env().reset(seed=0)
    >>> memory = agent.observe(obs, agent.reset())
    >>> memory, memory.repeat(8), len(memory.repeat(8))
    (Memory(of 1 stream), Memory(of 8 streams), 8)
    """

    carry: Carry
    started: Tensor
    single: bool
    tensors: bool = False

    def __len__(self) -> int:
        return len(self.started)

    def __repr__(self) -> str:
        return f"Memory(of {len(self)} stream{'s' * (len(self) != 1)})"

    @property
    def features(self) -> Array:
        """What C sees of it: `(F,)`, or `(n, F)` float32."""
        return as_given(self.carry.feat, self)

    def repeat(self, n: int) -> Memory:
        """n copies of the memory of a single stream, as a batch: for n dreams from one moment.

        Raises:
            UserError: it is a batch already.
        """
        if not self.single:
            raise UserError(f"this memory is a batch of {len(self)}: only that of a single stream can be repeated")

        def copies(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(n, 0)

        feat, state, action = self.carry
        return replace(
            self,
            carry=Carry(copies(feat), state.map(copies), copies(action)),
            started=copies(self.started),
            single=False,
        )

    def without_long_memory(self) -> Memory:
        """The same with the states of M's scans erased. What its attention over the last frames holds stays: M is a
        hybrid of both, after Po et al. 2025 (arXiv 2505.20171).

        >>> import longdream as ld
        >>> agent = ld.load("runs/demo")
        >>> obs, _ = agent.make_env().reset(seed=0)
        >>> memory = agent.observe(obs, agent.reset())
        >>> agent.imagine(memory.without_long_memory(), horizon=3).rewards.shape
        (3,)
        """
        return replace(self, carry=self.carry._replace(state=self.carry.state.without_long_memory()))


class Surprise(NamedTuple):
    """How far an observation differs from what M predicted, each a float or `(n,)`, at least 0; see docs/surprise.md.

    latent: a squared error, or nats, as M's objective measures. reward: |expected - real|. end: nats.
    """

    latent: float | Array
    reward: float | Array
    end: float | Array


@dataclass(frozen=True, repr=False)
class Dream:
    """H dreamt steps, of one dream or, with a leading axis, of n. Entry t of each field belongs to the t-th action:
    the frame, reward and end that M imagines to follow from it.

    actions: `(H, *native)` in the environment's form. rewards: `(H,)`, M's expected rewards. ends: `(H,)`, the
    probability that the episode terminates there. features: `(H, F)`, what C sees. latents: `(H, N, D)`, V's tokens.

    >>> import longdream as ld
    >>> agent = ld.load("runs/demo")
    >>> obs, _ = agent.make_env().reset(seed=0)
    >>> dream = agent.imagine(agent.observe(obs, agent.reset()), horizon=6)
    >>> dream, dream.frames.shape == (6, *obs.shape), bool((dream.ends <= 1).all())
    (Dream(of 6 steps), True, True)
    """

    actions: Array
    rewards: Array
    ends: Array
    features: Array
    latents: Array
    agent: TrainedAgent

    def __repr__(self) -> str:
        *many, steps = self.rewards.shape
        return f"Dream({f'{many[0]} ' if many else ''}of {steps} steps)"

    @cached_property
    def frames(self) -> Any:
        """The dreamt observations, decoded by V when they are first asked for: `(H, *shape)` as `TrainedAgent.decode`
        gives them, a dict of these where the observations are a Dict."""
        return self.agent.decode(self.latents, self.features)


def as_given(value: Tensor, memory: Memory) -> Any:
    """A value `(n, ...)` as it is given: an array or a tensor, and of a single stream without its axis."""
    value = value[0] if memory.single else value
    if memory.tensors:
        return value
    array = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    return array[()]


def as_array(value: Values) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def batched(value: Values, single: bool) -> np.ndarray:
    array = as_array(value)
    return array[None] if single else array
