"""Means over ranks: processes that learn together, each from rows of its own (data parallel).

The ranks are those of torch.distributed's default process group. Without one there is a single rank, and nothing is
sent: every function returns what a program that knows of no ranks would compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class RankLost(RuntimeError):
    """Another rank has ended, or does not answer."""


def count() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean(value: Tensor) -> Tensor:
    """The mean over ranks of a tensor, without gradient; the same bits on all ranks.

    Raises:
        RankLost: another rank has ended, or does not answer.
    """
    return value if count() == 1 else _mean(value)


def gathered(value: Tensor) -> Tensor:
    """The tensors `(...)` of all ranks as one, `(ranks, ...)`, without gradient. Raises as `mean`."""
    return value.detach()[None] if count() == 1 else _gathered(value)


def total_weight(weights: Tensor, least: float = 1.0) -> Tensor:
    """What a rank divides its sum of weighted losses by, so that the mean over ranks of the quotients is the weighted
    mean over the rows of all ranks: the mean over ranks of the sum of weights.

    Args:
        least: lower bound of the weights' sum over all ranks, where there may be none.

    Raises:
        RankLost: as `mean`.
    """
    total = weights.sum()
    ranks = count()
    if ranks > 1 and not total.is_floating_point():
        total = total.float()
    return mean(total).clamp(min=least / ranks)


def eager(function: F) -> F:
    """The function beside the compiler: what it would trace depends on the process group."""
    return cast(Any, torch.compiler.disable)(function)


@eager
def _mean(value: Tensor) -> Tensor:
    total = value.detach().clone()
    call(dist.all_reduce, total)
    return total.div_(count())


@eager
def _gathered(value: Tensor) -> Tensor:
    out = value.new_empty(count(), *value.shape)
    call(dist.all_gather, list(out.unbind()), value.detach().contiguous())
    return out


def call(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch.distributed.

    Raises:
        RankLost: in place of its error, which is one of a connection or of time.
    """
    try:
        return collective(*args, **kwargs)
    except RuntimeError as error:
        raise RankLost(str(error)) from error
