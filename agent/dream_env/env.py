"""``longdream/Dream-v0``: dreams of a trained M as a natively vectorised Gymnasium environment.

import gymnasium as gym
import longdream  # registers it

dreams = gym.make_vec("longdream/Dream-v0", num_envs=64, vectorization_mode="vector_entry_point",
                      checkpoint="runs/quickstart-s0-1")
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_copy_: many copies in one launch

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.agent.config.schema import Device
from longdream.agent.core.agent import Agent
from longdream.agent.core.cuda_graphs import GraphedCall
from longdream.agent.core.device import own_randomness
from longdream.agent.dream_env.spaces import Observation, action_space, observation_space, picture
from longdream.agent.dream_env.starts import (
    Moments,
    first_moments,
    initial_moments,
    open_replay,
    replayed_moments,
)
from longdream.agent.dream_env.transfer import Actions, OnTheWay, fetched, index
from longdream.agent.run.folder import load_agent
from longdream.envs.contract import OneCopy, UserError
from longdream.envs.process import forked

Start = Literal["replay", "initial", "observation"]

POOL = 1024


class _NamesItsAdapter(type):
    """Stable-Baselines3 takes no vector environment of Gymnasium, and its error shows the class: as here."""

    def __repr__(cls) -> str:
        return f"{super().__repr__()} (Stable-Baselines3 takes longdream.sb3_env(run, num_envs) instead)"


class DreamVecEnv(gym.vector.VectorEnv, metaclass=_NamesItsAdapter):
    """A batch of num_envs dreams.

    At each step M samples the next frame given the action. The reward is M's expected reward. The dream terminates with
    the probability that M predicts, and is truncated after ``horizon`` steps. The action space is that of the real
    environment, made flat where it is nested. Infos are empty except for ``final_obs`` with SAME_STEP autoreset.

    **Seeds.** ``reset(seed=s)`` and the same actions reproduce a dream, given the same checkpoint and arguments; on the
    CPU bit for bit. A copy's dream depends on the seed, on num_envs, on the copy's index and on its own actions, not on
    those of other copies. torch's global random state is not changed.

    Args:
        num_envs: number of copies.
        checkpoint: the folder of a run, whose newest checkpoint is loaded, or an Agent.
        observation: ``"feature"``: C's input, Box (F,), which contains M's memory. ``"latent"``: the frame's latents,
            Box (N * D,). ``"image"``: the frame as V decodes it, in the form in which the agent stores real
            observations: an image, a vector, a discrete value, categories, or a flat Dict of these.
        temperature: randomness of the dreamt frames; 1 as learned. It has no effect on continuous latents (flow) that
            are sampled in one denoising step, which are means.
        steps: denoising steps per frame; None for the run's forcing.steps.
        horizon: steps after which a dream is truncated; None for the run's controller.horizon.
        start: ``"replay"``: random moments of the replay, with M's memory of the rows before them. ``"initial"``: first
            frames of episodes in the replay. ``"observation"``: copy i starts, also after an autoreset, from
            observation i of the batch last passed as ``reset(options={"observation": ...})``, in the form of the flat
            environment, which `TrainedAgent.make_env` makes. Or Moments of your own.
        context: rows of the clips from which moments of the replay are taken; None for the run's replay.length.
        pool: number of moments that are taken from the replay once; dreams start from these.
        autoreset_mode: NEXT_STEP or SAME_STEP, as Gymnasium's enum or its name.
        device: where M computes; None as in the run.
        render_mode: None or "rgb_array", the decoded frame; observations that are not images are drawn as bars.

    Raises:
        UserError: an argument is out of its range, there is no such run, or its checkpoint cannot be used.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (each instance replaces it, with its own autoreset mode)
        "render_modes": ["rgb_array"],
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        checkpoint: str | Path | Agent = "",
        observation: Observation = "feature",
        temperature: float = 1.0,
        steps: int | None = None,
        horizon: int | None = None,
        start: Start | Moments = "replay",
        context: int | None = None,
        pool: int = POOL,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        device: Device | None = None,
        render_mode: str | None = None,
    ) -> None:
        _check(num_envs, checkpoint, observation, temperature, steps, horizon, start, context, pool, device)
        if forked():
            _settle_in_fork(device)
        mode = read_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": mode}
        self.same_step = mode is AutoresetMode.SAME_STEP
        self.agent, self.moments = _open(checkpoint, start, context, pool, device)
        config = self.agent.config
        self.num_envs = num_envs
        self.observation = observation
        self.render_mode = render_mode
        self.given = start == "observation"
        self.temperature = temperature
        self.steps = steps or config.forcing.steps
        self.horizon = horizon or config.controller.horizon
        self.single_observation_space = self._space()
        self.single_action_space = action_space(self.agent.spec.action)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.graphed = self.agent.device.type == "cuda" and getattr(self.agent.model.objective, "capturable", False)
        self.actions = Actions(self.agent.spec.action, self.action_space, num_envs, self.agent.device)
        self.advance = GraphedCall(self._advance) if self.graphed else self._advance
        self._now: Moments | None = None
        # first observations are computed once for all moments, except images: all would have to be decoded
        self.precomputed = observation != "image"
        self._first_observations: tuple[Moments, np.ndarray] | None = None
        self._age = np.zeros(num_envs, np.int64)
        self._over = np.zeros(num_envs, np.bool_)

    # -- Gymnasium's side ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start new dreams in all copies. Without a seed, the random streams continue.

        Args:
            options: with start="observation", {"observation": the first observations, batched}.
        """
        super().reset(seed=seed)
        self._take_options(options or {})
        first = self._moments().take(self._index(self._sample_starts()))
        if self._now is None:  # separate tensors: a captured graph writes into them
            self._now = pytree.tree_map(torch.clone, first)
            if self.graphed:
                with own_randomness(0, self.agent.device):  # capturing draws random numbers: do it before any dream
                    self.advance()
        self._set_current(first)
        self._age[:] = 0
        self._over[:] = False
        return self._observe(first.z, first.feat), {}

    @torch.no_grad()
    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self._current()
        self.actions.put(actions)
        # the same number of draws at each step, whatever happens in any copy
        with own_randomness(int(self.np_random.integers(2**63)), self.agent.device):
            outcome = self.advance()
        # the device works asynchronously from here on, while the host prepares new dreams
        now = self._current()
        start = self._sample_starts()
        fresh = np.flatnonzero(self._over)
        self._age += 1
        if fresh.size and not self.precomputed:
            self._begin(fresh, start)
        transfer = OnTheWay((self._on_device(now.z, now.feat), outcome), self.agent.device)
        if fresh.size and self.precomputed:
            self._begin(fresh, start)  # launched after the transfer, which does not wait for it
        due = self._age >= self.horizon  # (not in fresh copies, whose age is 0)
        shown, (expected, ended) = transfer.arrays()
        reward = expected.astype(np.float64)
        terminated = ended > 0.5
        if fresh.size:
            reward[fresh] = 0.0
            terminated[fresh] = False
            if self.precomputed:
                shown[fresh] = self._first_shown()[start[fresh]]
        truncated = due & ~terminated
        obs = self._named(shown)
        infos: dict[str, Any] = {}
        over = terminated | truncated
        if self.same_step:
            if (rows := np.flatnonzero(over)).size:
                infos = {"final_obs": _each(obs, rows, self.num_envs), "_final_obs": over}
                self._begin(rows, start)
                if self.precomputed:
                    obs[rows] = self._first_shown()[start[rows]]
                else:
                    at = self._index(rows)
                    _overwrite(obs, rows, self._observe(now.z.index_select(0, at), now.feat.index_select(0, at)))
        else:
            self._over = over
        return obs, reward, terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A frame `(H, W, 3)` uint8 per copy."""
        if self.render_mode != "rgb_array":
            return None
        decoded = self._decoded(self._current())
        return tuple(picture({key: value[i] for key, value in decoded.items()}) for i in range(self.num_envs))

    # -- the dream ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _advance(self) -> Tensor:
        """M's part of a step, given the actions in `self.actions`.

        Returns:
            `(2, n)`: the expected reward, and 1 where the dream has terminated.
        """
        model = self.agent.model
        now = self._current()
        action = self.actions.encoded()
        reward, cont = model.reward_continue.expect(now.feat, action)
        self._set_current(Moments(*model.dream_step(now.feat, now.state, action, self.temperature, self.steps)))
        return torch.stack([reward, (torch.rand_like(cont) >= cont).to(reward.dtype)])

    def _set_current(self, moments: Moments) -> None:
        """Make these the current moments. A captured graph needs them at the same addresses, so they are copied."""
        if self.graphed:
            torch._foreach_copy_(pytree.tree_leaves(self._current()), pytree.tree_leaves(moments))
        else:
            self._now = moments

    def _begin(self, rows: np.ndarray, start: np.ndarray) -> None:
        """Start new dreams in the copies `rows`, each from the moment with index `start[i]`; start `(num_envs,)`."""
        self._current().put(self._index(rows), self._moments().take(self._index(start[rows])))
        self._age[rows] = 0

    def _sample_starts(self) -> np.ndarray:
        """For each copy the index of a moment to start from, `(num_envs,)`."""
        if self.given:
            return np.arange(self.num_envs)
        return self.np_random.integers(len(self._moments().z), size=self.num_envs)

    def _first_shown(self) -> np.ndarray:
        """Features or latents of all moments that dreams start from."""
        moments = self._moments()
        if self._first_observations is None or self._first_observations[0] is not moments:
            self._first_observations = moments, self._fetched(self._on_device(moments.z, moments.feat))
        return self._first_observations[1]

    def _index(self, rows: np.ndarray) -> Tensor:
        return index(rows, self.agent.device)

    def _moments(self) -> Moments:
        if self.moments is None:
            raise UserError("a dream with start='observation' needs reset(options={'observation': ...}), batched")
        return self.moments

    def _current(self) -> Moments:
        if self._now is None:
            raise ResetNeeded("reset the dream before its first step")
        return self._now

    # -- between arrays and tensors -----------------------------------------------------------------------------------

    def _take_options(self, options: dict[str, Any]) -> None:
        wrong = [key for key in options if key != "observation" or not self.given]
        if wrong:
            raise UserError(
                f"unknown option {wrong[0]!r} of reset: a dream made with start='observation' takes 'observation', "
                f"others take none"
            )
        if "observation" not in options:
            return
        spec = self.agent.spec
        given = options["observation"]
        named = given if isinstance(given, dict) else {"obs": given}
        if named.keys() != spec.obs.keys():
            raise UserError(f"options['observation'] has {sorted(named)}, the agent knows {sorted(spec.obs)}")
        for key, known in spec.obs.items():
            shape = np.shape(named[key])
            if shape[:1] != (self.num_envs,) or not known.takes(shape[1:]):
                raise UserError(
                    f"options['observation'] {key!r} has shape {shape}, expected {(self.num_envs, *known.shape)}"
                )
        self.moments = first_moments(self.agent, spec.pack_obs(named))

    def _observe(self, z: Tensor, feat: Tensor) -> Any:
        """The observation of moments with these latents and features, as new arrays."""
        return self._named(self._fetched(self._on_device(z, feat)))

    def _on_device(self, z: Tensor, feat: Tensor) -> Any:
        """The same as tensors on the device."""
        if self.observation == "image":
            return self.agent.model.encoder.decode(z, feat)
        # (a latent may exceed its bounds by a rounding error)
        return (feat if self.observation == "feature" else z.flatten(1).clamp(-1, 1)).float()

    def _fetched(self, tensors: Any) -> Any:
        """A tree of tensors as new arrays; waits for the device."""
        return fetched(tensors, self.agent.device)

    def _named(self, shown: Any) -> Any:
        """Observations in the environment's form: discrete values count from their native start, and a single
        observation is not in a dict."""
        if self.observation != "image":
            return shown
        known = self.agent.spec.obs
        obs = {key: value + known[key].start if known[key].start else value for key, value in shown.items()}
        return obs["obs"] if obs.keys() == {"obs"} else obs

    @torch.no_grad()
    def _decoded(self, moments: Moments) -> dict[str, np.ndarray]:
        return self._fetched(self.agent.model.encoder.decode(moments.z, moments.feat))

    def _space(self) -> spaces.Space:
        model = self.agent.model
        if self.observation == "image":
            by_key = {key: observation_space(spec) for key, spec in self.agent.spec.obs.items()}
            return by_key["obs"] if by_key.keys() == {"obs"} else spaces.Dict(by_key)
        if self.observation == "feature":
            return spaces.Box(-np.inf, np.inf, (model.feature_size,), np.float32)
        low = -1.0 if model.encoder.latent == "continuous" else 0.0
        return spaces.Box(low, 1.0, (model.encoder.tokens * model.encoder.channels,), np.float32)


class DreamEnv(OneCopy):
    """A single dream, for ``gym.make``. Arguments as for DreamVecEnv, without num_envs and autoreset_mode. The
    observation in ``reset(options=...)`` is not batched."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 8}
    vector: DreamVecEnv

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(DreamVecEnv(1, **kwargs))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        options = dict(options or {})
        if "observation" in options:
            given = options["observation"]
            one = {key: np.asarray(v)[None] for key, v in given.items()} if isinstance(given, dict) else None
            options["observation"] = one or np.asarray(given)[None]
        obs, _ = self.vector.reset(seed=seed, options=options)
        return self._first(obs), {}


# -- opening ----------------------------------------------------------------------------------------------------------


def read_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """NEXT_STEP or SAME_STEP, from the enum or from its name or value, with any capitals and underscores.

    Raises:
        UserError: another mode.
    """
    known = {"nextstep": AutoresetMode.NEXT_STEP, "samestep": AutoresetMode.SAME_STEP}
    word = str(mode.value if isinstance(mode, AutoresetMode) else mode).replace("_", "").lower()
    if word not in known:
        raise UserError(f"autoreset_mode = {mode!r}: use AutoresetMode.NEXT_STEP or AutoresetMode.SAME_STEP")
    return known[word]


def _settle_in_fork(device: Device | None) -> None:
    """Prepare a forked process, such as a worker of AsyncVectorEnv, for torch.

    Its threads are not forked: with more than one, torch would wait for them for ever.

    Raises:
        UserError: it would dream on a GPU that its parent uses already, which CUDA does not allow.
    """
    torch.set_num_threads(1)
    if device != "cpu" and torch.cuda._is_in_bad_fork():
        raise UserError(
            "this process was forked from one that uses the GPU, so it cannot: start it with context='forkserver', make"
            " the dreams in one process with vectorization_mode='vector_entry_point', or give device='cpu'"
        )


def _check(
    num_envs: int,
    checkpoint: str | Path | Agent,
    observation: str,
    temperature: float,
    steps: int | None,
    horizon: int | None,
    start: Any,
    context: int | None,
    pool: int,
    device: str | None,
) -> None:
    if not checkpoint:
        raise UserError("which dream? Give checkpoint='runs/NAME', the folder of a run")
    least = {"num_envs": (num_envs, 1), "steps": (steps, 1), "horizon": (horizon, 1), "pool": (pool, 1)}
    for name, (value, minimum) in {
        **least,
        "context": (context, 2),
    }.items():  # of two rows, one does not end an episode
        if value is not None and not value >= minimum:
            raise UserError(f"{name} = {value}: must be at least {minimum}")
    if not 0 < temperature < np.inf:
        raise UserError(f"temperature = {temperature}: must be greater than 0 and finite")
    words = {"observation": (observation, Observation), "device": (device, Device)}
    if not isinstance(start, Moments):
        words["start"] = (start, Start)
    for name, (word, kind) in words.items():
        if word is not None and word not in kind.__args__:
            raise UserError(f"{name} = {word!r}: use one of {', '.join(kind.__args__)}")


def _open(
    checkpoint: str | Path | Agent, start: Start | Moments, context: int | None, pool: int, device: Device | None
) -> tuple[Agent, Moments | None]:
    """The agent, and the moments that dreams start from; None if `reset` will receive them."""
    if isinstance(checkpoint, Agent):
        if isinstance(start, str) and start != "observation":
            raise UserError(f"start = {start!r} needs the folder of a run: an Agent has no replay; give it Moments")
        return checkpoint, start if isinstance(start, Moments) else None
    agent, run = load_agent(checkpoint, device)
    if not isinstance(start, str) or start == "observation":
        return agent, None if isinstance(start, str) else start
    replay = open_replay(run)
    try:
        if start == "initial":
            return agent, initial_moments(agent, replay, pool)
        return agent, replayed_moments(agent, replay, pool, context or agent.config.replay.length)
    finally:
        replay.close()


# -- observations of single copies ------------------------------------------------------------------------------------


def _each(obs: Any, rows: np.ndarray, total: int) -> np.ndarray:
    """Observations of the copies `rows` in Gymnasium's form: an array of `total` objects, None for other copies."""
    each = np.full(total, None, object)
    for i in rows:
        each[i] = {key: value[i].copy() for key, value in obs.items()} if isinstance(obs, dict) else obs[i].copy()
    return each


def _overwrite(obs: Any, rows: np.ndarray, new: Any) -> None:
    if isinstance(obs, dict):
        for key, value in obs.items():
            value[rows] = new[key]
    else:
        obs[rows] = new
