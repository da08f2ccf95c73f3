"""Output heads: two-hot symexp regression (reward, value) and the probability that an episode continues."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel import ranks
from longdream.worldmodel.networks import mlp, symexp
from longdream.worldmodel.types import Loss


class TwoHot(nn.Module):
    """A number as a distribution over bins spaced evenly in symlog, from symexp(-limit) to symexp(limit).

    Targets are two-hot and the prediction is the expectation over the bins' values (arXiv 2301.04104, eqs. 10-11), so
    that the size of gradients does not depend on the scale of the numbers.
    """

    bins: Tensor

    def __init__(self, count: int = 255, limit: float = 20.0):
        super().__init__()
        half = symexp(torch.linspace(-limit, 0, count // 2 + 1, dtype=torch.float64))
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]).float(), persistent=False)

    def mean(self, logits: Tensor) -> Tensor:
        """Expectation `(...)` of logits `(..., bins)`.

        The sum pairs opposite bins, so that under uniform logits the huge outer bins cancel exactly.
        """
        weighted = logits.float().softmax(-1) * self.bins
        half = len(self.bins) // 2
        return (weighted[..., :half] + weighted[..., half + 1 :].flip(-1)).flip(-1).sum(-1) + weighted[..., half]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers `(...)` as weights on the two neighbouring bins whose mean is the number.

        Numbers outside the bins' range are clipped to it.

        Returns:
            the upper bin's index, and its weight; the bin below it has the rest of the weight, and all others none.
        """
        x = x.float().clamp(self.bins[0], self.bins[-1])
        above = torch.searchsorted(self.bins, x.contiguous()).clamp(1, len(self.bins) - 1)
        low = self.bins[above - 1]
        high = self.bins[above]
        return above, (x - low) / (high - low)

    def loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy `(...)` of logits `(..., bins)` against the numbers x `(...)`."""
        above, share = self.encode(x)
        log_probs = logits.float().log_softmax(-1)
        below = log_probs.gather(-1, above[..., None] - 1)[..., 0]
        return -((1 - share) * below + share * log_probs.gather(-1, above[..., None])[..., 0])


class RewardContinueHead(nn.Module):
    """Reward and continuation of the next row, from this row's feature and action.

    It reads (feat_t, a_t) and not feat_{t+1}. Only then does the loss teach feat_t to hold what the action depends on.
    """

    def __init__(self, features: int, actions: int, hidden: int, bins: int):
        super().__init__()
        self.two_hot = TwoHot(bins)
        self.trunk = nn.Linear(features, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        # the action scales and shifts one factor of the gated layer, because its effect depends on the situation and
        # is not a sum
        self.scale = nn.Linear(actions, hidden)
        self.shift = nn.Linear(actions, hidden)
        self.reward_out = mlp(hidden, hidden, len(self.two_hot.bins), layers=1, zero=True)
        self.cont_out = mlp(hidden, hidden, 1, layers=1)

    def forward(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """feat `(..., F)`, action `(..., A)` to reward logits `(..., bins)` and the logit of continuing `(...)`."""
        value, gate = self.trunk(feat).chunk(2, -1)
        hidden = (self.norm(value) * (1 + self.scale(action)) + self.shift(action)) * F.silu(gate)
        return self.reward_out(hidden), self.cont_out(hidden)[..., 0]

    def loss(
        self,
        feat: Tensor,
        action: Tensor,
        reward: Tensor,
        cont: Tensor,
        counts: Tensor,
    ) -> Loss:
        """Sum of the reward's and the continuation's loss.

        Args:
            feat, action: `(..., F)` and `(..., A)`. reward, cont: the targets `(...)`.
            counts: `(...)`, the weight of each element in the means, which are over all ranks' elements.
        """
        reward_logits, cont_logit = self(feat, action)
        losses = {
            "reward": self.two_hot.loss(reward_logits, reward),
            "cont": F.binary_cross_entropy_with_logits(cont_logit.float(), cont, reduction="none"),
        }
        total = ranks.total_weight(counts)
        means = {key: (each * counts).sum() / total for key, each in losses.items()}
        return Loss(means["reward"] + means["cont"], {key: mean.detach() for key, mean in means.items()})

    def expect(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean reward `(...)` and probability of continuing `(...)`."""
        reward_logits, cont_logit = self(feat, action)
        return self.two_hot.mean(reward_logits), cont_logit.float().sigmoid()
