"""Distributions over encoded actions: one-hots side by side, or boxes scaled to [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longdream.worldmodel.categorical import draw_index


def draw_factors(probs: Sequence[Tensor]) -> Tensor:
    """One-hot vectors side by side, `(..., A)`: a class of each factor, drawn from its probabilities `(..., n)`."""
    return torch.cat([F.one_hot(draw_index(p), p.shape[-1]).to(p.dtype) for p in probs], -1)


def likeliest_factors(probs: Sequence[Tensor]) -> Tensor:
    """One-hot vectors side by side, `(..., A)`: the likeliest class of each factor, by probabilities or logits
    `(..., n)`."""
    return torch.cat([F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype) for p in probs], -1)


class Categoricals:
    """Independent categorical factors, each a softmax that is mixed with a uniform distribution of weight `unimix`.

    Args:
        logits: `(..., sum(parts))`.
    """

    def __init__(self, logits: Tensor, parts: Sequence[int], unimix: float):
        self.factors = logits.split(list(parts), -1)
        probs = ((1 - unimix) * p.softmax(-1) + unimix / n for p, n in zip(self.factors, parts, strict=True))
        # with unimix = 0 a softmax can underflow, and 0 log 0 is not a number
        self.probs = [p.clamp(min=torch.finfo(p.dtype).tiny) for p in probs]

    def sample(self) -> Tensor:
        """`(..., A)` one-hots."""
        return draw_factors(self.probs)

    def mode(self) -> Tensor:
        return likeliest_factors(self.probs)

    def log_prob(self, action: Tensor) -> Tensor:
        """`(...)`, of actions `(..., A)`."""
        return (torch.cat(self.probs, -1).log() * action).sum(-1)

    def gain(self, action: Tensor, advantage: Tensor) -> Tensor:
        """`(...)`: what a policy gradient climbs, log-probabilities of actions `(..., A)` times advantages `(...)`.

        The gradient of the mixture's log-probability is as small as the softmax's probability: an action that only the
        uniform part still draws would never be learned again, however good it is. So where an action was good, the
        gradient is that of the softmax alone. Where it was bad it is the mixture's, which leaves alone what is as
        unlikely as can be.
        """
        mixture = self.log_prob(action)
        softmax = (torch.cat([p.log_softmax(-1) for p in self.factors], -1) * action).sum(-1)
        return advantage * torch.where(advantage > 0, softmax + (mixture - softmax).detach(), mixture)

    def entropy(self) -> Tensor:
        """`(...)` nats, summed over factors."""
        return torch.stack([-(p * p.log()).sum(-1) for p in self.probs]).sum(0)


class BoundedNormal:
    """A normal distribution per dimension, with mean in [-1, 1] by tanh and standard deviation in [0.1, 1].

    Samples may leave the box [-1, 1]; they are clipped where they are used.

    Args:
        raw: `(..., 2 A)`.
    """

    def __init__(self, raw: Tensor):
        mean, spread = raw.chunk(2, -1)
        self.mean = mean.tanh()
        self.deviation = 0.1 + 0.9 * torch.sigmoid(spread + 2)

    def sample(self) -> Tensor:
        return self.mean + self.deviation * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        scaled = (action - self.mean) / self.deviation
        return -(0.5 * scaled.square() + self.deviation.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def gain(self, action: Tensor, advantage: Tensor) -> Tensor:
        """`(...)`, see `Categoricals.gain`."""
        return advantage * self.log_prob(action)

    def entropy(self) -> Tensor:
        return (self.deviation.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


Distribution = Categoricals | BoundedNormal


def outputs(parts: Sequence[int], size: int) -> int:
    """Size of a policy's output: a logit per class of each factor, or mean and spread of each of `size` dimensions."""
    return sum(parts) if parts else 2 * size


def distribution(raw: Tensor, parts: Sequence[int], unimix: float) -> Distribution:
    """The distribution that a policy's output `(..., outputs)` parametrises."""
    return Categoricals(raw, parts, unimix) if parts else BoundedNormal(raw)
