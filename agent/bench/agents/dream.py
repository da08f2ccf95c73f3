"""`longdream bench dream`: how fast `longdream/Dream-v0` steps, and how much of that is M."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from longdream.agent.bench.common import Device, config_of
from longdream.agent.core.agent import Agent
from longdream.agent.dream_env.env import DreamVecEnv, Observation
from longdream.agent.dream_env.starts import Moments, first_moments
from longdream.envs.contract import UserError
from longdream.envs.make import World

STARTS = 16
"""Moments that dreams begin from."""


def measure(
    preset: str = "quickstart",
    copies: tuple[int, ...] = (1, 64, 1024),
    observation: Observation = "feature",
    seconds: float = 10.0,
    rounds: int = 10,
    device: Device | None = None,
) -> dict[str, Any]:
    """Dreamt steps per second of longdream/Dream-v0, and the share of each part.

    An untrained agent of a preset dreams under random actions, from first frames of its environment; its dreams are
    made to end at the preset's horizon only. These are timed in turns: steps of the environment; M alone, at as many
    copies; V's decoding alone, where observations are decoded. What is left is the environment's own.

    M alone is timed twice. Back to back: the host asks for the next step while a device is still at the last, as
    nobody can whose action depends on what came. And waited for at each step, as whoever acts in M waits, with or
    without an environment. The shares, and overhead_share, count by the first, which is the harder; waited_share is
    the environment's own time by the second. Without a device there is nothing to wait for, and they are alike.

    examples
      longdream bench dream
      longdream bench dream --observation image --copies 64 --device cpu

    Args:
        preset: preset or .yaml file
        copies: dreams side by side
        observation: what the environment shows
        seconds: time for each row
        rounds: so many turns; the fastest of each counts, since what else the machine does only makes it slower
        device: where to compute (default: cpu, and cuda where there is one)

    Returns:
        rows: copies, device, observation, steps_per_s (of all copies together), ms_per_step (of the environment),
        model_ms and waited_ms (of M alone, back to back and waited for), share of model, decoder and environment in a
        step, overhead_share: the environment's own time, by M's back to back; waited_share: by M's waited for.
    """
    if min(copies, default=0) < 1 or seconds <= 0 or rounds < 1:
        raise UserError(f"--copies {copies}, --seconds {seconds:g}, --rounds {rounds}: must be more than 0")
    found: tuple[Device, ...] = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for where in (device,) if device else found:
        agent, moments = _asleep(preset, where)
        for n in copies:
            rows.append(_row(agent, moments, n, observation, seconds, rounds))
            told = "{device}, {copies:,} copies: {steps_per_s:,.0f} dreamt steps/s, {ms_per_step:.2f} ms per step"
            print(told.format(**rows[-1]), file=sys.stderr)
    print(f"preset {preset}, observation {observation}, {torch.get_num_threads()} CPU threads")
    print(
        "| device | copies | dreamt steps/s | ms per step | M alone, ms | waited for, ms | M | V's decoding | "
        "environment | environment / M | / M waited for |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        share = " | ".join(f"{part:.1%}" for part in row["share"].values())
        print(
            f"| {row['device']} | {row['copies']:,} | {row['steps_per_s']:,.0f} | {row['ms_per_step']:.3f} | "
            f"{row['model_ms']:.3f} | {row['waited_ms']:.3f} | {share} | {row['overhead_share']:.1%} | "
            f"{row['waited_share']:.1%} |"
        )
    return {"preset": preset, "observation": observation, "threads": torch.get_num_threads(), "rows": rows}


def _asleep(preset: str, device: Device) -> tuple[Agent, Moments]:
    """An untrained agent whose M expects no end, and first frames of its environment."""
    config = config_of(preset, device)
    with closing(World(config.env.id, 1, config.seed, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
        frames = [world.reset().obs]
    last: Any = agent.model.consequence.cont_out[-1]
    torch.nn.init.constant_(last.bias, 20.0)
    moments = first_moments(agent, frames[0])
    return agent, moments.take(torch.zeros(STARTS, dtype=torch.long, device=agent.device))


def _row(agent: Agent, moments: Moments, n: int, observation: Observation, seconds: float, rounds: int) -> dict:
    env = DreamVecEnv(n, agent, observation, start=moments)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(16)]
    now = moments.take(torch.arange(n, device=agent.device) % STARTS)

    def waited(i: int) -> None:
        env.advance()
        _wait(agent.device)

    parts: dict[str, Callable[[int], Any]] = {
        "total": lambda i: env.step(actions[i % 16]),
        "model": lambda i: env.advance(),
        "waited": waited,
    }
    if observation == "image":
        parts["decoder"] = lambda i: agent.model.encoder.decode(now.z)
    for call in parts.values():  # the first calls allocate, or record a graph
        timed(call, 3, agent.device)
    once = timed(parts["total"], 3, agent.device)
    calls = max(3, int(seconds / rounds / len(parts) / max(once, 1e-6)))
    taken = [{part: timed(call, calls, agent.device) for part, call in parts.items()} for _ in range(rounds)]
    ms = {"decoder": 0.0} | {part: 1e3 * min(turn[part] for turn in taken) for part in parts}
    own = {by: max(0.0, ms["total"] - ms[by] - ms["decoder"]) for by in ("model", "waited")}
    ms["environment"] = own["model"]
    inside = ("model", "decoder", "environment")
    return {
        "copies": n,
        "device": str(agent.device),
        "observation": observation,
        "steps_per_s": round(1e3 * n / ms["total"], 1),
        "ms_per_step": round(ms["total"], 4),
        "model_ms": round(ms["model"], 4),
        "waited_ms": round(ms["waited"], 4),
        "share": {part: ms[part] / sum(ms[part] for part in inside) for part in inside},
        "overhead_share": own["model"] / ms["model"],
        "waited_share": own["waited"] / ms["waited"],
    }


@torch.no_grad()
def timed(call: Callable[[int], Any], calls: int, device: torch.device) -> float:
    """Seconds per call, the device's work included."""
    _wait(device)
    began = time.perf_counter()
    for i in range(calls):
        call(i)
    _wait(device)
    return (time.perf_counter() - began) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
