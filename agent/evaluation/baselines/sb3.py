"""Model-free algorithms of Stable-Baselines3 in the real environment: baselines for learning in dreams."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from longdream.agent.config.schema import EnvConfig
from longdream.agent.dream_env.sb3 import space_from_0
from longdream.agent.dream_env.spaces import action_space, observation_space
from longdream.agent.evaluation.policy import WatchedWorld, make_world, play
from longdream.agent.evaluation.tables import summary_table
from longdream.agent.run.files import to_json
from longdream.agent.run.folder import claim, make, unused, write
from longdream.agent.run.logger import Logger
from longdream.agent.run.metrics import Averages
from longdream.agent.run.signals import Signals
from longdream.controller.sb3 import encode
from longdream.envs.contract import EnvSpec, ObsSpec, Row, UserError

SAVE_SECONDS = 60.0
ROLLOUT = 2048
"""Maximum number of real steps, over all copies, between updates of an on-policy algorithm."""
SHOW = ("train/return", "evaluate/return_mean")


def train(
    env: str,
    algo: str,
    steps: int,
    seed: int,
    name: str | None,
    copies: int,
    env_kwargs: dict[str, Any] | None,
    kwargs: dict[str, Any] | None,
    evaluate_every: int,
    episodes: int,
    final_episodes: int,
) -> dict[str, Any]:
    """Train in the real environment; the summary. Arguments and errors: `longdream.agent.cli.baseline`."""
    for key, value in (
        ("steps", steps),
        ("copies", copies),
        ("episodes", episodes),
        ("final_episodes", final_episodes),
    ):
        if value < 1:
            raise UserError(f"--{key} {value} must be at least 1")
    kind = find(algo)
    config = EnvConfig(id=env, kwargs=env_kwargs or {}, copies=copies)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        vec = stack.enter_context(RealVec(config, seed, signals))
        learner = _make(kind, vec, seed, kwargs or {})
        folder = claim(lambda: unused(name, kind.__name__, seed), make, fixed=name is not None)
        settings = {
            "env": env,
            "algo": algo,
            "steps": steps,
            "seed": seed,
            "copies": copies,
            "env_kwargs": env_kwargs or {},
            "kwargs": kwargs or {},
        }
        write(folder / "baseline.json", to_json(settings, indent=1) + "\n")
        logger = stack.enter_context(Logger(folder, True, steps, SHOW))
        logger.note(f"training {kind.__name__} in {folder}, in {env} itself")
        record = Record(folder, logger, signals, config, seed, evaluate_every, episodes)
        try:
            learner.learn(steps, callback=record)
        finally:
            learner.save(folder / "controller.zip")
        logger.note(f"evaluating over {final_episodes} episodes")
        player = Player(learner, vec.spec)
        returns = play(cast(Any, player), config, final_episodes, seed, "agent", signals=signals)
        random = play(cast(Any, player), config, final_episodes, seed, "random", signals=signals)
        summary = returns.to_json() | {"random_mean": random.return_mean, "env": env, "seed": seed}
        wall = round(time.monotonic() - record.began, 1)
        summary |= {"env_steps": int(learner.num_timesteps), "algo": algo, "wall_s": wall}
        write(folder / "summary.json", to_json(summary, indent=1) + "\n")
    summary_table(summary | {"policy": f"{kind.__name__}, greedy"})
    return summary


def find(name: str) -> type[BaseAlgorithm]:
    """The algorithm `package:Class`.

    Raises:
        UserError: there is no such algorithm, or it needs masks of actions.
    """
    module, _, attribute = name.partition(":")
    try:
        algorithm = getattr(import_module(module), attribute or "?")
    except ModuleNotFoundError as error:
        raise UserError(f"--algo {name}: {error}; pip install {module.replace('_', '-')} may fix it") from None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--algo {name}: {error}; give package:Class, as stable_baselines3:PPO") from None
    if not (isinstance(algorithm, type) and issubclass(algorithm, BaseAlgorithm)):
        raise UserError(f"--algo {name} is no algorithm of Stable-Baselines3")
    if "use_masking" in inspect.signature(algorithm.learn).parameters:
        raise UserError(f"--algo {name} needs masks of valid actions, which are not passed on here: use one without")
    return algorithm


def _make(kind: type[BaseAlgorithm], vec: RealVec, seed: int, kwargs: dict[str, Any]) -> BaseAlgorithm:
    several = isinstance(vec.observation_space, spaces.Dict)
    # images are flattened: SB3's convolutions need at least 36 x 36 pixels, which not every environment has
    policy = ("MultiInput" if several else "Mlp") + ("LstmPolicy" if "Recurrent" in kind.__name__ else "Policy")
    defaults = {"policy": policy, "env": vec, "seed": seed, "device": "cpu"}
    rollout = inspect.signature(kind.__init__).parameters.get("n_steps")
    if rollout is not None and rollout.default * vec.num_envs > ROLLOUT:  # SB3's defaults are for one environment
        defaults["n_steps"] = max(2, ROLLOUT // vec.num_envs)
    try:
        make = cast(Any, kind)
        return make(**defaults | kwargs)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{kind.__name__} cannot be made for {vec.id}: {' '.join(str(error).split())[:200]}") from None


class RealVec(VecEnv):
    """Copies of a real environment with SB3's autoreset: an episode that ends is reset in the same step. Each copy is a
    separate World, since the copies of one World are reset one step later."""

    render_mode = None  # SB3 asks for it

    def __init__(self, config: EnvConfig, seed: int, signals: Signals):
        self.id = config.id
        self.worlds: list[WatchedWorld] = []
        try:
            for i in range(config.copies):
                single = EnvConfig(id=config.id, kwargs=config.kwargs, timeout_s=config.timeout_s)
                seeds = np.random.SeedSequence((seed, i)).generate_state(1)
                self.worlds.append(make_world(WatchedWorld, single, 1, int(seeds[0]), signals))
                self.worlds[-1].signals = signals
                self.worlds[-1].label = ""  # the logger shows the progress of all copies
        except BaseException:
            self.close()
            raise
        self.spec: EnvSpec = self.worlds[0].spec
        by_key = {key: _space(spec) for key, spec in self.spec.obs.items()}
        space = by_key["obs"] if by_key.keys() == {"obs"} else spaces.Dict(cast(Any, by_key))
        super().__init__(config.copies, space, action_space(self.spec.action))

    def __enter__(self) -> RealVec:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> Any:
        return self._native([world.reset() for world in self.worlds])

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = self.spec.action.encode(actions)

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        rows = []
        infos = []
        for world, action in zip(self.worlds, self.actions, strict=True):
            row = world.step(action[None])
            info: dict[str, Any] = {}
            rows.append(row)
            if row.terminated[0] or row.truncated[0]:
                last = self._native([row])
                info["terminal_observation"] = {k: v[0] for k, v in last.items()} if isinstance(last, dict) else last[0]
                info["TimeLimit.truncated"] = bool(row.truncated[0] and not row.terminated[0])
            infos.append(info)
        reward = np.array([row.reward[0] for row in rows], np.float32)
        over = np.array([row.terminated[0] or row.truncated[0] for row in rows])
        for i in np.flatnonzero(over):
            rows[i] = self.worlds[i].step(self.actions[i][None])  # the first row of the next episode
        return self._native(rows), reward, over, infos

    def _native(self, rows: Sequence[Row]) -> Any:
        return seen(self.spec, {key: np.concatenate([row.obs[key] for row in rows]) for key in self.spec.obs})

    def close(self) -> None:
        for world in self.worlds:
            world.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"{attr_name}: real environments have no attributes to set from here")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise AttributeError(f"{method_name}: real environments have no methods to call from here")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def seen(spec: EnvSpec, obs: dict[str, np.ndarray]) -> Any:
    """Convert observations as stored, `(n, *shape)` by key, to members of `RealVec`'s observation space."""

    def native_of(known: ObsSpec, value: np.ndarray) -> np.ndarray:
        if known.kind == "categories":  # SB3 takes them in one row, from 0
            return value.reshape(len(value), -1)
        return value + known.start if known.start else value

    native = {key: native_of(spec.obs[key], value) for key, value in obs.items()}
    return native["obs"] if native.keys() == {"obs"} else native


def _space(known: ObsSpec) -> spaces.Space:
    space = observation_space(known)
    return space_from_0(space) if known.kind == "categories" else space


class Played(NamedTuple):
    """A player's state between steps: the observation, its recurrent state, and which copies begin an episode."""

    obs: Any
    state: Any
    first: np.ndarray


class Player:
    """An SB3 algorithm with the interface of an agent, for evaluation."""

    def __init__(self, learner: BaseAlgorithm, spec: EnvSpec):
        self.learner = learner
        self.spec = spec
        self.device = torch.device("cpu")
        self.state: Any = None

    def initial(self, n: int) -> Played:
        return Played(None, None, np.ones(n, bool))

    def observe(self, carry: Played, row: Row, measure: bool = False) -> tuple[Played, None]:
        return Played(seen(self.spec, row.obs), carry.state, row.is_first), None

    def act(self, carry: Played, greedy: bool) -> np.ndarray:
        chosen, self.state = self.learner.predict(carry.obs, carry.state, carry.first, deterministic=greedy)
        if not self.spec.action.parts:
            return self.spec.action.encode(chosen).clip(-1, 1)
        start = np.ravel(self.spec.action.native["start"])
        flat = chosen.reshape(len(chosen), -1) - start
        return encode(flat, self.spec.action.parts).numpy()

    def acted(self, carry: Played, action: np.ndarray) -> Played:
        return carry._replace(state=self.state)


class Record(BaseCallback):
    """Logs, evaluates and saves while SB3 learns."""

    def __init__(
        self, folder: Path, logger: Logger, signals: Signals, env: EnvConfig, seed: int, every: int, episodes: int
    ):
        super().__init__()
        self.folder = folder
        self.record = logger  # (BaseCallback.logger is SB3's own)
        self.signals = signals
        self.env = env
        self.seed = seed
        self.every = every
        self.episodes = episodes
        self.began = self.saved = time.monotonic()
        self.evaluated = 0
        self.averages = Averages()

    def _on_training_start(self) -> None:
        self.total = np.zeros(self.training_env.num_envs)
        self.length = np.zeros(self.training_env.num_envs)

    def _on_step(self) -> bool:
        self.signals.check()
        step = self.num_timesteps
        self.total += self.locals["rewards"]
        self.length += 1
        for i in np.flatnonzero(self.locals["dones"]):
            ended = {"return": float(self.total[i]), "length": float(self.length[i])}
            self.record.write(step, {f"episode/{key}": value for key, value in ended.items()})
            self.averages.add({f"train/{key}": value for key, value in ended.items()})
            self.total[i] = self.length[i] = 0
        if self.every and step // self.every > self.evaluated:
            self.evaluated = step // self.every
            spec = cast(RealVec, self.training_env).spec
            returns = play(
                cast(Any, Player(self.model, spec)), self.env, self.episodes, self.seed, "agent", signals=self.signals
            )
            metrics = {f"evaluate/{k}": getattr(returns, k) for k in ("return_mean", "return_std", "length_mean")}
            self.record.write(step, metrics | self.averages.means() | {"time/wall": time.monotonic() - self.began})
            self.averages = Averages()
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.model.save(self.folder / "controller.zip")
            self.saved = time.monotonic()
        return True
