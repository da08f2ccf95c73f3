"""A trained agent as an object: Gymnasium's own values go in and come out, and what it remembers is a value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.core.device import autocast, own_randomness
from longdream.agent.dream_env.spaces import action_space, observation_space
from longdream.agent.dream_env.transfer import Actions
from longdream.agent.library.values import (
    Array,
    Dream,
    Memory,
    Observation,
    Surprise,
    Values,
    as_array,
    as_given,
    batched,
)
from longdream.envs.contract import EnvSpec, ObsSpec, Row, UserError
from longdream.envs.copies import cannot_make, for_gym_make
from longdream.envs.make import find
from longdream.envs.spaces.flat import make_flat
from longdream.worldmodel import model
from longdream.worldmodel.dream import Starts, imagine


class TrainedAgent:
    """V, M and C of a run, as `longdream.load` opens them. Observations, actions and rewards are those of Gymnasium.

    The names are those of World Models (Ha and Schmidhuber 2018, arXiv 1803.10122). Where a run is asked for, the agent
    stands for its own: `longdream.evaluate(agent)`.

    Every method takes a single observation or a batch of n, as numpy arrays or as tensors, and answers in the same
    form. Values of n streams have a leading axis of n. Actions and dreams that are sampled draw from torch's global
    generator: `torch.manual_seed(0)` repeats them.

    >>> import longdream as ld
    >>> agent = ld.load("runs/demo")
    >>> env = agent.make_env()
    >>> obs, _ = env.reset(seed=0)
    >>> memory = agent.reset()
    >>> action, memory = agent.act(obs, memory)
    >>> action in env.action_space
    True
    >>> dream = agent.imagine(memory, horizon=5)
    >>> dream.rewards.shape, dream.frames.shape[0]
    ((5,), 5)

    Attributes:
        actor: V, M and C themselves, `longdream.agent.core.agent.Agent`.
        config, spec: the run's configuration; its observations and actions.
        folder: of the run. steps: real steps that it was trained for (updates, for a C trained in dreams alone).
        observation_space, action_space: of a single environment. Vectors are flat here, as the agent sees them.
    """

    def __init__(self, actor: Agent, folder: Path, steps: int) -> None:
        self.actor = actor
        self.folder = folder
        self.steps = steps
        self.config: Config = actor.config
        self.spec: EnvSpec = actor.spec
        by_key = {key: observation_space(spec) for key, spec in self.spec.obs.items()}
        self.observation_space = by_key["obs"] if by_key.keys() == {"obs"} else spaces.Dict(by_key)
        self.action_space = action_space(self.spec.action)

    def __repr__(self) -> str:
        return f"TrainedAgent({str(self.folder)!r}, {self.config.env.id}, {self.steps:,} steps, {self.actor.device})"

    def __fspath__(self) -> str:
        return str(self.folder)

    # -- acting -------------------------------------------------------------------------------------------------------

    def make_env(self, num_envs: int | None = None, **kwargs: Any) -> Any:
        """The environment that the agent was trained in.

        Args:
            num_envs: None for a single `gymnasium.Env`; else a vector environment of so many copies in this process.
                Where an episode ends, the observation is the first of the next one (SAME_STEP autoreset), so that
                `first` of the next `act` is `terminated | truncated`.
            kwargs: arguments of the environment, such as render_mode, beside or in place of the run's own.

        Raises:
            UserError: the environment is not registered, cannot be made with these arguments, or num_envs is below 1.

        >>> import longdream as ld
        >>> ld.load("runs/demo").make_env(4).num_envs
        4
        """
        if num_envs is not None and num_envs < 1:
            raise UserError(f"num_envs = {num_envs}: must be at least 1")
        registration = find(self.config.env.id)
        arguments = for_gym_make(registration, self.config.env.kwargs | kwargs)

        def make() -> gym.Env:
            try:
                return make_flat(registration, arguments)
            except UserError:
                raise
            except Exception as error:
                raise cannot_make(self.config.env.id, arguments, error) from error

        if num_envs is None:
            return make()
        return gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)

    def reset(self, n: int | None = None) -> Memory:
        """The memory of an agent that has seen nothing, for a single stream or for n.

        Raises:
            UserError: n is below 1.

        >>> import longdream as ld
        >>> ld.load("runs/demo").reset(3)
        Memory(of 3 streams)
        """
        if n is not None and n < 1:
            raise UserError(f"n = {n}: must be at least 1")
        carry = self.actor.initial(1 if n is None else n)
        return Memory(carry, torch.zeros(len(carry.feat), dtype=torch.bool, device=self.actor.device), n is None)

    def act(
        self, obs: Observation, memory: Memory, *, greedy: bool | None = None, first: Values | None = None
    ) -> tuple[Any, Memory]:
        """Take in an observation and choose the action there: M's `commit` of the frame, then C.

        Args:
            obs: `(*shape)`, or `(n, *shape)` for a memory of n streams; a dict of these where the space is a Dict.
            greedy: the most probable action instead of a sampled one. None: as the run is evaluated.
            first: bool or `(n,)`, where an episode begins with this observation: what was before is forgotten. A
                memory fresh from `reset` needs none.

        Returns:
            the action in the environment's form, and the memory, which holds obs and the action.

        Raises:
            UserError: the observation is not one of this agent's environment, or `first` is not one per stream.
            NotFinite: C gave an action that is not finite.

        >>> import longdream as ld, numpy as np
        >>> agent = ld.load("runs/demo")
        >>> envs = agent.make_env(3)
        >>> obs, _ = envs.reset(seed=0)
        >>> actions, memory = agent.act(obs, agent.reset(3))
        >>> actions.shape, memory.features.shape[0]
        ((3,), 3)
        """
        memory = self.observe(obs, memory, first)
        greedy = self.config.evaluate.greedy if greedy is None else greedy
        encoded = self.actor.act(memory.carry, greedy)
        memory = replace(memory, carry=self.actor.acted(memory.carry, encoded))
        return self._native(torch.from_numpy(encoded), memory), memory

    def observe(self, obs: Observation, memory: Memory, first: Values | None = None) -> Memory:
        """Take in an observation without acting, as when somebody else acts; `acted` then records what was done.

        Arguments and errors are those of `act`.

        >>> import longdream as ld
        >>> agent = ld.load("runs/demo")
        >>> env = agent.make_env()
        >>> obs, _ = env.reset(seed=0)
        >>> memory = agent.observe(obs, agent.reset())
        >>> action = env.action_space.sample()
        >>> memory = agent.acted(memory, action)
        >>> memory = agent.observe(env.step(action)[0], memory)
        """
        return self._observe(obs, memory, first, None, None, measure=False)[0]

    def acted(self, memory: Memory, action: Values) -> Memory:
        """The memory once `action`, `(*native)` or `(n, *native)`, is the one that was taken.

        Raises:
            UserError: it is not in the action space.

        >>> import longdream as ld
        >>> agent = ld.load("runs/demo")
        >>> obs, _ = agent.make_env().reset(seed=0)
        >>> chosen, memory = agent.act(obs, agent.reset())
        >>> agent.acted(memory, 1)  # another one was taken
        Memory(of 1 stream)
        """
        encoded = self._encoded(batched(action, memory.single), len(memory))
        return replace(memory, carry=memory.carry._replace(action=encoded))

    def predict(
        self,
        observation: Observation,
        state: Memory | None = None,
        episode_start: Values | None = None,
        deterministic: bool = True,
    ) -> tuple[Any, Memory]:
        """`act` as Stable-Baselines3 calls it, for its `evaluate_policy` and what else takes its models.

        Args:
            observation: single or batched. state: the memory that the last call returned; None at the beginning.
            episode_start: bool `(n,)`, where an episode begins. deterministic: greedy actions.

        Returns, and raises:
            as `act`.

        >>> import longdream as ld
        >>> from stable_baselines3.common.evaluation import evaluate_policy
        >>> agent = ld.load("runs/demo")
        >>> mean, _ = evaluate_policy(agent, agent.make_env(), n_eval_episodes=2, warn=False)
        >>> 0 <= float(mean) <= 1
        True
        """
        memory = state or self.reset(self._batch(observation))
        return self.act(observation, memory, greedy=deterministic, first=episode_start)

    # -- M ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def imagine(
        self,
        memory: Memory,
        actions: Values | None = None,
        *,
        policy: TrainedAgent | Callable[[Any], Any] | None = None,
        horizon: int | None = None,
        temperature: float = 1.0,
        steps: int | None = None,
        seed: int | None = None,
    ) -> Dream:
        """Dream from the moment that the memory holds, under given actions or under a policy.

        Frame by frame: M denoises the next one against a clean past (diffusion forcing; Chen et al. 2024, arXiv
        2407.01392) and takes it in. Reward and end are expectations of its heads. The first action is taken at the last
        observation, in place of the one that `act` chose there.

        Args:
            actions: `(H, *native)`, or `(n, H, *native)` for a memory of n streams.
            policy: an agent with the same V and M, or a function from features `(n, F)`, also of a single stream
                (n = 1), to native actions `(n, *native)`. Without actions and policy, this agent's C acts.
            horizon: H, under a policy. None: the run's controller.horizon.
            temperature: randomness of dreamt frames; 1 as learned.
            steps: denoising steps per frame. None: the run's forcing.steps, often one, which gives means.
            seed: torch draws from it; its global generator is left alone. None: from the global generator.

        Raises:
            UserError: the memory is empty, actions are not in the action space, a number is not positive, or both
                actions and a policy are given.

        >>> import longdream as ld, numpy as np
        >>> agent = ld.load("runs/demo")
        >>> obs, _ = agent.make_env().reset(seed=0)
        >>> memory = agent.observe(obs, agent.reset())
        >>> agent.imagine(memory, np.zeros(6, int)).rewards.shape
        (6,)
        >>> many = agent.imagine(memory.repeat(8), policy=lambda features: np.ones(len(features), int), horizon=4)
        >>> many.ends.shape
        (8, 4)
        """
        if not bool(memory.started.all()):
            raise UserError("this memory holds no observation to dream from: act or observe first")
        if actions is not None and (policy is not None or horizon is not None):
            raise UserError("imagine takes actions, or a policy and a horizon, not both")
        for name, value in {"temperature": temperature, "horizon": horizon, "steps": steps}.items():
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise UserError(f"{name} = {value!r}: must be greater than 0")
        actor = self.actor
        n = len(memory)
        if actions is not None:
            memory = replace(memory, tensors=isinstance(actions, Tensor))
            given = batched(actions, memory.single)
            if given.ndim < 2 or len(given) != n:
                form = "(H, ...)" if memory.single else f"({n}, H, ...)"
                raise UserError(f"actions of shape {np.shape(actions)}: give {form}, the steps of each dream")
            horizon = given.shape[1]
            encoded = self._encoded(given.reshape(-1, *given.shape[2:]), n * given.shape[1])
            plan = iter(encoded.unflatten(0, (n, -1)).unbind(1))
            choose: Callable[[Tensor], Tensor] = lambda _: next(plan)  # noqa: E731
        elif policy is None or isinstance(policy, TrainedAgent):
            chosen = self if policy is None else policy
            choose = lambda feat: chosen.actor.controller.act(feat, chosen.config.evaluate.greedy)  # noqa: E731
        else:
            as_batch = replace(memory, single=False)
            choose = lambda feat: self._encoded(as_array(policy(as_given(feat, as_batch))), n)  # noqa: E731
        starts = Starts(memory.carry.feat, memory.carry.state, torch.ones(n, device=actor.device))
        drawn = nullcontext() if seed is None else own_randomness(seed, actor.device)
        horizon = horizon or self.config.controller.horizon
        with drawn, autocast(self.config.precision, actor.device):
            dream = imagine(actor.model, starts, choose, horizon, temperature, steps)
        native = self.spec.action.decode(dream.action.flatten(0, 1).clamp(-1, 1).float().cpu().numpy())
        native = native.reshape(n, horizon, *native.shape[1:])
        values = (torch.from_numpy(native), dream.reward, 1 - dream.cont, dream.feat[:, 1:], dream.z)
        return Dream(*(as_given(value, memory) for value in values), agent=self)

    def surprise(
        self, obs: Observation, memory: Memory, reward: Values | None = None, terminated: Values | None = None
    ) -> Surprise:
        """How far an observation, and what came with it, differs from what M predicted. docs/surprise.md has the
        formulas.

        Args:
            memory: from before this observation, with the action that led to it.
            reward, terminated: that came with it, a value or `(n,)`. What is not given counts as predicted.

        Returns:
            `latent`, `reward` and `end`: 0 for the first observation of an episode.

        Raises:
            UserError: as `act`; or reward or terminated are not one per stream.

        >>> import longdream as ld
        >>> agent = ld.load("runs/demo")
        >>> env = agent.make_env()
        >>> obs, _ = env.reset(seed=0)
        >>> action, memory = agent.act(obs, agent.reset())
        >>> obs, reward, terminated, truncated, _ = env.step(action)
        >>> agent.surprise(obs, memory, reward, terminated).latent > 0
        True
        """
        after, surprise = self._observe(obs, memory, None, reward, terminated, measure=True)
        assert surprise is not None
        parts = (surprise.latent, surprise.reward * (reward is not None), surprise.end * (terminated is not None))
        values = (as_given(part, after) for part in parts)
        return Surprise(*(float(value) if memory.single and not after.tensors else value for value in values))

    def features(self, obs: Observation, memory: Memory) -> Array:
        """What C sees once the observation is taken in: `(F,)`, or `(n, F)` float32. The memory stays as it is.

        Arguments and errors are those of `act`.

        >>> import longdream as ld
        >>> agent = ld.load("runs/demo")
        >>> obs, _ = agent.make_env().reset(seed=0)
        >>> agent.features(obs, agent.reset()).shape == (agent.actor.model.feature_size,)
        True
        """
        return self.observe(obs, memory).features

    # -- V ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, obs: Observation) -> Array:
        """V's latents of observations: `(N, D)`, or `(n, N, D)` float32.

        Raises:
            UserError: an observation is not one of this agent's environment.

        >>> import longdream as ld
        >>> agent = ld.load("runs/demo")
        >>> obs, _ = agent.make_env().reset(seed=0)
        >>> agent.decode(agent.encode(obs)).shape == obs.shape
        True
        """
        n = self._batch(obs)
        form = replace(self.reset(n), tensors=_is_tensor(obs))
        return as_given(self.actor.model.encoder(self._packed(obs, form)), form)

    @torch.no_grad()
    def decode(self, latents: Values, features: Values | None = None) -> Any:
        """Latents `(..., N, D)` as observations `(..., *shape)`: images uint8, vectors flat float32, discrete values
        from their native start; a dict of these where the space is a Dict.

        features: `(..., F)` of the same frames, which V needs where it learns through M (objective prior).

        Raises:
            UserError: V needs features and there are none, or latents are of another shape.

        >>> import longdream as ld
        >>> agent = ld.load("runs/demo")
        >>> obs, _ = agent.make_env(4).reset(seed=0)
        >>> again = agent.decode(agent.encode(obs), agent.features(obs, agent.reset(4)))
        >>> again.shape == obs.shape, again.dtype
        (True, dtype('uint8'))
        """
        encoder = self.actor.model.encoder
        z = torch.as_tensor(latents).to(self.actor.device)
        if z.shape[-2:] != (encoder.tokens, encoder.channels):
            raise UserError(f"latents of shape {tuple(z.shape)}: give (..., {encoder.tokens}, {encoder.channels})")
        feat = None if features is None else torch.as_tensor(features).to(self.actor.device)
        if feat is None and self.actor.model.trains_encoder:
            raise UserError("V of this run learns through M: give decode the features of these latents too")
        lead = z.shape[:-2]
        flat = encoder.decode(z.reshape(-1, *z.shape[-2:]), None if feat is None else feat.reshape(-1, feat.shape[-1]))
        obs = {key: value.reshape((*lead, *value.shape[1:])) + self.spec.obs[key].start for key, value in flat.items()}
        if not isinstance(latents, Tensor):
            obs = {key: value.cpu().numpy() for key, value in obs.items()}
        return obs["obs"] if obs.keys() == {"obs"} else obs

    # -- between the environment's values and tensors -----------------------------------------------------------------

    @torch.no_grad()
    def _observe(
        self,
        obs: Observation,
        memory: Memory,
        first: Values | None,
        reward: Values | None,
        terminated: Values | None,
        measure: bool,
    ) -> tuple[Memory, model.Surprise | None]:
        n = len(memory)
        memory = replace(memory, tensors=_is_tensor(obs))
        device = self.actor.device

        def row(name: str, value: Values | None, dtype: torch.dtype) -> Tensor:
            values = torch.as_tensor(0 if value is None else value).to(device, dtype).reshape(-1)
            if len(values) not in (1, n):
                raise UserError(f"{name} of shape {tuple(np.shape(value))}: give one value, or one for each of {n}")  # type: ignore
            return values.expand(n)

        begins = ~memory.started | row("first", first, torch.bool)
        flag = row("terminated", terminated, torch.bool)
        came = row("reward", reward, torch.float32)
        now: Any = Row(self._packed(obs, memory), begins, came, flag, flag)  # type: ignore
        carry, surprise = self.actor.observe(memory.carry, now, measure)
        return replace(memory, carry=carry, started=torch.ones_like(memory.started)), surprise

    def _named(self, obs: Any) -> dict[str, Any]:
        named = obs if isinstance(obs, dict) else {"obs": obs}
        if named.keys() != self.spec.obs.keys():
            raise UserError(f"the observation has {sorted(named)}, this agent knows {sorted(self.spec.obs)}")
        return named

    def _batch(self, obs: Any) -> int | None:
        """The number of observations; None for a single one, without a batch axis."""
        key, value = next(iter(self._named(obs).items()))
        shape = tuple(np.shape(value))
        known = self.spec.obs[key].shape
        single = _size(shape) == _size(known) and not (len(shape) > len(known) and shape[0] == 1)
        return None if single else shape[0] if shape else 1

    def _packed(self, obs: Any, memory: Memory) -> dict[str, Tensor]:
        """Observations `(n, *shape)` as they are stored."""
        named = self._named(obs)
        return {key: self._pack(key, spec, named[key], memory) for key, spec in self.spec.obs.items()}

    def _pack(self, key: str, spec: ObsSpec, value: Any, memory: Memory) -> Tensor:
        n = len(memory)
        shape = tuple(np.shape(value))
        single = shape if memory.single else shape[1:]
        if not spec.takes(single) or not (memory.single or shape[:1] == (n,)):
            wanted = spec.shape if memory.single else (n, *spec.shape)
            raise UserError(f"observation {key!r} has shape {shape}, expected {wanted}")
        if isinstance(value, Tensor):
            return (
                (value.to(self.actor.device) - spec.start).reshape(n, *spec.shape).to(getattr(torch, spec.dtype.name))
            )
        return torch.from_numpy(spec.pack(batched(value, memory.single))).to(self.actor.device)

    def _encoded(self, native: np.ndarray, n: int) -> Tensor:
        """Native actions `(n, *native)`, checked, as `(n, A)` on the device."""
        kept = Actions(self.spec.action, self.action_space, n, self.actor.device)
        kept.put(native)
        return kept.encoded().clone()

    def _native(self, encoded: Tensor, memory: Memory) -> Any:
        """Encoded actions `(n, A)` in the environment's form and the memory's."""
        native = torch.from_numpy(self.spec.action.decode(encoded.numpy()))
        return as_given(native.to(self.actor.device), memory)


def _is_tensor(obs: Any) -> bool:
    values = obs.values() if isinstance(obs, dict) else (obs,)
    return any(isinstance(value, Tensor) for value in values)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=int))
