"""Output heads: two-hot symexp regression (reward, value) and the probability that an episode goes on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel.types import Loss


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|) (Hafner et al. 2023, arXiv 2301.04104, eq. 9)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


def draw(probs: Tensor) -> Tensor:
    """Indices `(...)` drawn from `(..., n)` probabilities, as torch.multinomial draws them, without its checks: these
    wait for the device, and cannot be recorded in a CUDA graph."""
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


class TwoHot(nn.Module):
    """A number as a distribution over bins spaced evenly in symlog, from symexp(-limit) to symexp(limit).

    Two-hot targets and the expectation over the bins' values as prediction (arXiv 2301.04104, eqs. 10-11), which
    keeps gradients independent of the numbers' scale.
    """

    bins: Tensor

    def __init__(self, count: int = 255, limit: float = 20.0):
        super().__init__()
        half = symexp(torch.linspace(-limit, 0, count // 2 + 1, dtype=torch.float64))
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]).float(), persistent=False)

    def mean(self, logits: Tensor) -> Tensor:
        """Expectation of `(..., bins)` logits. Summed symmetrically: with even weights the huge outer bins cancel
        exactly."""
        weighted = logits.float().softmax(-1) * self.bins
        half = len(self.bins) // 2
        return (weighted[..., :half] + weighted[..., half + 1 :].flip(-1)).flip(-1).sum(-1) + weighted[..., half]

    def encode(self, x: Tensor) -> Tensor:
        """`(...)` to two-hot `(..., bins)`: weights on the two neighbouring bins whose mean is x; clipped to the
        bins' range."""
        x = x.float().clamp(self.bins[0], self.bins[-1])
        above = torch.searchsorted(self.bins, x.contiguous()).clamp(1, len(self.bins) - 1)
        low, high = self.bins[above - 1], self.bins[above]
        share = ((x - low) / (high - low))[..., None]
        return F.one_hot(above - 1, len(self.bins)) * (1 - share) + F.one_hot(above, len(self.bins)) * share

    def loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy `(...)` of logits `(..., bins)` against the number x `(...)`."""
        return -(self.encode(x) * logits.float().log_softmax(-1)).sum(-1)


class Gated(nn.Module):
    """A hidden layer whose outputs are products, norm(W x) * silu(V x) (a gated linear unit, Shazeer 2020, arXiv
    2002.05202).

    What is remembered often matters only together with what is seen ("is this the door of that colour?"): a product
    can say so in one layer.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.both = nn.Linear(inputs, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, -1)
        return self.norm(value) * F.silu(gate)


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 2, zero: bool = False) -> nn.Sequential:
    """`layers` gated hidden layers, then a linear output; `zero` starts it at zero output."""
    parts: list[nn.Module] = [Gated(inputs if i == 0 else hidden, hidden) for i in range(layers)]
    out = nn.Linear(hidden, outputs)
    if zero:
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
    return nn.Sequential(*parts, out)


class Consequence(nn.Module):
    """Reward and continuation of the next row, from the feature of this one and the action taken there.

    Read from (feat_t, a_t) rather than from feat_{t+1}: only so does feat_t have a reason to hold what the action
    needs.
    """

    def __init__(self, features: int, actions: int, hidden: int, bins: int):
        super().__init__()
        self.two_hot = TwoHot(bins)
        self.trunk = nn.Linear(features, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        # the action scales and shifts one factor of the gated layer: what it leads to depends on what
        # is there, not on a sum
        self.scale, self.shift = nn.Linear(actions, hidden), nn.Linear(actions, hidden)
        self.reward_out = mlp(hidden, hidden, len(self.two_hot.bins), layers=1, zero=True)
        self.cont_out = mlp(hidden, hidden, 1, layers=1)

    def forward(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """feat `(..., F)`, action `(..., A)` to reward logits `(..., bins)` and the logit of going on `(...)`."""
        value, gate = self.trunk(feat).chunk(2, -1)
        hidden = (self.norm(value) * (1 + self.scale(action)) + self.shift(action)) * F.silu(gate)
        return self.reward_out(hidden), self.cont_out(hidden)[..., 0]

    def loss(
        self,
        feat: Tensor,
        action: Tensor,
        reward: Tensor,
        alive: Tensor,
        counts: Tensor,
        weights: tuple[float, float],
    ) -> Loss:
        """Of reward and continuation, weighted by `weights`: feat `(..., F)`, action `(..., A)` against what came of
        them, reward and alive `(...)`; a mean in which each counts as `counts` `(...)` says."""
        logits, going_on = self(feat, action)
        parts = {
            "reward": self.two_hot.loss(logits, reward),
            "cont": F.binary_cross_entropy_with_logits(going_on.float(), alive, reduction="none"),
        }
        means = {key: (each * counts).sum() / counts.sum().clamp(min=1) for key, each in parts.items()}
        value = weights[0] * means["reward"] + weights[1] * means["cont"]
        return Loss(value, {key: mean.detach() for key, mean in means.items()})

    def expect(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean reward `(...)` and probability of going on `(...)`."""
        reward, cont = self(feat, action)
        return self.two_hot.mean(reward), cont.float().sigmoid()
