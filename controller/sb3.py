"""Algorithms of Stable-Baselines3, or of a package built on it such as sb3-contrib, as C.

They learn in dreams through a VecEnv and act in reality by their own `predict`. Those that need masks of actions, or a
memory of their own, are refused: dreams have no masks, and C is given M's memory instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from longdream.controller.config import ControllerConfig
from longdream.worldmodel.dream import Dream, Dreamer, Starts
from longdream.worldmodel.fields import AT_LEAST_1, validated
from longdream.worldmodel.types import Loss

ALGORITHMS = {
    spaces.Discrete: "PPO, A2C, DQN",
    spaces.MultiDiscrete: "PPO, A2C",
    spaces.Box: "PPO, A2C, SAC, TD3, DDPG",
}
"""Algorithms of stable_baselines3 by the action spaces that they support."""


@dataclass(frozen=True)
class Sb3Settings:
    """`controller.kwargs` of an algorithm of Stable-Baselines3, in addition to the algorithm's own arguments.

    gamma and n_steps default to controller.gamma and controller.horizon.
    """

    copies: Annotated[int, AT_LEAST_1] = 64
    """Parallel dreams. An update of C is controller.horizon steps of each."""
    callback: str = ""
    """A callback of SB3, as a dotted path `package.module:Class`."""


class StableBaselines(nn.Module):
    """An SB3 algorithm whose observations are features.

    An update of C is one `learn` over horizon * copies dreamt steps. All dreams start from the update's `starts`, and
    none is longer than the horizon. The algorithm's weights and optimizers are in the run's checkpoint, as tensors;
    `export` writes SB3's own zip as well. The replay buffer of an off-policy algorithm is not saved: a resumed run
    fills a new one.

    Args:
        algorithm: the algorithm's class.

    Raises:
        ValueError: the algorithm does not support these actions or arguments, or needs what dreams do not have.
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
        arguments = dict(config.kwargs)
        own = {name: arguments.pop(name) for name in ("copies", "callback") if name in arguments}
        self.settings = validated(Sb3Settings, own, "controller.kwargs")
        self.config = config
        self.parts = tuple(parts)
        self.env = DreamVec(features, _space(parts, actions), self.settings.copies, config.horizon)
        accepted = inspect.signature(algorithm.__init__).parameters
        defaults = {"gamma": config.gamma, "n_steps": config.horizon, "device": "cpu"}
        defaults = {name: value for name, value in defaults.items() if name in accepted}
        make = cast(Any, algorithm)
        policy = arguments.pop("policy", _policy(algorithm))
        if isinstance(train_freq := arguments.get("train_freq"), list):  # YAML and JSON have no tuples
            arguments["train_freq"] = tuple(train_freq)
        with numpy_seeded_by_torch():
            try:
                self.algorithm: BaseAlgorithm = make(policy, self.env, **(defaults | arguments))
            except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                kind = type(self.env.action_space)
                if "as action spaces" in str(error):  # SB3's words
                    raise ValueError(
                        f"controller.kind = {algorithm.__name__} cannot take {kind.__name__} actions: "
                        f"{ALGORITHMS[kind]} can ({_line(error)})"
                    ) from None
                raise ValueError(
                    f"controller.kind = {algorithm.__name__} with controller.kwargs = {arguments}: {_line(error)}"
                ) from None
            _check_usable(self.algorithm, features)
        self.callback = _callback(self.settings.callback)

    def act(self, feat: Tensor, greedy: bool) -> Tensor:
        with numpy_seeded_by_torch():
            chosen, _ = self.algorithm.predict(feat.cpu().numpy(), deterministic=greedy)
        return encode(chosen, self.parts).to(feat.device)

    def loss(self, dream: Dream) -> Loss:
        raise NotImplementedError("an SB3 algorithm learns by improve, not by gradient")

    def after_update(self) -> None:
        """Nothing to do."""

    def improve(self, model: Dreamer, starts: Starts) -> dict[str, Tensor]:
        """One `learn` of the algorithm in dreams from `starts`."""
        self.env.open(model, starts)
        self.algorithm._last_obs = None  # unfinished dreams started from other states
        steps = self.config.horizon * self.settings.copies
        with numpy_seeded_by_torch():
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
    """Dreams from given starts as a VecEnv of SB3, whose observations are features.

    A dream that has ended is replaced by a new one in the same step, with `terminal_observation` and
    `TimeLimit.truncated` in its info.
    """

    render_mode = None  # SB3 asks for it

    def __init__(self, features: int, action_space: spaces.Space, copies: int, horizon: int):
        super().__init__(copies, spaces.Box(-np.inf, np.inf, (features,), np.float32), action_space)
        self.horizon = horizon
        self.model: Dreamer | None = None
        self.mean_return = 0.0

    def open(self, model: Dreamer, starts: Starts) -> None:
        """Start later dreams from these states."""
        self.model = model
        self.starts = starts
        self.device = starts.feat.device
        self.returns: list[float] = []

    @torch.no_grad()
    def reset(self) -> np.ndarray:
        self.feat_and_state = self._draw_starts(self.num_envs)
        self.age = np.zeros(self.num_envs, int)
        self.total = np.zeros(self.num_envs)
        return self.feat_and_state[0].cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    @torch.no_grad()
    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        assert self.model is not None
        feat, state = self.feat_and_state
        parts = tuple(getattr(self.action_space, "nvec", [getattr(self.action_space, "n", 0)]))
        action = encode(self.actions, parts if parts[0] else ()).to(self.device).clamp(-1, 1)
        reward, cont = self.model.reward_continue.expect(feat, action)
        _, feat, state = self.model.dream_step(feat, state, action)
        ended = (torch.rand_like(cont) >= cont).cpu().numpy()
        self.age += 1
        truncated = (self.age >= self.horizon) & ~ended
        rewards = reward.cpu().numpy()
        self.total += rewards
        observations = feat.cpu().numpy().copy()
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self.feat_and_state = (feat, state)
        if (over := np.flatnonzero(ended | truncated)).size:
            for i in over:
                infos[i] = {"terminal_observation": observations[i].copy(), "TimeLimit.truncated": bool(truncated[i])}
            self.returns += self.total[over].tolist()
            self.mean_return = float(np.mean(self.returns))
            drawn = self._draw_starts(len(over))
            rows = torch.from_numpy(over).to(self.device)
            for old, new in zip(pytree.tree_leaves(self.feat_and_state), pytree.tree_leaves(drawn), strict=True):
                old[rows] = new
            observations[over] = drawn[0].cpu().numpy()
            self.age[over] = 0
            self.total[over] = 0.0
        return observations, rewards, ended | truncated, infos

    def _draw_starts(self, count: int) -> tuple[Tensor, Any]:
        """Features and states of `count` starts whose episode had not ended."""
        index = torch.multinomial(self.starts.weight.clamp(min=1e-9), count, replacement=True)
        return pytree.tree_map(lambda t: t[index], (self.starts.feat, self.starts.state))

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"{attr_name}: dreams have no attributes to set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise AttributeError(f"{method_name}: dreams have no methods to call")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def encode(chosen: np.ndarray, parts: Sequence[int]) -> Tensor:
    """SB3's actions `(n,)`, `(n, factors)` or, for a box, `(n, A)` to encoded actions `(n, A)`."""
    values = torch.as_tensor(np.asarray(chosen))
    if not parts:
        return values.float()
    columns = values.reshape(len(values), len(parts)).long().unbind(1)
    return torch.cat([nn.functional.one_hot(c, n).float() for c, n in zip(columns, parts, strict=True)], 1)


@contextmanager
def numpy_seeded_by_torch() -> Iterator[None]:
    """A context in which numpy's global generator, which SB3 draws from, is seeded by torch's.

    Checkpoints then need torch's generator alone. Outside, numpy's continues as if nothing had been drawn.
    """
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


def _policy(algorithm: type[BaseAlgorithm]) -> str:
    """The name of the algorithm's policy for vectors."""
    known = getattr(algorithm, "policy_aliases", {})
    return next((name for name in known if name.startswith("Mlp") and "MlpPolicy" not in known), "MlpPolicy")


def _check_usable(algorithm: BaseAlgorithm, features: int) -> None:
    """Raise ValueError for an algorithm that needs masks of actions, a state between its steps, or single episodes."""
    name = type(algorithm).__name__
    instead = ALGORITHMS[type(algorithm.action_space)]
    if "use_masking" in inspect.signature(algorithm.learn).parameters:
        raise ValueError(
            f"controller.kind = {name} needs masks of valid actions, which M does not predict: use one of "
            f"stable_baselines3, {instead}"
        )
    train_freq = getattr(algorithm, "train_freq", None)
    if isinstance(train_freq, TrainFreq) and train_freq.unit is TrainFrequencyUnit.EPISODE and algorithm.n_envs > 1:
        raise ValueError(
            f"controller.kwargs.train_freq = {train_freq.frequency} episodes: {name} counts the episodes of a single "
            f"dream; give a number of steps, or controller.kwargs.copies 1"
        )
    _, state = algorithm.predict(np.zeros((1, features), np.float32), deterministic=True)
    if state is not None:
        raise ValueError(
            f"controller.kind = {name} keeps a state between its steps, and C is given M's memory instead: use one of "
            f"stable_baselines3, {instead}"
        )


def _callback(name: str) -> Any:
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"controller.kwargs.callback = {name}: {_line(error)}; give package.module:Class") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
