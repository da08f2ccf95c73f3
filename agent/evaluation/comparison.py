"""Comparison of a real episode with M's dream of it from the same moment, under the same actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longdream.agent.core.agent import Agent
from longdream.agent.core.device import own_randomness
from longdream.envs.contract import EnvSpec, UserError
from longdream.envs.make import World
from longdream.worldmodel.dream import Starts, imagine
from longdream.worldmodel.objectives.base import Forcing

STEPS = 4
"""Denoising steps of a dream that is shown, if the run's own are fewer. One step gives a mean of what may come, which
looks like a smear."""
PSNR_CAP = 60.0
"""Upper bound of PSNR in dB, for frames that are nearly equal: JSON has no infinity."""


@dataclass
class Comparison:
    """One real episode of T rows and the dream of it. From row `context` on, the dream comes from M alone.

    real, kept, dreamt: per observation key `(T, *shape)` as stored: the real observations; their reconstructions by V;
        the dream, which before row `context` consists of reconstructions, M's context.
    reward, expected: `(T,)`, the real reward of each row, and M's expected reward in the dream.
    alive, going_on: `(T,)`, 0 where the episode terminated and 1 elsewhere, and M's probability of going on.
    surprise: `(T, 3)`, latent, reward and end, each row given all rows before it; None where it was not measured.
    """

    spec: EnvSpec
    context: int
    real: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    dreamt: dict[str, np.ndarray]
    reward: np.ndarray
    expected: np.ndarray
    alive: np.ndarray
    going_on: np.ndarray
    rewarded: bool = True
    """Whether rewards and ends are known."""
    surprise: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.reward)

    def keys(self, image: bool) -> list[str]:
        """The keys of observations that are images, or of those that are not."""
        return [key for key, spec in self.spec.obs.items() if (spec.kind == "image") == image]

    def error(self, key: str, of: str = "dreamt") -> np.ndarray:
        """The error of `dreamt` or `kept` per row, `(T,)`: for images the PSNR in dB (higher is better), for vectors
        the root mean square error, for discrete values and categories the share that differs."""

        def flat(name: str) -> np.ndarray:
            return getattr(self, name)[key].reshape(len(self), -1).astype(np.float64)

        kind = self.spec.obs[key].kind
        if kind in ("discrete", "categories"):
            return (flat("real") != flat(of)).mean(1)
        mse = np.square(flat("real") - flat(of)).mean(1)
        if kind == "image":
            return psnr(mse)
        return np.sqrt(mse)

    def to_json(self) -> dict[str, Any]:
        """Over the dreamt rows: rewards, ends, and the errors of the dream and of V's reconstructions."""
        rows = slice(self.context, None)
        units = {"image": "psnr_db", "vector": "rms", "discrete": "wrong", "categories": "wrong"}
        errors = {}
        for key, spec in self.spec.obs.items():
            curves = {name: _plain(self.error(key, of)[rows]) for name, of in (("dream", "dreamt"), ("v", "kept"))}
            errors[key] = {"unit": units[spec.kind], **curves}
        return {
            "frames": len(self),
            "context": self.context,
            "return": float(self.reward.sum()),
            "errors": errors,
            "reward": {"expected": _plain(self.expected[rows]), "real": _plain(self.reward[rows])},
            "going_on": {"expected": _plain(self.going_on[rows]), "real": _plain(self.alive[rows])},
        }


def steps_to_show(objective: Any, own: int) -> int:
    """Denoising steps per frame of a dream that is shown: at least STEPS where the objective denoises in steps,
    otherwise the run's own."""
    return max(STEPS, own) if isinstance(objective, Forcing) else own


def psnr(mse: np.ndarray) -> np.ndarray:
    """PSNR in dB from mean squared errors of images with values in 0 to 255."""
    return np.minimum(10 * np.log10(255**2 / np.maximum(mse, 1e-9)), PSNR_CAP)


def _plain(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


@torch.no_grad()
def compare(
    agent: Agent,
    world: World,
    context: int = 4,
    frames: int = 400,
    seed: int = 0,
    temperature: float = 1.0,
    steps: int | None = None,
    greedy: bool = True,
) -> Comparison:
    """Play an episode of up to `frames` rows in a world of one copy, and dream it again.

    Args:
        context: frames at the start that M receives; of a shorter episode, all but the last.
        steps: denoising steps per frame; None for the config's forcing.steps. With one step, a dreamt frame of
            continuous latents is the mean of the possible futures; with several it is a sample.
        greedy: whether the agent takes its most probable actions instead of sampling them.

    Raises:
        UserError: there are no frames beside the context.
    """
    if context < 1 or frames <= context:
        raise UserError(f"--context {context}, --frames {frames}: give 1 frame of context or more, and more frames")
    model = agent.model
    carries = []  # after each row of the context
    rows = []
    feats = []
    actions = []
    surprises = []
    expected = [0.0]
    going_on = [1.0]
    with own_randomness(seed, agent.device):
        row = world.reset()
        carry = agent.initial(1)
        while True:
            carry, surprise = agent.observe(carry, row)
            assert surprise is not None
            surprises.append(torch.stack([*surprise], 1))
            rows.append(row)
            feats.append(carry.feat)
            carries += [carry] if len(rows) <= context else []
            if row.terminated[0] or row.truncated[0] or len(rows) == frames:
                break
            carry = agent.acted(carry, agent.act(carry, greedy))
            actions.append(carry.action)
            reward, cont = model.reward_continue.expect(carry.feat, carry.action)
            expected.append(reward.item())
            going_on.append(cont.item())
            row = world.step(carry.action.cpu().numpy())
        context = min(context, len(rows) - 1)
        start = carries[context - 1]
        plan = iter(actions[context - 1 :])
        moment = Starts(start.feat, start.state, torch.ones(1, device=agent.device))
        dream = imagine(model, moment, lambda _: next(plan), len(rows) - context, temperature, steps)

    real = {key: np.concatenate([row.obs[key] for row in rows]) for key in world.spec.obs}
    seen = model.encoder({key: torch.from_numpy(value).to(agent.device) for key, value in real.items()})
    kept = {key: value.cpu().numpy() for key, value in model.encoder.decode(seen, torch.cat(feats)).items()}
    imagined = {key: value.cpu().numpy() for key, value in model.encoder.decode(dream.z[0], dream.feat[0, 1:]).items()}
    dreamt = {key: np.concatenate([kept[key][:context], imagined[key]]) for key in real}
    reward = np.concatenate([row.reward for row in rows])
    terminated = np.concatenate([row.terminated for row in rows])
    return Comparison(
        world.spec,
        context,
        real,
        kept,
        dreamt,
        reward,
        expected=np.array(expected[:context] + dream.reward[0].tolist()),
        alive=1.0 - terminated,
        going_on=np.array(going_on[:context] + dream.cont[0].tolist()),
        surprise=torch.cat(surprises).float().cpu().numpy(),
    )
