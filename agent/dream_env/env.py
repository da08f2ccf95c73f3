"""``longdream/Dream-v0``: the dream of a trained M as a Gymnasium environment, natively vectorised.

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

from longdream.agent.core.agent import Agent
from longdream.agent.core.cuda_graphs import Replayed
from longdream.agent.core.learner import own_randomness
from longdream.agent.dream_env.spaces import action_space, observation_space, picture
from longdream.agent.dream_env.starts import (
    Device,
    Moments,
    first_moments,
    initial_moments,
    open_agent,
    open_replay,
    replayed_moments,
)
from longdream.agent.dream_env.transfer import Actions, OnTheWay, fetched, index
from longdream.envs.contract import OneCopy, UserError

Observation = Literal["latent", "feature", "image"]
Start = Literal["replay", "initial", "observation"]

POOL = 1024


class DreamVecEnv(gym.vector.VectorEnv):
    """num_envs dreams side by side.

    Each step, M draws the next frame after the action; reward is the one that M expects; the dream is terminated with
    the probability that M gives to an end, and truncated after ``horizon`` steps. Actions are the real environment's
    own. Infos are empty, but for ``final_obs`` with SAME_STEP autoreset.

    **Seeds.** ``reset(seed=s)`` and the same actions give the same dream again, for an equal checkpoint, equal
    arguments and, bit for bit, on the CPU. What a copy dreams depends on the seed, on num_envs, on the copy's index
    and on its own actions, but not on those of other copies. torch's global streams are left as they were.

    Args:
        num_envs: copies.
        checkpoint: the folder of a run, whose newest checkpoint is taken; or an Agent.
        observation: ``"feature"``, what C sees: Box (F,), with M's memory in it. ``"latent"``: Box (N * D,), the
            frame's latents. ``"image"``: what V decodes from them, in the form in which the agent stores real
            observations: an image, a vector, a discrete value, or a Dict of these.
        temperature: randomness of the dreamt frames, 1 as learned. No effect on continuous latents (flow) that are
            drawn in one denoising step, which are means.
        steps: denoising steps per frame; None for the run's forcing.steps.
        horizon: steps after which a dream is truncated; None for the run's controller.horizon.
        start: ``"replay"``: random moments of the replay, M having seen the rows before them. ``"initial"``: the first
            frames of episodes there. ``"observation"``: copy i begins, here and at every autoreset, with observation i
            of those last given as ``reset(options={"observation": ...})``, batched, in the real environment's form.
            Or Moments of your own.
        context: rows in the clips that moments of the replay are taken from; None for the run's replay.length.
        pool: moments that are taken from the replay, once, to begin from.
        autoreset_mode: NEXT_STEP or SAME_STEP, as Gymnasium's enum or its name.
        device: where M computes; None as in the run.
        render_mode: None or "rgb_array", the decoded frame; values that are no image are drawn as bars.

    Raises:
        UserError: an argument out of its range, no run, or a checkpoint that cannot be used.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (each instance has one that tells its own mode)
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
        mode = read_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": mode}
        self.same_step = mode is AutoresetMode.SAME_STEP
        self.agent, self.moments = _open(checkpoint, start, context, pool, device)
        config = self.agent.config
        self.num_envs, self.observation, self.render_mode = num_envs, observation, render_mode
        self.given = start == "observation"
        self.temperature, self.steps = temperature, steps or config.forcing.steps
        self.horizon = horizon or config.controller.horizon
        self.single_observation_space = self._space()
        self.single_action_space = action_space(self.agent.spec.action)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.graphed = self.agent.device.type == "cuda" and getattr(self.agent.model.objective, "capturable", False)
        self.actions = Actions(self.agent.spec.action, self.action_space, num_envs, self.agent.device)
        self.advance = Replayed(self._advance) if self.graphed else self._advance
        self._now: Moments | None = None
        # what new dreams show is known before they begin; pictures would all have to be decoded for that
        self.foreseen = observation != "image"
        self._shows: tuple[Moments, np.ndarray] | None = None
        self._age, self._over = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.bool_)

    # -- Gymnasium's side ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """New dreams in all copies. Without a seed, the streams of random numbers run on.

        Args:
            options: with start="observation", {"observation": what all copies see first}.
        """
        super().reset(seed=seed)
        self._take_options(options or {})
        begun = self._moments().take(self._index(self._drawn()))
        if self._now is None:  # tensors of its own: recording writes into them
            self._now = pytree.tree_map(torch.clone, begun)
            if self.graphed:
                with own_randomness(0, self.agent.device):  # recorded now: recording draws random numbers
                    self.advance()
        self._go_on_from(begun)
        self._age[:], self._over[:] = 0, False
        return self._observe(begun.z, begun.feat), {}

    @torch.no_grad()
    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self._current()
        self.actions.put(actions)
        # as many draws at each step, whatever happens in any copy
        with own_randomness(int(self.np_random.integers(2**63)), self.agent.device):
            told = self.advance()
        # a device is at work from here on: what the host does until it needs the outcome costs no time
        now, start, fresh = self._current(), self._drawn(), np.flatnonzero(self._over)
        self._age += 1
        if fresh.size and not self.foreseen:
            self._begin(fresh, start)
        outcome = OnTheWay((self._shown(now.z, now.feat), told), self.agent.device)
        if fresh.size and self.foreseen:
            self._begin(fresh, start)  # behind what is on its way: the host does not wait for it
        due = self._age >= self.horizon  # (fresh ones are not, at age 0)
        shown, (expected, ended) = outcome.arrays()
        reward, terminated = expected.astype(np.float64), ended > 0.5
        if fresh.size:
            reward[fresh], terminated[fresh] = 0.0, False
            if self.foreseen:
                shown[fresh] = self._first_shown()[start[fresh]]
        truncated = due & ~terminated
        obs, infos, over = self._named(shown), {}, terminated | truncated
        if self.same_step:
            if (rows := np.flatnonzero(over)).size:
                infos = {"final_obs": _each(obs, rows, self.num_envs), "_final_obs": over}
                self._begin(rows, start)
                if self.foreseen:
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
        """M's part of a step, under the actions that were put: `(2, n)`, the expected reward, and 1 where the dream has
        ended."""
        model, now, action = self.agent.model, self._current(), self.actions.encoded()
        reward, cont = model.consequence.expect(now.feat, action)
        self._go_on_from(Moments(*model.dream_step(now.feat, now.state, action, self.temperature, self.steps)))
        return torch.stack([reward, (torch.rand_like(cont) >= cont).to(reward.dtype)])

    def _go_on_from(self, moments: Moments) -> None:
        """These are the present ones now. A recorded graph finds them where it found those before."""
        if self.graphed:
            torch._foreach_copy_(pytree.tree_leaves(self._current()), pytree.tree_leaves(moments))
        else:
            self._now = moments

    def _begin(self, rows: np.ndarray, start: np.ndarray) -> None:
        """New dreams in these copies, each from the moment that `start` `(num_envs,)` says."""
        self._current().put(self._index(rows), self._moments().take(self._index(start[rows])))
        self._age[rows] = 0

    def _drawn(self) -> np.ndarray:
        """A moment to begin from for each copy `(num_envs,)`."""
        if self.given:
            return np.arange(self.num_envs)
        return self.np_random.integers(len(self._moments().z), size=self.num_envs)

    def _first_shown(self) -> np.ndarray:
        """What is seen of the moments that dreams begin from: features or latents."""
        moments = self._moments()
        if self._shows is None or self._shows[0] is not moments:
            self._shows = moments, self._fetched(self._shown(moments.z, moments.feat))
        return self._shows[1]

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
        spec, given = self.agent.spec, options["observation"]
        named = given if isinstance(given, dict) else {"obs": given}
        if named.keys() != spec.obs.keys():
            raise UserError(f"options['observation'] has {sorted(named)}, the agent knows {sorted(spec.obs)}")
        for key, known in spec.obs.items():
            found = np.shape(named[key])
            if found[:1] != (self.num_envs,) or np.prod(found[1:], dtype=int) != np.prod(known.shape, dtype=int):
                raise UserError(
                    f"options['observation'] {key!r} has shape {found}, expected {(self.num_envs, *known.shape)}"
                )
        self.moments = first_moments(self.agent, spec.pack_obs(named))

    def _observe(self, z: Tensor, feat: Tensor) -> Any:
        """What is seen of moments with these latents and features: arrays of their own."""
        return self._named(self._fetched(self._shown(z, feat)))

    def _shown(self, z: Tensor, feat: Tensor) -> Any:
        """What is seen of them, on the device."""
        if self.observation == "image":
            return self.agent.model.encoder.decode(z)
        # (a latent may lie outside of its bounds by a rounding error)
        return (feat if self.observation == "feature" else z.flatten(1).clamp(-1, 1)).float()

    def _fetched(self, found: Any) -> Any:
        """A tree of tensors as arrays of their own; the host waits for the device here."""
        return fetched(found, self.agent.device)

    def _named(self, shown: Any) -> Any:
        """What was shown, in the environment's form: values that have a least one count from it, and a single
        observation has no name."""
        if self.observation != "image":
            return shown
        known = self.agent.spec.obs
        found = {key: value + known[key].start if known[key].start else value for key, value in shown.items()}
        return found["obs"] if found.keys() == {"obs"} else found

    @torch.no_grad()
    def _decoded(self, moments: Moments) -> dict[str, np.ndarray]:
        return self._fetched(self.agent.model.encoder.decode(moments.z))

    def _space(self) -> spaces.Space:
        model = self.agent.model
        if self.observation == "image":
            found = {key: observation_space(spec) for key, spec in self.agent.spec.obs.items()}
            return found["obs"] if found.keys() == {"obs"} else spaces.Dict(found)
        if self.observation == "feature":
            return spaces.Box(-np.inf, np.inf, (model.feature_size,), np.float32)
        low = -1.0 if model.encoder.config.latent == "continuous" else 0.0
        return spaces.Box(low, 1.0, (model.encoder.tokens * model.encoder.channels,), np.float32)


class DreamEnv(OneCopy):
    """One dream, for ``gym.make``. Arguments as DreamVecEnv, without num_envs and autoreset_mode; an observation in
    ``reset(options=...)`` is one, not a batch."""

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
    """NEXT_STEP or SAME_STEP, from the enum or from its name or value in any writing.

    Raises:
        UserError: another one.
    """
    known = {"nextstep": AutoresetMode.NEXT_STEP, "samestep": AutoresetMode.SAME_STEP}
    word = str(mode.value if isinstance(mode, AutoresetMode) else mode).replace("_", "").lower()
    if word not in known:
        raise UserError(f"autoreset_mode = {mode!r}: use AutoresetMode.NEXT_STEP or AutoresetMode.SAME_STEP")
    return known[word]


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
    for name, (value, bound) in {**least, "context": (context, 2)}.items():  # of two rows, one is no episode's end
        if value is not None and not value >= bound:
            raise UserError(f"{name} = {value}: must be at least {bound}")
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
    """The agent, and the moments that dreams begin from; None while they are to be given."""
    if isinstance(checkpoint, Agent):
        if isinstance(start, str) and start != "observation":
            raise UserError(f"start = {start!r} needs the folder of a run: an Agent has no replay; give it Moments")
        return checkpoint, start if isinstance(start, Moments) else None
    agent, tree = open_agent(checkpoint, device)
    if not isinstance(start, str) or start == "observation":
        return agent, None if isinstance(start, str) else start
    replay = open_replay(checkpoint, tree)
    try:
        if start == "initial":
            return agent, initial_moments(agent, replay, pool)
        return agent, replayed_moments(agent, replay, pool, context or agent.config.replay.length)
    finally:
        replay.close()


# -- observations in pieces -------------------------------------------------------------------------------------------


def _each(obs: Any, rows: np.ndarray, total: int) -> np.ndarray:
    """Observations of some copies as Gymnasium hands them out, one object each; None for the other copies."""
    found = np.full(total, None, object)
    for i in rows:
        found[i] = {key: value[i].copy() for key, value in obs.items()} if isinstance(obs, dict) else obs[i].copy()
    return found


def _overwrite(obs: Any, rows: np.ndarray, new: Any) -> None:
    if isinstance(obs, dict):
        for key, value in obs.items():
            value[rows] = new[key]
    else:
        obs[rows] = new
