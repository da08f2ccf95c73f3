"""Dream against reality, measured: what really happened, and what M dreams from the same moment and actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longdream.agent.core.agent import Agent
from longdream.agent.core.learner import own_randomness
from longdream.envs.contract import EnvSpec, UserError
from longdream.envs.make import World
from longdream.worldmodel.dream import Starts, imagine

PSNR_CAP = 60.0
"""dB given to frames that are equal, or nearly: JSON has no infinity."""


@dataclass
class Comparison:
    """One real episode of T rows and the dream of it; from row `context` on, all that is dreamt comes from M alone.

    real, kept, dreamt: per observation key `(T, *shape)` as stored: what was seen; the same after passing through V and
        back; the dream (before `context` that is kept, all that M was given).
    reward, expected: `(T,)`, what arrived with each row, and what M expected, given its state in the dream.
    alive, going_on: `(T,)`, 0 where the episode terminated, else 1, and M's probability of that.
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
    """Whether rewards and ends mean anything."""

    def __len__(self) -> int:
        return len(self.reward)

    def keys(self, image: bool) -> list[str]:
        """The observations that are images, or those that are not."""
        return [key for key, spec in self.spec.obs.items() if (spec.kind == "image") == image]

    def error(self, key: str, of: str = "dreamt") -> np.ndarray:
        """`(T,)`, how far `dreamt` or `kept` is from reality: for images the PSNR in dB (more is nearer), for vectors
        the root mean square, for discrete values 1 where wrong."""
        real, other = (getattr(self, name)[key].reshape(len(self), -1).astype(np.float64) for name in ("real", of))
        kind, square = self.spec.obs[key].kind, np.square(real - other).mean(1)
        if kind == "image":
            return psnr(square)
        return np.sqrt(square) if kind == "vector" else (square > 0).astype(np.float64)

    def to_json(self) -> dict[str, Any]:
        """Over the dreamt rows: rewards, ends, and the errors of the dream beside those that V alone makes."""
        rows = slice(self.context, None)
        units = {"image": "psnr_db", "vector": "rms", "discrete": "wrong"}
        errors = {}
        for key, spec in self.spec.obs.items():
            found = {name: _plain(self.error(key, of)[rows]) for name, of in (("dream", "dreamt"), ("v", "kept"))}
            errors[key] = {"unit": units[spec.kind], **found}
        return {
            "frames": len(self),
            "context": self.context,
            "return": float(self.reward.sum()),
            "errors": errors,
            "reward": {"expected": _plain(self.expected[rows]), "real": _plain(self.reward[rows])},
            "going_on": {"expected": _plain(self.going_on[rows]), "real": _plain(self.alive[rows])},
        }


def psnr(square: np.ndarray) -> np.ndarray:
    """Mean squared errors of images, 0 to 255, in dB."""
    return np.minimum(10 * np.log10(255**2 / np.maximum(square, 1e-9)), PSNR_CAP)


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
) -> Comparison:
    """Play a greedy episode in a world of one copy, up to `frames` rows, and dream it again.

    Args:
        context: frames at the beginning that M is shown.
        steps: denoising steps per frame; None for the config's forcing.steps. With one step a dreamt frame of
            continuous latents is the mean of what may come, with several it is a sample.

    Raises:
        UserError: the episode is over before there is anything to dream.
    """
    if context < 1 or frames <= context:
        raise UserError(f"--context {context}, --frames {frames}: give 1 frame of context or more, and more frames")
    model, start = agent.model, None
    rows, actions, expected, going_on = [], [], [0.0], [1.0]
    with own_randomness(seed, agent.device):
        row, carry = world.reset(), agent.initial(1)
        while True:
            carry, _ = agent.observe(carry, row, measure=False)
            rows.append(row)
            start = carry if len(rows) == context else start
            if row.terminated[0] or row.truncated[0] or len(rows) == frames:
                break
            carry = agent.acted(carry, agent.act(carry, greedy=True))
            actions.append(carry.action)
            reward, cont = model.consequence.expect(carry.feat, carry.action)
            expected.append(reward.item())
            going_on.append(cont.item())
            row = world.step(carry.action.cpu().numpy())
        if start is None or len(rows) == context:
            raise UserError(
                f"the episode was over after {len(rows)} frames, --context {context} leaves nothing to dream: use less"
            )
        plan = iter(actions[context - 1 :])
        moment = Starts(start.feat, start.state, torch.ones(1, device=agent.device))
        dream = imagine(model, moment, lambda _: next(plan), len(rows) - context, temperature, steps)

    real = {key: np.concatenate([row.obs[key] for row in rows]) for key in world.spec.obs}
    seen = model.encoder({key: torch.from_numpy(value).to(agent.device) for key, value in real.items()})
    kept, imagined = (
        {key: value.cpu().numpy() for key, value in model.encoder.decode(z).items()} for z in (seen, dream.z[0])
    )
    dreamt = {key: np.concatenate([kept[key][:context], imagined[key]]) for key in real}
    reward, ended = (np.concatenate([getattr(row, name) for row in rows]) for name in ("reward", "terminated"))
    return Comparison(
        world.spec,
        context,
        real,
        kept,
        dreamt,
        reward,
        expected=np.array(expected[:context] + dream.reward[0].tolist()),
        alive=1.0 - ended,
        going_on=np.array(going_on[:context] + dream.cont[0].tolist()),
    )
