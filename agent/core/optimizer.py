"""AdamW with adaptive gradient clipping, which skips steps that are not finite."""

# pyright: reportPrivateImportUsage=false
# torch._foreach_*: the fused operations that torch's own optimizers and clip_grad_norm_ are made of

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longdream.worldmodel import ranks


class Optimizer:
    """AdamW whose gradients are clipped by the size of the weights (adaptive gradient clipping, Brock et al. 2021,
    arXiv 2102.06171, as in DreamerV3). A step whose loss or gradient is not finite is skipped.

    Args:
        rate: the learning rate.
        agc: bound on the norm of each weight's gradient, as a share of the weight's own norm.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, agc: float):
        self.parameters = [p for p in parameters if p.requires_grad]
        # The fused optimizer is one kernel. It reads from tensors whether to step and at what rate, so that the host
        # does not wait for the device.
        self.fused = all(p.is_cuda for p in self.parameters)
        self.rate = rate
        self.agc = agc
        self.adamw = torch.optim.AdamW(
            self.parameters,
            self._as_rate(rate),
            betas=(0.9, 0.95),
            weight_decay=1e-3,
            fused=self.fused,
            capturable=self.fused,
        )

    def scale_rate(self, scale: float) -> None:
        """Set the learning rate to `scale` times its initial value."""
        for group in self.adamw.param_groups:
            if self.fused:
                group["lr"].fill_(self.rate * scale)
            else:
                group["lr"] = self.rate * scale

    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """One step down the gradient of a scalar loss: `backward`, then `apply`."""
        finite, norm = self.backward(loss)
        self.apply(finite)
        return finite, norm

    def backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped gradient of a scalar loss, of which each rank has its part: the gradient is that of their mean,
        and all ranks clip and skip alike. The weights are only read.

        Returns:
            whether loss and gradient were finite, and the norm of the gradient before clipping: scalars on the device.
        """
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        weights = [p for p in self.parameters if p.grad is not None]
        grads = [p.grad for p in weights if p.grad is not None]
        loss = average(grads, loss.detach())
        norm = adaptive_clip([p.detach() for p in weights], grads, self.agc)
        return torch.isfinite(norm) & torch.isfinite(loss), norm

    def apply(self, finite: Tensor) -> None:
        """Step the weights by the gradient, or leave them and the moments unchanged where it was not finite."""
        if self.fused:
            setattr(self.adamw, "found_inf", (~finite).float())  # noqa: B010  (what a GradScaler tells it)
            self.adamw.step()
        elif finite:
            self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """The moments and the number of steps, in the same form on every device."""
        return {"state": self.adamw.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as another optimizer did, on whatever device that was.

        Raises:
            ValueError: it had other weights.
        """
        for number, moments in state["state"].items():
            shape = self.parameters[number].shape
            if {key: value.shape for key, value in moments.items()} != {
                "step": (),
                "exp_avg": shape,
                "exp_avg_sq": shape,
            }:
                raise ValueError(f"the optimizer's moments of weight {number} are not of shape {tuple(shape)}")
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state["state"]})
        for weight, moments in self.adamw.state.items():
            for key, value in moments.items():
                if value.shape == weight.shape:  # the fused kernel needs the weight's memory layout (channels last)
                    moments[key] = torch.empty_like(weight, requires_grad=False).copy_(value)

    def _as_rate(self, rate: float) -> Any:
        return torch.tensor(rate, device=self.parameters[0].device) if self.fused else rate


def average(grads: list[Tensor], loss: Tensor) -> Tensor:
    """Replace gradients, in place, by their means over ranks, in one flat bucket with the loss, whose mean is
    returned."""
    if ranks.count() == 1:
        return loss
    flat = ranks.mean(torch.cat([loss.reshape(1), *(grad.reshape(-1) for grad in grads)]))
    loss, *means = flat.split([1, *(grad.numel() for grad in grads)])
    torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads, strict=True)])
    return loss[0]


def adaptive_clip(weights: list[Tensor], grads: list[Tensor], agc: float) -> Tensor:
    """Scale each gradient, in place, to at most `agc` times the norm of its weight; the norm of all of them before."""
    norms = torch._foreach_norm(grads)
    bounds = torch._foreach_clamp_min(torch._foreach_norm(weights), 1e-3)
    torch._foreach_mul_(bounds, agc)
    factors = torch._foreach_div(bounds, torch._foreach_clamp_min(norms, 1e-8))
    torch._foreach_mul_(grads, torch._foreach_clamp_max(factors, 1.0))
    return torch.stack(norms).norm()
