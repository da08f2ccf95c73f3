"""Any algorithm of Stable-Baselines3 (or of a package built on it, like sb3-contrib) as C: it learns in dreams through
a VecEnv, and acts in reality by its own `predict`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from longdream.controller.types import ControllerConfig
from longdream.worldmodel.dream import Dream, Dreamer, Starts
from longdream.worldmodel.types import Loss

TAKES = {
    spaces.Discrete: "PPO, A2C, DQN",
    spaces.MultiDiscrete: "PPO, A2C",
    spaces.Box: "PPO, A2C, SAC, TD3, DDPG",
}
"""Algorithms of stable_baselines3 by the actions that they can take."""


class StableBaselines(nn.Module):
    """An SB3 algorithm that sees features as observations. An update of C is one `learn` over horizon * copies dreamt
    steps, all of whose dreams begin at the update's moments; none outlasts the horizon.

    Its weights and optimisers are in the run's checkpoint, as tensors; `export` writes SB3's own zip beside. What an
    off-policy algorithm keeps in its replay buffer is not saved: resumed, it begins to fill it anew.

    Args:
        algorithm: the class.

    Raises:
        ValueError: it cannot take these actions, or these arguments.
    """

    def __init__(
        self,
        config: ControllerConfig,
        features: int,
        parts: Sequence[int],
        actions: int,
        algorithm: type[BaseAlgorithm],
    ):
        super().__init__()
        told = config.sb3
        self.config, self.parts = config, tuple(parts)
        self.env = DreamVec(features, _space(parts, actions), told.copies, config.horizon)
        known = inspect.signature(algorithm.__init__).parameters
        given = {"gamma": config.gamma, "n_steps": config.horizon, "device": "cpu"}
        given = {key: value for key, value in given.items() if key in known} | told.kwargs
        make = cast(Any, algorithm)
        with own_numpy():
            try:
                self.algorithm: BaseAlgorithm = make("MlpPolicy", self.env, **given)
            except AssertionError as error:
                kind = type(self.env.action_space)
                raise ValueError(
                    f"controller.kind = {algorithm.__name__} cannot take {kind.__name__} actions: "
                    f"{TAKES[kind]} can ({_line(error)})"
                ) from None
            except (TypeError, ValueError) as error:
                raise ValueError(f"controller.sb3.kwargs = {told.kwargs}: {_line(error)}") from None
        self.callback = _callback(told.callback)

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        with own_numpy():
            chosen, _ = self.algorithm.predict(feat.cpu().numpy(), deterministic=greedy)
        return encode(chosen, self.parts).to(feat.device)

    def loss(self, dream: Dream) -> Loss:
        raise NotImplementedError("an SB3 algorithm learns by improve")

    def after_update(self) -> None:
        """Nothing follows here."""

    def improve(self, model: Dreamer, starts: Starts) -> dict[str, Tensor]:
        """One `learn` of the algorithm in dreams from these moments."""
        self.env.open(model, starts)
        self.algorithm._last_obs = None  # the dreams under way were of other moments
        steps = self.config.horizon * self.config.sb3.copies
        with own_numpy():
            self.algorithm.learn(steps, callback=self.callback, reset_num_timesteps=False)
        return {"return": torch.tensor(self.env.mean_return), "steps": torch.tensor(self.algorithm.num_timesteps)}

    def export(self, folder: Path) -> None:
        """Write SB3's own zip, for `ALGORITHM.load(folder / "controller.zip")`."""
        self.algorithm.save(folder / "controller.zip")

    def get_extra_state(self) -> dict[str, Any]:
        return {"parameters": self.algorithm.get_parameters(), "timesteps": self.algorithm.num_timesteps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.algorithm.set_parameters(state["parameters"], device="cpu")
        self.algorithm.num_timesteps = int(state["timesteps"])


class DreamVec(VecEnv):
    """Dreams from given moments as a VecEnv of SB3: observations are features; a dream that is over begins anew in the
    same step, with `terminal_observation` and `TimeLimit.truncated` in its info."""

    def __init__(self, features: int, action_space: spaces.Space, copies: int, horizon: int):
        super().__init__(copies, spaces.Box(-np.inf, np.inf, (features,), np.float32), action_space)
        self.horizon = horizon
        self.model: Dreamer | None = None
        self.mean_return = 0.0

    def open(self, model: Dreamer, starts: Starts) -> None:
        """Dream from these moments from now on."""
        self.model, self.starts = model, starts
        self.device, self.returns = starts.feat.device, []

    @torch.no_grad()
    def reset(self) -> np.ndarray:
        self.now = self._fresh(self.num_envs)
        self.age, self.total = np.zeros(self.num_envs, int), np.zeros(self.num_envs)
        return self.now[0].cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    @torch.no_grad()
    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        assert self.model is not None
        feat, state = self.now
        parts = tuple(getattr(self.action_space, "nvec", [getattr(self.action_space, "n", 0)]))
        action = encode(self.actions, parts if parts[0] else ()).to(self.device).clamp(-1, 1)
        reward, cont = self.model.consequence.expect(feat, action)
        _, feat, state = self.model.dream_step(feat, state, action)
        ended = (torch.rand_like(cont) >= cont).cpu().numpy()
        self.age += 1
        rewards, late = reward.cpu().numpy(), (self.age >= self.horizon) & ~ended
        self.total += rewards
        seen, infos = feat.cpu().numpy().copy(), [{} for _ in range(self.num_envs)]
        self.now = feat, state
        if (over := np.flatnonzero(ended | late)).size:
            for i in over:
                infos[i] = {"terminal_observation": seen[i].copy(), "TimeLimit.truncated": bool(late[i])}
            self.returns += self.total[over].tolist()
            self.mean_return = float(np.mean(self.returns))
            fresh, rows = self._fresh(len(over)), torch.from_numpy(over).to(self.device)
            for held, new in zip(pytree.tree_leaves(self.now), pytree.tree_leaves(fresh), strict=True):
                held[rows] = new
            seen[over] = fresh[0].cpu().numpy()
            self.age[over], self.total[over] = 0, 0.0
        return seen, rewards, ended | late, infos

    def _fresh(self, count: int) -> tuple[Tensor, Any]:
        index = torch.multinomial(self.starts.weight.clamp(min=1e-9), count, replacement=True)
        return pytree.tree_map(lambda t: t[index], (self.starts.feat, self.starts.state))

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError(f"{attr_name}: dreams have no attributes to set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError(f"{method_name}: dreams have no methods to call")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def encode(chosen: np.ndarray, parts: Sequence[int]) -> Tensor:
    """SB3's actions `(n,)`, `(n, factors)` or, for boxes, `(n, A)` as `(n, A)`."""
    values = torch.as_tensor(np.asarray(chosen))
    if not parts:
        return values.float()
    columns = values.reshape(len(values), len(parts)).long().unbind(1)
    return torch.cat([nn.functional.one_hot(c, n).float() for c, n in zip(columns, parts, strict=True)], 1)


@contextmanager
def own_numpy() -> Iterator[None]:
    """Inside, numpy's global stream, which SB3 draws from, is seeded from torch's, so that a checkpoint of that is
    enough; outside, it goes on as if nothing had been drawn."""
    before = np.random.get_state()
    np.random.seed(int(torch.randint(2**31, ())))
    try:
        yield
    finally:
        np.random.set_state(before)


def _space(parts: Sequence[int], actions: int) -> spaces.Space:
    if not parts:
        return spaces.Box(-1, 1, (actions,), np.float32)
    return spaces.Discrete(parts[0]) if len(parts) == 1 else spaces.MultiDiscrete(list(parts))


def _callback(name: str) -> Any:
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"controller.sb3.callback = {name}: {_line(error)}; give package.module:Class") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
