"""What an agent sees, expects, imagines and would do at one moment, as values: nothing is kept here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from longdream.agent.core.actor import Carry
from longdream.agent.core.agent import Agent
from longdream.agent.core.cuda_graphs import Graphed
from longdream.agent.core.device import autocast, own_randomness
from longdream.agent.dream_env.starts import Moments
from longdream.agent.evaluation.comparison import steps_to_show
from longdream.agent.evaluation.probes import MazeProbe, Reading, pose_of
from longdream.agent.play.frames import encode
from longdream.controller.distributions import Categoricals
from longdream.controller.types import Judging
from longdream.envs.contract import Row, UserError

Memory = Literal["scan", "attention", "both"]
Dreamt = tuple[Carry, dict[str, Tensor], Tensor, Tensor]
"""A carry, the observation `(1, ...)` that V decodes, and the reward and the probability of an end, `(1,)`."""


@dataclass(frozen=True)
class Judgement:
    """What C says at a moment: the expected return, and the probabilities of each factor's classes; None and empty
    where this kind of C tells nothing, and of a box the mean of each number."""

    value: float | None = None
    probs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Expected:
    """M's prediction of a row before it came: its picture, the reward, and the probability of an end."""

    picture: bytes
    reward: float
    end: float


class Mind:
    """V, M and C of an agent for one stream. A `Carry` holds all that it knows; seeds make what is drawn repeatable.

    agent: only read, so that several streams share it. probe: of its memory of mazes. graphed: whether dreamt steps and
    judgements are CUDA graphs; of one stream, a GPU otherwise waits for the launches of some hundred small kernels.
    """

    def __init__(self, agent: Agent, probe: MazeProbe | None = None, graphed: bool = False) -> None:
        self.agent = agent
        self.graphed = graphed
        self.dreams: dict[int, Callable[[Carry, Tensor], Dreamt]] = {}
        """A dreamt step, by its number of denoising steps."""
        self.opinion = self._graphed(self._opinion)
        self.probe = probe
        self.config = agent.config
        self.steps = steps_to_show(agent.model.objective, agent.config.forcing.steps)
        """Denoising steps at first."""
        state = self.empty().state
        self.memories = frozenset(name for name, part in (("scan", state.mixers), ("attention", state.k)) if part)
        """The parts of M's memory that there are."""

    def empty(self) -> Carry:
        """Nothing was seen yet."""
        return self.agent.initial(1)

    def see(self, carry: Carry, row: Row) -> tuple[Carry, tuple[float, float, float]]:
        """Take in a row of one copy: the carry after it, and its surprise (latent, reward, end)."""
        after, surprise = self.agent.observe(carry, row)
        assert surprise is not None
        latent, reward, end = torch.stack([part[0].float() for part in surprise]).tolist()
        return after, (latent, reward, end)

    def _graphed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of tensors; as a CUDA graph, its outputs are copies, since a graph overwrites its own."""
        if not self.graphed:
            return torch.no_grad()(function)
        graph = Graphed(function)
        return lambda *args: pytree.tree_map(torch.clone, graph(*args))

    def imagine(self, carry: Carry, temperature: float, steps: int, seed: int) -> tuple[Carry, Expected]:
        """Dream the frame after `carry.action`: the carry after it, and what was expected.

        Args:
            steps: denoising steps. seed: of what is drawn.
        """
        level = torch.tensor(temperature, device=self.agent.device)
        if steps not in self.dreams:
            self.dreams[steps] = self._graphed(partial(self._dream, steps))
            if self.graphed:  # once for the capture, which draws as well
                with own_randomness(seed, self.agent.device):
                    self.dreams[steps](carry, level)
        with own_randomness(seed, self.agent.device):
            after, decoded, reward, end = self.dreams[steps](carry, level)
        shown = encode({key: value.cpu().numpy() for key, value in decoded.items()})
        return after, Expected(shown, reward.item(), end.item())

    def _dream(self, steps: int, carry: Carry, temperature: Tensor) -> Dreamt:
        model = self.agent.model
        with autocast(self.config.precision, self.agent.device):
            reward, cont = model.reward_continue.expect(carry.feat, carry.action)
            z, feat, state = model.dream_step(carry.feat, carry.state, carry.action, temperature, steps)
            decoded = model.encoder.decode(z, feat)
        return Carry(feat, state, carry.action), decoded, reward, 1 - cont

    def judge(self, carry: Carry) -> Judgement:
        """What C says at this moment."""
        if not isinstance(self.agent.controller, Judging):
            return Judgement()
        value, parts = self.opinion(carry.feat)
        return Judgement(value.item(), tuple(tuple(part.tolist()) for part in parts))

    def _opinion(self, feat: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        controller = self.agent.controller
        assert isinstance(controller, Judging)
        with autocast(self.config.precision, self.agent.device):
            value = controller.value(feat)[0]
            policy = controller.policy(feat)
        if isinstance(policy, Categoricals):
            return value, tuple(part[0] for part in policy.probs)
        return value, (policy.mode()[0],)

    def read(self, carry: Carry, truth: dict[str, np.ndarray]) -> Reading | None:
        """The map of a maze as the probe reads it out of M's memory, which is told only where the agent is.

        Args:
            truth: probes of Memory Maze. Without them, or where the maze has another size: None.
        """
        if self.probe is None or "maze_layout" not in truth or len(truth["maze_layout"]) != self.probe.size:
            return None
        pose = pose_of(truth["maze_layout"], truth["agent_pos"], truth["agent_dir"])
        return self.probe.read(carry.feat[0].float().cpu(), torch.from_numpy(pose))

    def choose(self, carry: Carry, greedy: bool, seed: int) -> np.ndarray:
        """C's encoded action `(1, A)`."""
        with own_randomness(seed, self.agent.device):
            return self.agent.act(carry, greedy)

    def acted(self, carry: Carry, action: np.ndarray) -> Carry:
        """The carry once `action` `(1, A)` is taken."""
        return self.agent.acted(carry, action)

    def forget(self, carry: Carry, what: Memory) -> Carry:
        """The carry with M's scans erased, its attention, or both. C sees it from the next frame on.

        Raises:
            UserError: M has no such memory.
        """
        missing = ({"scan", "attention"} if what == "both" else {what}) - self.memories
        if missing:
            raise UserError(f"this M has no {' and no '.join(sorted(missing))} that could be erased")
        state = carry.state
        if what in ("scan", "both"):
            state = state.without_long_memory()
        if what in ("attention", "both"):
            state = state.without_short_memory()
        return carry._replace(state=state)

    @torch.no_grad()
    def wake(self, moments: Moments, i: int) -> tuple[Carry, bytes]:
        """A moment to dream on from, and its picture."""
        one = moments.take(torch.tensor([i % len(moments.z)], device=self.agent.device))
        decoded = self.agent.model.encoder.decode(one.z, one.feat)
        action = torch.zeros(1, self.agent.spec.action.size, device=self.agent.device)
        return Carry(one.feat, one.state, action), encode({key: v.cpu().numpy() for key, v in decoded.items()})

    def in_row(self, obs: dict[str, np.ndarray]) -> Row:
        """An observation `(1, ...)` as the first row of an episode."""
        no = np.zeros(1, np.bool_)
        return Row(obs, ~no, np.zeros(1, np.float32), no, no)
