"""A linear policy found by CMA-ES in dreams (Hansen and Ostermeier 2001; the `cma` package), after World Models (Ha and
Schmidhuber 2018, arXiv 1803.10122, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from longdream.controller.config import ControllerConfig
from longdream.controller.distributions import Categoricals, likeliest_factors
from longdream.worldmodel.dream import Dream, Dreamer, Starts, imagine
from longdream.worldmodel.fields import AT_LEAST_1, POSITIVE, validated
from longdream.worldmodel.types import Loss

MANY_WEIGHTS = 1_000
"""From so many weights on, the search adapts a diagonal covariance: a full matrix would be too slow."""
NOISE = 0.3
"""Standard deviation of box actions where the policy is not greedy."""
SEARCH_FIELDS = ("mean", "mean_old", "sigma", "pc", "countiter", "countevals")
SIGMA_FIELDS = ("ps", "_ps_updated_iteration")
COVARIANCE_FIELDS = ("C", "B", "D", "last_update", "count_tell", "count_eigen")


@dataclass(frozen=True)
class EvolutionSettings:
    """`controller.kwargs` of `evolution`."""

    population: Annotated[int, Ge(4)] = 64
    """Candidates per generation; an update is a generation."""
    moments: Annotated[int, AT_LEAST_1] = 16
    """Dreams per candidate; all candidates start from the same states."""
    horizon: Annotated[int, AT_LEAST_1] = 24
    """Steps per dream. It has to reach from the start of an episode to a reward, since no value estimates what lies
    beyond."""
    deviation: Annotated[float, POSITIVE] = 0.1
    """Standard deviation of the first generation's weights."""


class Evolution(nn.Module):
    """A linear policy, act = W feat + b.

    A generation is a population of candidates (W, b). All dream at once from the same states and are ranked by their
    mean discounted return. The policy acts with the mean of the search distribution. Nothing here has a gradient. A
    checkpoint holds the whole state of the search.

    Raises:
        ValueError: settings that do not exist or are out of range.
    """

    def __init__(self, config: ControllerConfig, features: int, parts: Sequence[int], actions: int):
        super().__init__()
        self.config = config
        self.parts = tuple(parts)
        self.features = features
        self.settings = validated(EvolutionSettings, config.kwargs, "controller.kwargs")
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
        raise NotImplementedError("evolution learns by improve, not by gradient")

    def after_update(self) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def improve(self, model: Dreamer, starts: Starts) -> dict[str, Tensor]:
        """One generation, evaluated from `moments` of the starts whose episode had not ended."""
        settings = self.settings
        index = torch.multinomial(starts.weight.clamp(min=1e-9), settings.moments, replacement=True)
        feat, state = pytree.tree_map(
            lambda t: t[index].repeat(settings.population, *[1] * (t.ndim - 1)), (starts.feat, starts.state)
        )
        candidates = self.search.ask()
        weights = torch.as_tensor(np.stack(candidates), dtype=torch.float32, device=feat.device)

        def policy(feat: Tensor) -> Tensor:
            out = self._outputs(weights, feat.unflatten(0, (settings.population, settings.moments)))
            return self._decide(out.flatten(0, 1))

        dream = imagine(model, Starts(feat, state, torch.ones_like(feat[:, 0])), policy, settings.horizon)
        discount = self.config.gamma * dream.cont
        weight = torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-1]], 1).cumprod(1)
        returns = (weight * dream.reward).sum(1).view(settings.population, settings.moments).mean(1)
        if bool(returns.isfinite().all()):  # otherwise the generation is dropped, and later ones are unharmed
            self.search.tell(candidates, (-returns).double().cpu().tolist())
            self.mean.copy_(torch.as_tensor(self.search.mean))
        return {"return": returns.mean(), "best": returns.amax(), "deviation": torch.tensor(float(self.search.sigma))}

    def _outputs(self, weights: Tensor, feat: Tensor) -> Tensor:
        """Outputs `(P, M, outputs)` of P policies with weights `(P, (F + 1) * outputs)` at feat `(P, M, F)`."""
        matrix = weights.unflatten(1, (self.features + 1, self.outputs))
        return torch.baddbmm(matrix[:, -1:], feat, matrix[:, :-1])

    def _decide(self, out: Tensor) -> Tensor:
        return likeliest_factors(out.split(list(self.parts), -1)) if self.parts else out.tanh()

    # -- the search ---------------------------------------------------------------------------------------------------

    def _new_search(self) -> Any:
        import cma  # here, since the import takes a second that every command would have to wait

        def normal(*shape: int) -> np.ndarray:  # by torch's generator, whose state checkpoints already hold
            return torch.randn(*(int(n) for n in shape), dtype=torch.float64).numpy()

        size = len(self.mean)
        options = {
            "popsize": self.settings.population,
            "CMA_diagonal": size >= MANY_WEIGHTS,
            "randn": normal,
            "seed": np.nan,
            "verbose": -9,
        }
        return cma.CMAEvolutionStrategy(np.zeros(size), self.settings.deviation, options)

    def _search_state(self) -> list[tuple[str, Any, str]]:
        """Name, owner and attribute of everything that the next generations depend on."""
        search = self.search
        fields = [(name, search, name) for name in SEARCH_FIELDS]
        fields += [(f"sigma.{name}", search.adapt_sigma, name) for name in SIGMA_FIELDS]
        if len(self.mean) >= MANY_WEIGHTS:
            return [*fields, ("scaling", search.sigma_vec, "scaling")]
        return fields + [(f"shape.{name}", search.sm, name) for name in COVARIANCE_FIELDS]

    def get_extra_state(self) -> dict[str, Any]:
        if self.search.countiter == 0:
            return {}
        return {name: np.array(getattr(owner, key)) for name, owner, key in self._search_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.search = self._new_search()
        if not state:
            return
        # one generation of any kind, since some of the attributes only exist after it
        candidates = self.search.ask()
        self.search.tell(candidates, list(range(len(candidates))))
        for name, owner, key in self._search_state():
            value = np.asarray(state[name])
            setattr(owner, key, value.copy() if value.ndim else value.item())
