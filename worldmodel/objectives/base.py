"""What an objective of M is, and what the diffusion-forcing objectives share.

An objective trains M to predict and samples from it. In diffusion forcing (Chen et al. 2024, arXiv 2407.01392) every
frame of a clip has a noise level of its own: tau = 1 is clean, tau = 0 is pure noise. Two objectives differ in what
noise is (`flow.Flow`, `mask.Mask`). `teacher.Teacher` is plain teacher forcing, the baseline.

`forcing.history` says what a noised frame sees of its past. "noisy" is Po et al.'s single pass over one stream (2025,
arXiv 2505.20171): at least half of a clip is a clean prefix, and the frames after it have independent levels. "clean"
uses two streams in one pass: the clean stream writes the memory, and the query stream, in which every frame is noised,
reads it. Rewards are learned and dreams start at frames that were seen clean.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from longdream.worldmodel import ranks
from longdream.worldmodel.config import ForcingConfig
from longdream.worldmodel.dynamics import Dynamics, Output, State

MIN_PREFIX = 0.5
"""Least share of a clip that its clean prefix takes up, where it has one (Po et al. 2025)."""
PURE_NOISE = 0.3
"""Share of noised frames whose level is exactly 0, where sampling begins."""
MAX_DENOISING_STEPS = 64
"""Denoising steps of the shortest length that `shortcut` distinguishes; a power of 2."""


class Pass(NamedTuple):
    """Result of an objective's training pass over B clips of T frames.

    loss: scalar. Its mean over ranks is the loss over the clips of all (`ranks.total_weight`). metrics: to log.
    feat: `(B, T, F)`. clean: `(B, T)`, the frames whose feature depends on clean frames alone.
    at: `(B, M)`, frames to start dreams from. start_states: the states after them, `(B * M, ...)`, of clean frames.
    end: the state after the clip, of clean frames and without gradient, to continue from in the next clip; only where a
    state was given.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    feat: Tensor
    clean: Tensor
    at: Tensor
    start_states: State
    end: State | None = None


class Objective(Protocol):
    """What M is trained for. An `nn.Module` built as `Class(config, dynamics)`.

    latent: the kind of latents it needs.
    It may also set `trains_encoder = True`: V learns through M. `run` is then given z with V's straight-through
    gradient and, by keyword, `posterior`: `(B, T, N, D)`, the log-probabilities that z was sampled from.
    It may set `capturable = True`: a CUDA graph can capture `sample`, which does the same work at every call and
    moves nothing to the host.
    """

    latent: Literal["continuous", "categorical"]

    def run(
        self,
        dynamics: Dynamics,
        z: Tensor,
        prev_action: Tensor,
        first: Tensor,
        num_starts: int,
        state: State | None = None,
    ) -> Pass:
        """One training pass.

        Args:
            z: `(B, T, N, D)`. prev_action: `(B, T, A)`. first: `(B, T)`, frames that begin an episode.
            num_starts: M, frames per clip whose states are returned.
            state: before frame 0, carried over from the clip before; None: nothing was seen. It is passed by keyword
                and only where it is not None.
        """
        ...

    def sample(
        self,
        dynamics: Dynamics,
        feat: Tensor,
        state: State,
        action: Tensor,
        steps: int,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Draw the next frame's latents `(B, N, D)` after feat `(B, F)`, state and action `(B, A)`."""
        ...

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        """Distance `(B,)` >= 0 of the observed latents z `(B, N, D)` from the predicted ones."""
        ...


RunClip = Callable[[Tensor, Tensor, Tensor | None], Output]
"""Runs M over all frames of a training clip, given their noised latents, levels and encoded step sizes."""


class Forcing(nn.Module):
    """What Flow and Mask share: the training pass and the samplers. Derived classes define what noise is."""

    latent: Literal["continuous", "categorical"]
    capturable = True

    def __init__(self, config: ForcingConfig, dynamics: Dynamics):
        super().__init__()
        self.config = config
        if self.latent == "categorical" and config.shortcut:
            raise ValueError(
                f"forcing.shortcut = {config.shortcut} needs forcing.objective = flow: with another, leave it at 0"
            )

    def pure_noise(self, like: Tensor, temperature: float | Tensor) -> Tensor:
        """Frames at level 0, of the shape of `like`."""
        raise NotImplementedError

    def corrupt(self, z: Tensor, level: Tensor) -> Tensor:
        """z `(..., N, D)` noised to level `(...)`."""
        raise NotImplementedError

    def error(self, pred: Tensor, z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """Loss per frame `(...)`."""
        raise NotImplementedError

    def denoise(self, z: Tensor, pred: Tensor, level: Tensor, to: Tensor, temperature: float | Tensor) -> Tensor:
        """One denoising step: z at `level` `(...)` to the higher level `to`, given M's prediction. At to = 1 the frame
        is clean."""
        raise NotImplementedError

    def sample_step_sizes(self, level: Tensor) -> tuple[Tensor, Tensor | None]:
        """Levels to train at, and the number of denoising steps of equal length that each frame is to be denoised in;
        None: M is not conditioned on step sizes."""
        return level, None

    def step_size(self, steps: Tensor | None) -> Tensor | None:
        """The step size of so many equal steps, encoded for M: 0 for one step, 1 for MAX_DENOISING_STEPS."""
        return None

    def shortcut_target(self, run_clip: RunClip, z: Tensor, noisy: Tensor, level: Tensor, steps: Tensor) -> Tensor:
        """The latents `(B, T, N, D)` that M is to predict where it is conditioned on step sizes."""
        raise NotImplementedError

    def run(
        self,
        dynamics: Dynamics,
        z: Tensor,
        prev_action: Tensor,
        first: Tensor,
        num_starts: int,
        state: State | None = None,
    ) -> Pass:
        """See `Objective.run`."""
        batch, frames = z.shape[:2]
        carried = state is not None
        before = dynamics.initial(batch, z.device) if state is None else state
        ones = torch.ones(batch, frames, device=z.device)
        level = torch.rand_like(ones) * (torch.rand_like(ones) >= PURE_NOISE)
        level, steps = self.sample_step_sizes(level)
        if self.config.history == "clean":
            at = torch.randint(0, frames, (batch, num_starts), device=z.device)
            noisy = self.corrupt(z, level)
            clean = ones.bool()

            def run_clip(noisy: Tensor, level: Tensor, step_size: Tensor | None, at: Tensor | None = None) -> Output:
                return dynamics(z, prev_action, ones, first, before, (noisy, level), at, step_size)
        else:
            prefix = self.prefixes(batch, frames, dynamics.config.chunk_frames, num_starts, z.device)
            clean = torch.arange(frames, device=z.device) < prefix
            level = torch.where(clean, 1.0, level)
            at = (torch.rand(batch, num_starts, device=z.device) * prefix).long()
            noisy = torch.where(clean[..., None, None], z, self.corrupt(z, level))
            steps = None if steps is None else torch.where(clean, MAX_DENOISING_STEPS, steps)

            def run_clip(noisy: Tensor, level: Tensor, step_size: Tensor | None, at: Tensor | None = None) -> Output:
                return dynamics(noisy, prev_action, level, first, before, None, at, step_size)

        noised = ones if self.config.history == "clean" else (~clean).float()
        out = run_clip(noisy, level, self.step_size(steps), at)
        target = z if steps is None else self.shortcut_target(run_clip, z, noisy, level, steps)
        error = self.error(out.pred, target, noisy, level)
        loss = (error * noised).sum() / ranks.total_weight(noised)
        assert out.states_at is not None
        end = None
        if carried and self.config.history == "clean":
            end = out.state
        elif carried:  # the pass has seen noised frames, and a state that is carried on has to be clean
            with torch.no_grad():
                end = dynamics(z, prev_action, ones, first, before).state
        return Pass(loss, {"prediction": loss.detach()}, out.feat, clean, at, out.states_at, end)

    def prefixes(self, batch: int, frames: int, chunk_frames: int, num_starts: int, device: torch.device) -> Tensor:
        """How many frames of each clip are its clean prefix, `(B, 1)`: whole chunks of frames.

        Raises:
            ValueError: dreams are to start in clips that may have no prefix.
        """
        config = self.config
        if config.prefix < 1 and num_starts:
            raise ValueError(
                f"forcing.prefix = {config.prefix}: dreams begin at clean frames, of which some clips have none then; "
                f"set it to 1"
            )
        prefix = torch.randint(int(frames * MIN_PREFIX), frames, (batch, 1), device=device)
        if config.prefix < 1:
            prefix = prefix * (torch.rand(batch, 1, device=device) < config.prefix)
        return prefix // chunk_frames * chunk_frames

    def sample(
        self,
        dynamics: Dynamics,
        feat: Tensor,
        state: State,
        action: Tensor,
        steps: int,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """See `Objective.sample`."""
        z = self.pure_noise(action.new_empty(action.shape[0], dynamics.tokens, dynamics.channels), temperature)
        step_size = self.step_size(torch.full_like(action[:, 0], steps))
        for i in range(steps):
            level = torch.full_like(action[:, 0], i / steps)
            to = torch.full_like(action[:, 0], (i + 1) / steps)
            z = self.denoise(z, dynamics.predict(state, z, action, level, step_size), level, to, temperature)
        return z

    def sample_clip(
        self, dynamics: Dynamics, state: State, action: Tensor, matrix: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Denoise T frames `(B, T, N, D)` together under given actions `(B, T, A)`, of which action t leads to frame t.

        Args:
            matrix: `(rows, T)` from `schedule`, steps left per frame; from row to row is one pass over the clip.
        """
        total = int(matrix.max())
        z = self.pure_noise(action.new_empty(*action.shape[:2], dynamics.tokens, dynamics.channels), temperature)
        first = torch.zeros(action.shape[:2], dtype=torch.bool, device=action.device)
        levels = (1 - matrix.to(action) / total)[:, None].expand(-1, action.shape[0], -1)
        steps = torch.full_like(levels[0], total)
        for level, to in pairwise(levels):
            step_size = self.step_size(torch.where(level < 1, steps, MAX_DENOISING_STEPS))
            pred = dynamics(z, action, level, first, state, None, None, step_size).pred
            z = self.denoise(z, pred, level, to, temperature)
        return z


def schedule(frames: int, steps: int, slope: float) -> Tensor:
    """Scheduling matrix `(rows, frames)`: denoising steps left for each frame, row by row (arXiv 2407.01392, section
    3).

    K[m, t] = clip(S + floor(t u) - m, 0, S) for S steps and slope u. u = 0 denoises all frames together and u = S one
    after another; values in between make a pyramid.

    Raises:
        ValueError: no step, or a negative slope.
    """
    if steps < 1 or slope < 0:
        raise ValueError(f"schedule: steps = {steps} must be at least 1 and slope = {slope} at least 0")
    delay = (torch.arange(frames) * slope).floor().long()
    rows = torch.arange(int(delay[-1]) + steps + 1)
    return (steps + delay - rows[:, None]).clamp(0, steps)
