"""What an agent sees, predicts and does on real steps, each with a light and what to try: `longdream diagnose`.

A return says that an agent is weak, not why. Each part is measured where it matters: V on what changes between frames,
which is little of a picture; M's dream on what differs from its start; the reward head on rewarded steps; and what C is
promised in dreams against what came.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longdream.agent.config.schema import EnvConfig
from longdream.agent.core.agent import Agent
from longdream.agent.core.device import own_randomness
from longdream.agent.evaluation.policy import WatchedWorld, check_fit, make_world
from longdream.agent.evaluation.rollout import EVALUATION_SEED
from longdream.agent.run.logger import Logger
from longdream.agent.run.signals import Signals
from longdream.controller.types import Judging
from longdream.envs.contract import ObsSpec
from longdream.envs.make import World
from longdream.worldmodel.dream import Starts, imagine

Light = Literal["green", "yellow", "red", "unknown"]
ROWS = 512
"""Real rows that are looked at while it trains, over all copies."""
VISIBLE = 8
"""Difference of pixels, of 255, from which on they count as changed."""
WARNED = -1
"""Count of a red light that has been warned of."""
FEW = 3
"""Events under which nothing is said about them."""
ADVICE = {
    "dream": "more updates (--learn.train_ratio) or a wider M (--worldmodel.width); if the next frame is random by"
    " nature, this light means nothing",
    "reward": "--heads.reward_weight 10, or, of rare rewards, --replay.priority reward --replay.priority_fraction 0.5",
    "end": "more real steps: ends are rare events",
    "promise": "--controller.replay_value 0.3, a shorter --controller.horizon, or --learn.warmup_model 300",
    "random": "a lower --controller.entropy or --controller.return_floor, where the lights above are green",
    "narrow": "a higher --controller.entropy",
    "chance": "what helps the first red light above; memory is not to be judged before",
    "memory": "clips as long as what is to be remembered (--replay.length), begun where episodes begin"
    " (--replay.episode_start_fraction 1)",
}
"""What to try where a light is not green; of V, `_for_encoder` says it."""


@dataclass(frozen=True)
class Finding:
    """One measurement. value: None where there was nothing to measure. says: the measurement in words."""

    value: float | None
    light: Light
    says: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Played:
    """T real rows of n copies, as arrays `(T, n, ...)`, and what the agent made of them.

    obs: by key. reward, terminated, truncated, first: of each row. feat, action: M's feature of the row and the action
    that was chosen from it. entropy: of the policy there, empty where C cannot tell.
    starts: by row, M's state after it, at every H-th row.
    """

    obs: dict[str, np.ndarray]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    first: np.ndarray
    feat: Tensor
    action: Tensor
    entropy: np.ndarray
    starts: dict[int, Any] = field(default_factory=dict)

    def going_on(self, t: int, horizon: int) -> np.ndarray:
        """Whether rows t to t + h are of one episode, `(H, n)`, for h from 1 on."""
        return ~np.logical_or.accumulate(self.first[t + 1 : t + 1 + horizon], axis=0)


@torch.no_grad()
def diagnose(
    agent: Agent, env: EnvConfig, seed: int, rows: int = ROWS, signals: Signals | None = None
) -> dict[str, Finding]:
    """Play `rows` real rows in some copies of an environment, and look at each part of the agent on them.

    Actions are sampled, as in the dreams that C learns from. The random streams of training are as they were
    afterwards.

    Raises:
        UserError: the environment is not the agent's. EnvError: it failed. Interrupted: a signal was received.
    """
    horizon = agent.config.controller.horizon
    copies = min(8, max(1, rows // (4 * horizon)))
    length = max(rows // copies, 2 * horizon + 1)
    seed += EVALUATION_SEED
    with (
        closing(make_world(WatchedWorld, env, copies, seed, signals)) as world,
        own_randomness(seed, agent.device),
        torch.compiler.set_stance("force_eager"),
    ):
        world.signals = signals
        world.label = ""
        check_fit(world, agent.spec)
        played = _play(agent, world, length, horizon)
        return {
            "encoder": _encoder(agent, played),
            "dream": _dream(agent, played, horizon),
            "reward": _reward(agent, played),
            "end": _end(agent, played),
            "promise": _promise(agent, played, horizon),
            "entropy": _entropy(agent, played),
        }


def tell(findings: dict[str, Finding], logger: Logger, step: int, count: dict[str, Any]) -> None:
    """Write what was measured as metrics, and warn once of each light that is red twice in a row, or at the end: at
    first everything is red. `count` counts, by name, how often in a row a light was red, or WARNED."""
    values = {f"diagnosis/{name}": finding.value for name, finding in findings.items()}
    logger.write(step, {name: value for name, value in values.items() if value is not None})
    finished = logger.total is not None and step >= logger.total
    for name, finding in findings.items():
        key = f"red/{name}"
        if count.get(key) == WARNED:
            continue
        count[key] = count.get(key, 0) + 1 if finding.light == "red" else 0
        if count[key] == 2 or (finished and count[key]):
            count[key] = WARNED
            logger.warn(step, f"{finding.says}; try {finding.advice} (longdream diagnose {logger.folder})")


def memory(kept: float, erased: float, random: float) -> Finding:
    """Of mean returns: the agent's, the same agent's with M's long memory erased at every step, and random actions'."""
    says = f"the agent returns {kept:.3g}, without long memory {erased:.3g}, random actions {random:.3g}"
    above = kept - random
    share = (kept - erased) / above if above > 0 else None
    if share is None:
        return Finding(None, "red", f"{says}: it is no better than chance", ADVICE["chance"])
    light: Light = "green" if share > -0.1 else "yellow"
    if share < -0.1:
        says += ": it does better without"
    return Finding(share, light, says, "" if light == "green" else ADVICE["memory"])


def _play(agent: Agent, world: World, length: int, every: int) -> Played:
    rows = []
    feats = []
    actions = []
    entropy = []
    starts = {}
    row = world.reset()
    carry = agent.initial(world.num_envs)
    for t in range(length):
        carry, _ = agent.observe(carry, row, measure=False)
        rows.append(row)
        feats.append(carry.feat)
        if isinstance(agent.controller, Judging):
            entropy.append(agent.controller.policy(carry.feat).entropy().float().cpu().numpy())
        if t % every == 0 and t + every < length:
            starts[t] = carry
        carry = agent.acted(carry, agent.act(carry, greedy=False))
        actions.append(carry.action)
        if t + 1 < length:
            row = world.step(carry.action.cpu().numpy())
    return Played(
        {key: np.stack([row.obs[key] for row in rows]) for key in world.spec.obs},
        reward=np.stack([row.reward for row in rows]),
        terminated=np.stack([row.terminated for row in rows]),
        truncated=np.stack([row.truncated for row in rows]),
        first=np.stack([row.is_first for row in rows]),
        feat=torch.stack(feats),
        action=torch.stack(actions),
        entropy=np.array(entropy),
        starts=starts,
    )


# -- V and M ----------------------------------------------------------------------------------------------------------


@dataclass
class Explained:
    """How much of what differs from a reference is predicted, in sums over rows, of one observation.

    The error is compared with that of the better of two guesses that know nothing: the reference itself, and the mean
    over all rows. 1: predicted exactly. 0 or less: no better than a guess. Discrete values and categories: the share of
    those that differ which are right.
    """

    spec: ObsSpec
    mean: np.ndarray
    scale: np.ndarray
    sums: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def add(self, real: np.ndarray, predicted: np.ndarray, reference: np.ndarray) -> None:
        """Rows `(R, *shape)` of each."""
        if self.spec.kind in ("discrete", "categories"):
            differs = real != reference
            self.sums += np.array([(predicted != real)[differs].sum(), differs.sum(), differs.sum()])
            return
        real, predicted, reference = (array.astype(np.float64) for array in (real, predicted, reference))
        differs = np.abs(real - reference) > (VISIBLE if self.spec.kind == "image" else 0)
        if self.spec.kind == "image":
            differs |= differs.any(-1, keepdims=True)
        guesses = (predicted, reference, np.broadcast_to(self.mean, real.shape))
        self.sums += [(np.square((guess - real) / self.scale) * differs).sum() for guess in guesses]

    def share(self) -> float | None:
        """None where nothing differed."""
        base = min(self.sums[1:])
        return float(np.clip(1 - self.sums[0] / base, -1, 1)) if base > 0 else None


def _explained(agent: Agent, played: Played) -> dict[str, Explained]:
    out = {}
    for key, spec in agent.spec.obs.items():
        values = played.obs[key].reshape(-1, *spec.shape)
        mean = values.mean(0, dtype=np.float64)
        scale = values.std(0, dtype=np.float64) if spec.kind == "vector" else np.ones(1)
        out[key] = Explained(spec, mean, np.where(scale > 0, scale, 1))
    return out


def _encoder(agent: Agent, played: Played) -> Finding:
    """V's reconstructions where they differ from the row before."""
    explained = _explained(agent, played)
    for t in range(1, len(played.first)):
        within = ~played.first[t]
        if not within.any():
            continue
        obs = {key: torch.from_numpy(value[t]).to(agent.device) for key, value in played.obs.items()}
        kept = agent.model.encoder.decode(agent.model.encoder(obs), played.feat[t])
        for key, part in explained.items():
            real = played.obs[key][t]
            # numbers change little from row to row: here V must tell them from their mean
            before = np.broadcast_to(part.mean, real.shape) if part.spec.kind == "vector" else played.obs[key][t - 1]
            part.add(real[within], kept[key].cpu().numpy()[within], before[within])
    shares = _shares(explained)
    if not shares:
        return Finding(None, "unknown", "nothing changed in what the agent saw")
    worst = min(shares, key=lambda key: shares[key])
    says = f"V shows {_percent(shares[worst])} of what changes from row to row{_named(worst, shares)}"
    return _judged(shares[worst], says, _for_encoder(agent, worst), red=0.3, green=0.7)


def _for_encoder(agent: Agent, key: str) -> str:
    """What to try where V does not show an observation: settings that concern it and are not large already."""
    config = agent.config.encoder
    tries = []
    if agent.spec.obs[key].kind == "image":
        if agent.model.exchanges_gradients:
            tries.append("--encoder.shaped_by observation (what M predicts can keep V blind)")
        if config.grid < 4:
            tries.append("--encoder.grid 4 (more tokens keep small things apart)")
        if config.depth < 32:
            tries.append("--encoder.depth 32")
    return ", or ".join([*tries, "more updates of V (--learn.train_ratio, more steps)"])


def _dream(agent: Agent, played: Played, horizon: int) -> Finding:
    """Dreams under the real actions, where reality came to differ from the start, after one step and at the end."""
    steps = sorted({1, horizon})
    explained = {h: _explained(agent, played) for h in steps}
    for t, dream in _dreams(agent, played, horizon, of_c=False):
        same = played.going_on(t, horizon)
        for h in steps:
            within = same[h - 1]
            if not within.any():
                continue
            decoded = agent.model.encoder.decode(dream.z[:, h - 1], dream.feat[:, h])
            for key, part in explained[h].items():
                start, real = played.obs[key][t], played.obs[key][t + h]
                part.add(real[within], decoded[key].cpu().numpy()[within], start[within])
    curves = {h: _shares(parts) for h, parts in explained.items()}
    if not any(curves.values()):
        return Finding(None, "unknown", f"no episode went on for {horizon} steps, or nothing changed")
    keys = {key for shares in curves.values() for key in shares}
    best = {key: max(shares[key] for shares in curves.values() if key in shares) for key in keys}
    worst = min(sorted(best), key=lambda key: best[key])
    parts = [f"{_percent(shares[worst])} after {h}" for h, shares in curves.items() if worst in shares]
    says = f"of what changes, dreams show {', '.join(parts)} steps{_named(worst, best)}"
    return _judged(best[worst], says, ADVICE["dream"], red=0.1, green=0.4)


def _dreams(agent: Agent, played: Played, horizon: int, of_c: bool) -> Iterator[tuple[int, Any]]:
    """Of each start its row and the dreams of all copies, under C's actions or the real ones."""
    for t, carry in played.starts.items():
        moment = Starts(carry.feat, carry.state, torch.ones(len(carry.feat), device=agent.device))
        plan = iter(played.action[t : t + horizon])

        def policy(feat: Tensor, plan: Iterator[Tensor] = plan) -> Tensor:
            return agent.controller.act(feat, False) if of_c else next(plan)

        yield t, imagine(agent.model, moment, policy, horizon)


# -- the heads --------------------------------------------------------------------------------------------------------


def _expected(agent: Agent, played: Played) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M's expected reward and its probability of an end of each row from the one before, `(T - 1, n)`, and which rows
    there are: none is expected that begins an episode."""
    reward, cont = agent.model.reward_continue.expect(played.feat[:-1], played.action[:-1])
    return reward.float().cpu().numpy(), 1 - cont.float().cpu().numpy(), ~played.first[1:]


def _reward(agent: Agent, played: Played) -> Finding:
    """The reward head's error, rewards wrongly expected included, as a share of the rewards that are not the usual."""
    expected, _, within = _expected(agent, played)
    expected, real = expected[within], played.reward[1:][within]
    usual = float(np.median(real)) if len(real) else 0.0
    rewarded = np.abs(real - usual) > 1e-3 * max(1e-3, float(np.ptp(real)) if len(real) else 0.0)
    count = int(rewarded.sum())
    if count < FEW:
        return Finding(None, "unknown", f"{count} of {len(real):,} steps had another reward than {usual:.3g}")
    error = np.square(expected - real).sum()
    share = float(np.clip(1 - error / np.square(real - usual).sum(), -1, 1))
    says = f"M knows {_percent(share)} of the rewards that are not {usual:.3g}, of {count:,} steps"
    return _judged(share, says, ADVICE["reward"], red=0.2, green=0.7)


def _end(agent: Agent, played: Played) -> Finding:
    """The probability of an end where episodes terminated, and elsewhere."""
    _, end, within = _expected(agent, played)
    ended = within & played.terminated[1:]
    if ended.sum() < FEW:
        return Finding(None, "unknown", f"{int(ended.sum())} episodes terminated")
    there = float(end[ended].mean())
    elsewhere = float(end[within & ~ended].mean())
    says = f"M expects an end with probability {there:.2f} where episodes ended, {elsewhere:.3f} elsewhere"
    return _judged(there - elsewhere, says, ADVICE["end"], red=0.1, green=0.5)


# -- C ----------------------------------------------------------------------------------------------------------------


def _promise(agent: Agent, played: Played, horizon: int) -> Finding:
    """Rewards of dreams under C against those that came in as many real steps from the same moments."""
    dreamt = []
    real = []
    for t, dream in _dreams(agent, played, horizon, of_c=True):
        alive = torch.cat([torch.ones_like(dream.cont[:, :1]), dream.cont[:, :-1].cumprod(1)], 1)
        promised = (alive * dream.reward).sum(1).float().cpu().numpy()
        same = played.going_on(t, horizon)
        cut = (played.truncated[t + 1 : t + 1 + horizon] & same).any(0)
        known = ~cut & ~(played.terminated | played.truncated)[t]
        dreamt.append(promised[known])
        real.append((played.reward[t + 1 : t + 1 + horizon] * same).sum(0)[known])
    promised, came = np.concatenate(dreamt), np.concatenate(real)
    if len(came) < FEW:
        return Finding(None, "unknown", f"no episode went on for {horizon} steps")
    difference = float(promised.mean() - came.mean())
    error = math.hypot(promised.std(), came.std()) / math.sqrt(len(came))
    # as advantages are scaled: what is small beside that does not move C
    scale = max(float(came.std()), abs(float(came.mean())), agent.config.controller.return_floor)
    says = f"dreams of {horizon} steps promise {promised.mean():.3g}, {came.mean():.3g} came ({len(came):,} moments)"
    value = difference / scale
    surely = abs(difference) > 2 * error
    light: Light = "red" if surely and abs(value) > 1 else "yellow" if surely and abs(value) > 0.3 else "green"
    return Finding(value, light, says, "" if light == "green" else ADVICE["promise"])


def _entropy(agent: Agent, played: Played) -> Finding:
    """The policy's entropy as a share of the most that there can be, of choices."""
    parts = agent.spec.action.parts
    if not len(played.entropy) or not parts:
        return Finding(None, "unknown", "C has no choices whose probabilities it tells")
    share = float(played.entropy.mean() / sum(math.log(max(n, 2)) for n in parts))
    says = f"the policy's entropy is {share:.1%} of that of random actions"
    light: Light = "red" if share > 0.98 else "yellow" if share > 0.9 or share < 0.001 else "green"
    return Finding(share, light, says, "" if light == "green" else ADVICE["random" if share > 0.9 else "narrow"])


def _judged(value: float, says: str, advice: str, red: float, green: float) -> Finding:
    light: Light = "red" if value < red else "yellow" if value < green else "green"
    return Finding(value, light, says, "" if light == "green" else advice)


def _shares(explained: dict[str, Explained]) -> dict[str, float]:
    shares = {key: part.share() for key, part in explained.items()}
    return {key: share for key, share in shares.items() if share is not None}


def _named(key: str, shares: dict[str, float]) -> str:
    return f", in {key!r}" if len(shares) > 1 else ""


def _percent(share: float) -> str:
    return f"{max(share, 0):.0%}"
