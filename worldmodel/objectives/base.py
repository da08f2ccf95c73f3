"""How M is trained to predict, and how it is sampled: objectives behind one interface.

* `Flow`: diffusion forcing (Chen et al. 2024, arXiv 2407.01392) in flow form on continuous latents: z_tau = (1 - tau)
  noise + tau z, the network predicts z (x-prediction, x-loss; Hafner et al. 2025, arXiv 2509.24527).
* `Mask`: the same idea on categorical latents, where noise is absorbing: a variable is hidden with probability 1 - tau.
* `Teacher`: plain teacher-forced prediction of categorical latents from the last feature and action. The yardstick.

`stream` says what a noised frame sees of its past. "one" is the paper's: a single pass, in which a row has a clean
prefix longer than half of the clip and independent levels after it. "two" gives every frame both roles in one pass: a
clean stream writes the memory, and a query stream, every frame of it noised, reads it. Reward heads and dream starts
may use clean frames only.

With `shortcut`, M is told how long a denoising step is, and learns from itself to take long ones (Frans et al. 2024,
arXiv 2410.12557; in x-space as in arXiv 2509.24527): one step shall lead where two of half its length lead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel.dynamics import Dynamics, Output, State
from longdream.worldmodel.heads import draw, mlp


@dataclass(frozen=True)
class ForcingConfig:
    """The objective of M and its sampler."""

    objective: str = "flow"
    """flow, mask, teacher, or a dotted path `package.module:Class` to an Objective of your own."""
    stream: Literal["one", "two"] = "two"
    """What noised frames see of their past; see worldmodel/objectives/base.py."""
    steps: int = 1
    """Denoising steps per dreamt frame."""
    ramp: bool = True
    """Weight the loss by 0.9 tau + 0.1 rather than evenly (flow)."""
    blank: float = 0.3
    """Share of noised frames whose level is exactly 0: where sampling begins."""
    prefix: float = 1.0
    """Share of clips that begin with clean frames (stream one; 0.5 in Po et al. 2025). Dreams begin in these: an agent
    needs 1."""
    prefix_least: float = 0.5
    """Least share of such a clip that is clean."""
    predict: Literal["x", "v"] = "x"
    """What M predicts (flow): x, the clean latents; v, the way to them from the noise, with an even loss on that."""
    shortcut: float = 0.0
    """Share of noised frames that learn to be denoised in few, long steps (flow); costs two more passes of M."""
    finest: int = 64
    """Denoising steps that count as infinitely many with `shortcut`; a power of 2."""
    context_level: float = 1.0
    """Level that a finished frame is given when a clip is generated on from it: 1, clean, or a little less, so that its
    small errors are taken for noise."""


class Pass(NamedTuple):
    """What an objective hands on of a training pass over B clips of T frames.

    loss: scalar. metrics: to log. feat: `(B, T, F)`; clean: `(B, T)`, which of them saw clean frames only.
    at: `(B, M)` frames and starts: the states after them, `(B * M, ...)`, of clean frames only. end: where a state was
    given, the one after the clip, without gradient, of clean frames only, to go on with in the next.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    feat: Tensor
    clean: Tensor
    at: Tensor
    starts: State
    end: State | None = None


class Objective(Protocol):
    """What M is trained for. An `nn.Module` built as `Class(config, dynamics)`.

    latent: the kind of latents it needs.
    It may also say `capturable = True`: `sample` can be recorded in a CUDA graph (the same work at every call, nothing
    moved to the host).
    """

    latent: Literal["continuous", "categorical"]

    def run(
        self,
        dynamics: Dynamics,
        z: Tensor,
        prev_action: Tensor,
        first: Tensor,
        starts: int,
        weight: Tensor | None = None,
        state: State | None = None,
    ) -> Pass:
        """One training pass: z `(B, T, N, D)`, prev_action `(B, T, A)`, first `(B, T)`; M = starts states per row
        come back, of frames drawn in proportion to weight `(B, T)` > 0 (None: evenly). state: before frame 0, carried
        from the clip before (None: nothing was seen). The last two are passed only where they are not None."""
        ...

    def sample(
        self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, steps: int, temperature: float = 1.0
    ) -> Tensor:
        """Draw the next frame's latents `(B, N, D)` after feat `(B, F)`, state and action `(B, A)`."""
        ...

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        """How far what came, z `(B, N, D)`, lies from what was expected: `(B,)` >= 0."""
        ...


Ask = Callable[[Tensor, Tensor, Tensor | None], Output]
"""Asks M for all frames of a training clip, given their noised latents, levels and fineness."""


class Forcing(nn.Module):
    """What Flow and Mask share: the training pass and the samplers. They differ in what noise is."""

    latent: Literal["continuous", "categorical"]
    capturable = True

    def __init__(self, config: ForcingConfig, dynamics: Dynamics):
        super().__init__()
        self.config = config
        if self.latent == "categorical" and (config.shortcut or config.predict != "x"):
            raise ValueError(
                f"forcing.shortcut = {config.shortcut} and forcing.predict = {config.predict} need forcing.objective = "
                f"flow: with another, leave them at 0 and x"
            )

    def blank(self, like: Tensor, temperature: float) -> Tensor:
        """A frame at level 0, shaped as `like`."""
        raise NotImplementedError

    def corrupt(self, z: Tensor, level: Tensor) -> Tensor:
        """z `(..., N, D)` noised to level `(...)`."""
        raise NotImplementedError

    def error(self, pred: Tensor, z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """Loss per frame `(...)`."""
        raise NotImplementedError

    def advance(self, z: Tensor, pred: Tensor, level: Tensor, to: Tensor, temperature: float) -> Tensor:
        """From z at `level` `(...)` to the higher level `to`, given M's prediction for it. At to = 1 the frame is
        clean."""
        raise NotImplementedError

    def pace(self, level: Tensor) -> tuple[Tensor, Tensor | None]:
        """Levels to train on, and in how many steps frames are to be denoised from noise; None: M is not told."""
        return level, None

    def fineness(self, steps: Tensor | None) -> Tensor | None:
        """What M is told of a number of steps: 0 one step, 1 the finest."""
        return None

    def landing(self, ask: Ask, z: Tensor, noisy: Tensor, level: Tensor, steps: Tensor) -> Tensor:
        """What M shall predict, `(B, T, N, D)`, where steps are told."""
        raise NotImplementedError

    def run(
        self,
        dynamics: Dynamics,
        z: Tensor,
        prev_action: Tensor,
        first: Tensor,
        starts: int,
        weight: Tensor | None = None,
        state: State | None = None,
    ) -> Pass:
        batch, frames = z.shape[:2]
        carried, state = state is not None, dynamics.initial(batch, z.device) if state is None else state
        ones = torch.ones(batch, frames, device=z.device)
        level = torch.rand_like(ones) * (torch.rand_like(ones) >= self.config.blank)
        level, steps = self.pace(level)
        if self.config.stream == "two":
            at = (
                torch.randint(0, frames, (batch, starts), device=z.device)
                if weight is None
                else draw_frames(weight, starts)
            )
            noisy = self.corrupt(z, level)
            clean, noised = ones.bool(), ones

            def ask(noisy: Tensor, level: Tensor, fineness: Tensor | None, at: Tensor | None = None) -> Output:
                return dynamics(z, prev_action, ones, first, state, (noisy, level), at, fineness)
        else:
            prefix = self.prefixes(batch, frames, dynamics.config.frames_together, starts, z.device)
            clean = torch.arange(frames, device=z.device) < prefix
            level = torch.where(clean, 1.0, level)
            even = (torch.rand(batch, starts, device=z.device) * prefix).long()
            at = even if weight is None else draw_frames(weight * clean, starts)
            noisy = torch.where(clean[..., None, None], z, self.corrupt(z, level))
            noised = (~clean).float()
            steps = None if steps is None else torch.where(clean, self.config.finest, steps)

            def ask(noisy: Tensor, level: Tensor, fineness: Tensor | None, at: Tensor | None = None) -> Output:
                return dynamics(noisy, prev_action, level, first, state, None, at, fineness)

        out = ask(noisy, level, self.fineness(steps), at)
        target = z if steps is None else self.landing(ask, z, noisy, level, steps)
        error = self.error(out.pred, target, noisy, level)
        loss = (error * noised).sum() / noised.sum()
        assert out.at is not None
        end = None
        if carried:  # in stream one it has seen noised frames, and what is carried has to be clean
            with torch.no_grad():
                end = out.state if self.config.stream == "two" else dynamics(z, prev_action, ones, first, state).state
        return Pass(loss, {"prediction": loss.detach()}, out.feat, clean, at, out.at, end)

    def prefixes(self, batch: int, frames: int, chunk: int, starts: int, device: torch.device) -> Tensor:
        """How many frames of each clip are clean, `(B, 1)`: whole chunks of them."""
        config = self.config
        if config.prefix < 1 and starts:
            raise ValueError(
                f"forcing.prefix = {config.prefix}: dreams begin at clean frames, of which some clips have none then; "
                f"set it to 1"
            )
        prefix = torch.randint(int(frames * config.prefix_least), frames, (batch, 1), device=device)
        if config.prefix < 1:
            prefix = prefix * (torch.rand(batch, 1, device=device) < config.prefix)
        return prefix // chunk * chunk

    def sample(
        self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, steps: int, temperature: float = 1.0
    ) -> Tensor:
        z = self.blank(action.new_empty(len(action), dynamics.tokens, dynamics.channels), temperature)
        fineness = self.fineness(torch.full_like(action[:, 0], steps))
        for i in range(steps):
            level, to = (torch.full_like(action[:, 0], j / steps) for j in (i, i + 1))
            z = self.advance(z, dynamics.predict(state, z, action, level, fineness), level, to, temperature)
        return z

    def sample_clip(
        self, dynamics: Dynamics, state: State, action: Tensor, matrix: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Denoise T frames `(B, T, N, D)` together under given actions `(B, T, A)`, action t leading to frame t.

        matrix: `(rows, T)` steps left per frame, row by row, from `schedule`; every level of a row is one pass over
            the clip.
        """
        total = int(matrix.max())
        z = self.blank(action.new_empty(*action.shape[:2], dynamics.tokens, dynamics.channels), temperature)
        first = torch.zeros(action.shape[:2], dtype=torch.bool, device=action.device)
        levels = (1 - matrix.to(action) / total)[:, None].expand(-1, len(action), -1)
        steps = torch.full_like(levels[0], total)
        for level, to in pairwise(levels):
            fineness = self.fineness(torch.where(level < 1, steps, self.config.finest))
            pred = dynamics(z, action, level, first, state, None, None, fineness).pred
            z = self.advance(z, pred, level, to, temperature)
        return z


class Flow(Forcing):
    """Gaussian flow forcing on continuous latents."""

    latent = "continuous"

    def __init__(self, config: ForcingConfig, dynamics: Dynamics):
        super().__init__(config, dynamics)
        self.exponent = int(math.log2(config.finest))
        if 2**self.exponent != config.finest:
            raise ValueError(f"forcing.finest = {config.finest} is no power of 2: use {2**self.exponent}")
        if config.shortcut or config.predict == "v":
            dynamics.heed_noise(paces=config.shortcut > 0)

    def blank(self, like: Tensor, temperature: float) -> Tensor:
        return torch.randn_like(like) * temperature

    def corrupt(self, z: Tensor, level: Tensor) -> Tensor:
        level = level[..., None, None]
        return (1 - level) * torch.randn_like(z) + level * z

    def error(self, pred: Tensor, z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        if self.config.predict == "v":
            return (pred - velocity(z, noisy, level)).square().mean((-2, -1))
        error = (pred - z).square().mean((-2, -1))
        return error * (0.9 * level + 0.1) if self.config.ramp else error

    def clean(self, pred: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """The clean latents that a prediction stands for."""
        return pred if self.config.predict == "x" else noisy + (1 - level)[..., None, None] * pred

    def advance(self, z: Tensor, pred: Tensor, level: Tensor, to: Tensor, temperature: float) -> Tensor:
        pred = self.clean(pred, z, level).clamp(-1, 1)
        share = ((to - level) / (1 - level).clamp(min=1e-6)).clamp(0, 1)[..., None, None]
        return z + share * (pred - z)  # an Euler step along v = (z_hat - z) / (1 - tau)

    def pace(self, level: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.config.shortcut:
            return level, None
        coarse = torch.rand_like(level) < self.config.shortcut
        steps = 2.0 ** torch.randint_like(level, self.exponent)
        begun = (torch.rand_like(level) * steps).floor() / steps  # where a step of that length begins
        return torch.where(coarse, begun, level), torch.where(coarse, steps, self.config.finest)

    def fineness(self, steps: Tensor | None) -> Tensor | None:
        if steps is None or not self.config.shortcut:
            return None
        return (steps.log2() / self.exponent).clamp(max=1)

    @torch.no_grad()
    def landing(self, ask: Ask, z: Tensor, noisy: Tensor, level: Tensor, steps: Tensor) -> Tensor:
        """The clean latents; where steps are long, those towards which the mean of two half-steps points."""
        coarse = steps < self.config.finest
        half, fineness = torch.where(coarse, 0.5 / steps, 0.0), self.fineness(2 * steps)
        ways, here, now = [], noisy, level
        for _ in range(2):
            way = velocity(self.clean(ask(here, now, fineness).pred, here, now), here, now)
            here, now = here + half[..., None, None] * way, now + half
            ways.append(way)
        towards = noisy + (1 - level)[..., None, None] * (ways[0] + ways[1]) / 2
        return torch.where(coarse[..., None, None], towards, z)

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        level, noise = torch.zeros_like(action[:, 0]), torch.zeros_like(z)
        expected = self.clean(dynamics.predict(state, noise, action, level), noise, level)
        return (expected - z).square().mean((-2, -1))


class Mask(Forcing):
    """Absorbing-mask forcing on categorical latents: a hidden variable is all zeros where its one-hot would be."""

    latent = "categorical"

    def __init__(self, config: ForcingConfig, dynamics: Dynamics, classes: int):
        super().__init__(config, dynamics)
        self.classes = classes

    def blank(self, like: Tensor, temperature: float) -> Tensor:
        return torch.zeros_like(like)

    def corrupt(self, z: Tensor, level: Tensor) -> Tensor:
        z = z.unflatten(-1, (-1, self.classes))
        seen = torch.rand(z.shape[:-1], device=z.device) < level[..., None, None]
        return (z * seen[..., None]).flatten(-2)

    def error(self, pred: Tensor, z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        hidden = noisy.unflatten(-1, (-1, self.classes)).sum(-1) < 0.5
        nats = categorical_nats(pred, z, self.classes)
        return (nats * hidden).sum((-2, -1)) / hidden.sum((-2, -1)).clamp(min=1)

    def advance(self, z: Tensor, pred: Tensor, level: Tensor, to: Tensor, temperature: float) -> Tensor:
        drawn = draw_categorical(pred, self.classes, temperature)
        known = z.unflatten(-1, (-1, self.classes))
        hidden = known.sum(-1, keepdim=True) < 0.5
        share = ((to - level) / (1 - level).clamp(min=1e-6))[..., None, None, None]  # of what is still hidden
        shown = hidden & (torch.rand_like(known[..., :1]) < share)
        return torch.where(shown, drawn.unflatten(-1, (-1, self.classes)), known).flatten(-2)

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        level = torch.zeros_like(action[:, 0])
        pred = dynamics.predict(state, torch.zeros_like(z), action, level)
        return categorical_nats(pred, z, self.classes).mean((-2, -1))


class Teacher(nn.Module):
    """Teacher-forced prediction: a head on (feat_t, a_t) gives all variables of frame t + 1 at once."""

    latent: Literal["continuous", "categorical"] = "categorical"
    capturable = True

    def __init__(self, config: ForcingConfig, dynamics: Dynamics, classes: int, actions: int):
        super().__init__()
        self.classes = classes
        self.head = mlp(
            dynamics.feature_size + actions, 2 * dynamics.config.width, dynamics.tokens * dynamics.channels, layers=1
        )

    def _logits(self, feat: Tensor, action: Tensor, like: Tensor) -> Tensor:
        return self.head(torch.cat([feat, action], -1)).view_as(like)

    def run(
        self,
        dynamics: Dynamics,
        z: Tensor,
        prev_action: Tensor,
        first: Tensor,
        starts: int,
        weight: Tensor | None = None,
        state: State | None = None,
    ) -> Pass:
        batch, frames = z.shape[:2]
        ones = torch.ones(batch, frames, device=z.device)
        at = (
            torch.randint(0, frames, (batch, starts), device=z.device)
            if weight is None
            else draw_frames(weight, starts)
        )
        carried, state = state is not None, dynamics.initial(batch, z.device) if state is None else state
        out = dynamics(z, prev_action, ones, first, state, None, at)
        # at the start of an episode there is nothing to predict from
        before = torch.cat([torch.zeros_like(out.feat[:, :1]), out.feat[:, :-1]], 1) * ~first[..., None]
        pred = self._logits(before, prev_action * ~first[..., None], z)
        loss = categorical_nats(pred, z, self.classes).mean()
        assert out.at is not None
        end = out.state if carried else None
        return Pass(loss, {"prediction": loss.detach()}, out.feat, ones.bool(), at, out.at, end)

    def sample(
        self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, steps: int, temperature: float = 1.0
    ) -> Tensor:
        like = feat.new_empty(len(feat), dynamics.tokens, dynamics.channels)
        return draw_categorical(self._logits(feat, action, like), self.classes, temperature)

    def surprise(self, dynamics: Dynamics, feat: Tensor, state: State, action: Tensor, z: Tensor) -> Tensor:
        return categorical_nats(self._logits(feat, action, z), z, self.classes).mean((-2, -1))


def velocity(z: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
    """z - noise, the way from noise to clean latents z, of a frame that is at `level` `(...)` on it, `(..., N, D)`."""
    return (z - noisy) / (1 - level).clamp(min=1e-6)[..., None, None]


def draw_frames(weight: Tensor, count: int) -> Tensor:
    """`(B, count)` frames of each row, drawn in proportion to weight `(B, T)`."""
    ends = weight.double().cumsum(1)
    level = torch.rand(len(weight), count, device=weight.device) * ends[:, -1:]
    return torch.searchsorted(ends, level, right=True)


def schedule(frames: int, steps: int, slope: float) -> Tensor:
    """Denoising schedule `(rows, frames)`: steps left for each frame, row by row (arXiv 2407.01392, section 3; DFoT).

    K[m, t] = clip(S + floor(t u) - m, 0, S). Slope u = 0 denoises all frames together, u = S one after another, u
    between them is a pyramid.
    """
    if steps < 1 or slope < 0:
        raise ValueError(f"schedule: steps = {steps} must be at least 1 and slope = {slope} at least 0")
    delay = (torch.arange(frames) * slope).floor().long()
    rows = torch.arange(int(delay[-1]) + steps + 1)
    return (steps + delay - rows[:, None]).clamp(0, steps)


def categorical_nats(logits: Tensor, z: Tensor, classes: int) -> Tensor:
    """-log p of one-hots z `(..., D)` under logits `(..., D)`, per variable: `(..., D / classes)`."""
    logits, z = logits.unflatten(-1, (-1, classes)), z.unflatten(-1, (-1, classes))
    return -(logits.log_softmax(-1) * z).sum(-1)


def draw_categorical(logits: Tensor, classes: int, temperature: float) -> Tensor:
    """One-hots `(..., D)` drawn from logits `(..., D)`."""
    probs = (logits.unflatten(-1, (-1, classes)) / temperature).softmax(-1)
    return F.one_hot(draw(probs), classes).to(logits.dtype).flatten(-2)
