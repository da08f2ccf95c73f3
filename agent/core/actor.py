"""V, M and C as they act in an environment: what they have seen is carried from row to row as a value."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from longdream.agent.config.schema import Config
from longdream.agent.core.device import autocast
from longdream.controller.actor_critic import ActorCritic
from longdream.controller.evolution import Evolution
from longdream.controller.planner import Planner
from longdream.controller.tree import Tree
from longdream.controller.types import Controller, Improving, Planning
from longdream.envs.contract import EnvSpec, Row, UserError
from longdream.worldmodel import ranks
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.model import Surprise, WorldModel
from longdream.worldmodel.types import class_by_name


class NotFinite(RuntimeError):
    """A loss, a gradient or an action was not finite."""


class Carry(NamedTuple):
    """What acting carries from row to row for n streams: the last feature `(n, F)`, M's state, the last action `(n,
    A)`."""

    feat: Tensor
    state: State
    action: Tensor


class Actor:
    """V, M and C without what learning needs. An `Agent` is one; a `copy` of an agent acts while the agent learns.

    model, controller: on `device`.
    """

    config: Config
    spec: EnvSpec
    device: torch.device
    model: WorldModel
    controller: Controller
    own: list[Tensor]
    followed: list[Tensor]
    """Of a copy: its weights, and those of the actor that it follows."""

    @staticmethod
    def built(config: Config, spec: EnvSpec, device: torch.device) -> Actor:
        """An actor with new weights."""
        actor = Actor()
        actor.config = config
        actor.spec = spec
        actor.device = device
        actor.model = build_model(config, spec).to(device)
        actor.controller = build_controller(config, spec, actor.model.feature_size).to(device)
        return actor

    def copy(self) -> Actor:
        """An actor with weights of its own, which `follow` sets to those of this one."""
        random = torch.get_rng_state()
        other = Actor.built(self.config, self.spec, self.device)
        torch.set_rng_state(random)  # the first weights are overwritten: as if none had been drawn
        other.followed = self.tensors()
        other.own = other.tensors()
        other.follow()
        return other

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the weights that the actor has now which this is a copy of."""
        torch._foreach_copy_(self.own, self.followed)  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers of V, M and C, in the same order in every actor of one configuration."""
        parts = (self.model, cast(nn.Module, self.controller))
        return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]

    def initial(self, n: int) -> Carry:
        """The carry of n streams that have seen nothing."""
        feat = torch.zeros(n, self.model.feature_size, device=self.device)
        action = torch.zeros(n, self.spec.action.size, device=self.device)
        return Carry(feat, self.model.dynamics.initial(n), action)

    @torch.no_grad()
    def observe(self, carry: Carry, row: Row | Any, measure: bool = True) -> tuple[Carry, Surprise | None]:
        """Take in a row of n streams, of arrays or of tensors: the carry after it and, if `measure`, its surprise."""
        obs = {key: torch.as_tensor(value).to(self.device) for key, value in row.obs.items()}
        first = torch.as_tensor(row.is_first).to(self.device)
        with autocast(self.config.precision, self.device):
            z = self.model.encoder(obs)
            surprise = None
            if measure:
                reward = torch.as_tensor(row.reward).to(self.device)
                terminated = torch.as_tensor(row.terminated).to(self.device)
                surprise = self.model.surprise(carry.feat, carry.state, carry.action, z, reward, terminated, first)
            feat, state = self.model.commit(carry.state, z, carry.action, first)
        return Carry(feat, state, carry.action), surprise

    @torch.no_grad()
    def act(self, carry: Carry, greedy: bool) -> np.ndarray:
        """Encoded actions `(n, A)` float32 at the last observed rows, boxes clipped to [-1, 1].

        Raises:
            NotFinite: the controller gave an action that is not finite.
        """
        action = self.choose(carry, greedy).clamp(-1, 1).float().cpu().numpy()
        if not np.isfinite(action).all():
            raise NotFinite("the controller returned an action that is not finite")
        return action

    @torch.no_grad()
    def choose(self, carry: Carry, greedy: bool) -> Tensor:
        """C's actions in the real environment, `(n, A)` on the device. A controller that plans looks ahead in M."""
        with autocast(self.config.precision, self.device):
            if isinstance(self.controller, Planning):
                return self.controller.plan(self.model, carry.feat, carry.state, greedy)
            return self.controller.act(carry.feat, greedy)

    def acted(self, carry: Carry, action: np.ndarray) -> Carry:
        """The carry once `action` `(n, A)` is the one that was taken."""
        return carry._replace(action=torch.from_numpy(action).to(self.device))


CONTROLLERS: dict[str, type[nn.Module]] = {
    "actor_critic": ActorCritic,
    "planner": Planner,
    "tree": Tree,
    "evolution": Evolution,
}


def controller_class(name: str) -> Any:
    """The class behind `controller.kind`: a known word or a dotted path `package.module:Class`.

    Raises:
        ValueError: neither.
    """
    kind = class_by_name("controller.kind", name, CONTROLLERS)
    if any(base.__module__ == "stable_baselines3.common.base_class" for base in getattr(kind, "__mro__", ())):
        from longdream.controller.sb3 import StableBaselines  # imported here: it takes a second

        return partial(StableBaselines, algorithm=kind)
    return kind


def build_model(config: Config, spec: EnvSpec) -> WorldModel:
    """V and M for an environment, on the CPU.

    Raises:
        UserError: the configuration does not fit together or does not fit the observations and actions.
    """
    try:
        return WorldModel(spec.obs, spec.action.size, config.encoder, config.worldmodel, config.forcing, config.heads)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_controller(config: Config, spec: EnvSpec, features: int) -> Any:
    """C for an environment and features of that length, on the CPU: a `Controller`.

    Raises:
        UserError: the configuration does not fit together or does not fit the actions.
    """
    settings = config.controller
    if settings.kind == "actor_critic" and settings.kwargs:
        raise UserError(f"controller.kwargs.{next(iter(settings.kwargs))}: actor_critic has no settings of its own")
    try:
        controller = controller_class(settings.kind)(settings, features, spec.action.parts, spec.action.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if ranks.count() > 1 and isinstance(controller, Improving):
        raise UserError(
            f"controller.kind = {settings.kind} learns in a way of its own, which ranks cannot share: train it on one"
        )
    return controller
