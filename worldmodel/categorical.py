"""Categorical variables: sampling and cross-entropy.

A latent of D channels holds D / classes variables, each a one-hot vector over `classes` channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_index(probs: Tensor) -> Tensor:
    """Class indices `(...)` drawn from probabilities `(..., n)`.

    Distributed as by torch.multinomial, without its checks, which synchronise with the device and cannot be captured in
    a CUDA graph.
    """
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def draw_one_hots(logits: Tensor, classes: int, temperature: float | Tensor) -> Tensor:
    """One-hot vectors `(..., D)` drawn from logits `(..., D)`."""
    probs = (logits.unflatten(-1, (-1, classes)) / temperature).softmax(-1)
    return F.one_hot(draw_index(probs), classes).to(logits.dtype).flatten(-2)


def cross_entropy(logits: Tensor, z: Tensor, classes: int) -> Tensor:
    """-log p of the one-hot vectors z `(..., D)` under logits `(..., D)`, in nats per variable: `(..., D /
    classes)`."""
    log_probs = logits.unflatten(-1, (-1, classes)).log_softmax(-1)
    return -(log_probs * z.unflatten(-1, (-1, classes))).sum(-1)


def uniform_mixture(logits: Tensor, classes: int, share: float) -> Tensor:
    """Probabilities `(..., D)` of logits `(..., D)`, mixed with `share` of a uniform distribution."""
    probs = logits.unflatten(-1, (-1, classes)).softmax(-1)
    return ((1 - share) * probs + share / classes).flatten(-2)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of frames `(...)`, in nats, from log-probabilities p and q `(..., N, D)` of their variables."""
    return (p.exp() * (p - q)).sum((-2, -1))
