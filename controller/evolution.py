"""A linear policy found by evolution in dreams, after World Models (Ha and Schmidhuber 2018, arXiv 1803.10122, section
2.3), by CMA-ES (Hansen and Ostermeier 2001; the `cma` package)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from longdream.controller.distributions import Categoricals, likeliest_factors
from longdream.controller.types import ControllerConfig
from longdream.worldmodel.dream import Dream, Dreamer, Starts, imagine
from longdream.worldmodel.types import Loss

LARGE = 1_000
"""Weights from which on the search keeps a variance for each instead of all covariances: a matrix of them is too
slow."""
NOISE = 0.3
"""Deviation of boxes where the policy is not greedy."""
SEARCH = ("mean", "mean_old", "sigma", "pc", "countiter", "countevals")
ABOUT_SIGMA = ("ps", "_ps_updated_iteration")
ABOUT_SHAPE = ("C", "B", "D", "last_update", "count_tell", "count_eigen")


class Evolution(nn.Module):
    """act = W feat + b. A generation is a population of W and b, all of which dream at once from the same moments, and
    are ranked by their mean discounted return. The policy is the mean of the search's distribution.

    Nothing here has a gradient. A checkpoint holds the search whole.
    """

    def __init__(self, config: ControllerConfig, features: int, parts: Sequence[int], actions: int):
        super().__init__()
        self.config, self.parts, self.features = config, tuple(parts), features
        self.outputs = sum(parts) if parts else actions
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros((features + 1) * self.outputs))
        self.search = self._new_search()

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        out = self._outputs(self.mean[None], feat[None])[0]
        if greedy:
            return self._decide(out)
        if self.parts:
            return Categoricals(out, self.parts, self.config.unimix).sample()
        return out.tanh() + NOISE * torch.randn_like(out)

    def loss(self, dream: Dream) -> Loss:
        raise NotImplementedError("evolution learns by improve, not by a gradient")

    def after_update(self) -> None:
        """Nothing follows here."""

    @torch.no_grad()
    def improve(self, model: Dreamer, starts: Starts) -> dict[str, Tensor]:
        """A generation, judged from `moments` of the starts that had not ended."""
        told = self.config.evolution
        index = torch.multinomial(starts.weight.clamp(min=1e-9), told.moments, replacement=True)
        feat, state = pytree.tree_map(
            lambda t: t[index].repeat(told.population, *[1] * (t.ndim - 1)), (starts.feat, starts.state)
        )
        asked = self.search.ask()
        weights = torch.as_tensor(np.stack(asked), dtype=torch.float32, device=feat.device)

        def policy(feat: Tensor) -> Tensor:
            out = self._outputs(weights, feat.unflatten(0, (told.population, told.moments)))
            return self._decide(out.flatten(0, 1))

        dream = imagine(model, Starts(feat, state, torch.ones_like(feat[:, 0])), policy, told.horizon)
        discount = self.config.gamma * dream.cont
        reached = torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-1]], 1).cumprod(1)
        worth = (reached * dream.reward).sum(1).view(told.population, told.moments).mean(1)
        if bool(worth.isfinite().all()):  # a dream that is not finite costs its own generation and no later one
            self.search.tell(asked, (-worth).double().cpu().tolist())
            self.mean.copy_(torch.as_tensor(self.search.mean))
        return {"return": worth.mean(), "best": worth.amax(), "deviation": torch.tensor(float(self.search.sigma))}

    def _outputs(self, weights: Tensor, feat: Tensor) -> Tensor:
        """Of P policies `(P, (F + 1) * outputs)` at feat `(P, M, F)`: `(P, M, outputs)`."""
        matrix = weights.unflatten(1, (self.features + 1, self.outputs))
        return torch.baddbmm(matrix[:, -1:], feat, matrix[:, :-1])

    def _decide(self, out: Tensor) -> Tensor:
        return likeliest_factors(out.split(list(self.parts), -1)) if self.parts else out.tanh()

    # -- the search ---------------------------------------------------------------------------------------------------

    def _new_search(self) -> Any:
        import cma  # here: it takes a second, which every command would wait for

        def normal(*shape: int) -> np.ndarray:  # torch's stream, so that a checkpoint of that is enough
            return torch.randn(*(int(n) for n in shape), dtype=torch.float64).numpy()

        told, size = self.config.evolution, len(self.mean)
        options = {"popsize": told.population, "CMA_diagonal": size >= LARGE, "randn": normal, "seed": np.nan}
        return cma.CMAEvolutionStrategy(np.zeros(size), told.deviation, options | {"verbose": -9})

    def _kept(self) -> list[tuple[str, Any, str]]:
        """Name, owner and attribute of all that the next generations depend on."""
        search = self.search
        kept = [(name, search, name) for name in SEARCH]
        kept += [(f"sigma.{name}", search.adapt_sigma, name) for name in ABOUT_SIGMA]
        if len(self.mean) >= LARGE:
            return [*kept, ("scaling", search.sigma_vec, "scaling")]
        return kept + [(f"shape.{name}", search.sm, name) for name in ABOUT_SHAPE]

    def get_extra_state(self) -> dict[str, Any]:
        if self.search.countiter == 0:
            return {}
        return {name: np.array(getattr(owner, key)) for name, owner, key in self._kept()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.search = self._new_search()
        if not state:
            return
        first = self.search.ask()  # some of what is kept is only made in the first generation
        self.search.tell(first, list(range(len(first))))
        for name, owner, key in self._kept():
            value = np.asarray(state[name])
            setattr(owner, key, value.copy() if value.ndim else value.item())
