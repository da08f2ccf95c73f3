"""`longdream bench dream`: the speed of `longdream/Dream-v0`, and M's share of the time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from longdream.agent.bench.common import config_of
from longdream.agent.config.schema import Device
from longdream.agent.core.agent import Agent
from longdream.agent.dream_env.env import DreamVecEnv
from longdream.agent.dream_env.spaces import Observation
from longdream.agent.dream_env.starts import Moments, first_moments
from longdream.envs.contract import UserError
from longdream.envs.make import World

STARTS = 16
"""Number of states that dreams start from."""


def measure(
    preset: str = "quickstart",
    copies: tuple[int, ...] = (1, 64, 1024),
    observation: Observation = "feature",
    seconds: float = 10.0,
    rounds: int = 10,
    device: Device | None = None,
) -> dict[str, Any]:
    """Dreamt steps per second of longdream/Dream-v0, and the share of each part in the time.

    An untrained agent of a preset dreams under random actions, from first frames of its environment. Its dreams end
    only at the preset's horizon. Three things are timed in turns: steps of the environment; M alone, with as many
    copies; and V's decoder alone, if observations are decoded. The remaining time is the overhead of the environment.

    M alone is timed in two ways. In the first, the host launches the next step while the device still computes the last
    one, which is impossible for a policy whose action depends on the last observation. In the second, the host waits
    after each step, as any policy must. The shares and overhead_share are relative to the first, which is the harder
    standard; waited_share is the environment's overhead relative to the second. On the CPU both are the same.

    examples
      longdream bench dream
      longdream bench dream --observation image --copies 64 --device cpu

    Args:
        preset: preset or .yaml file
        copies: numbers of dreams in parallel
        observation: form of the environment's observations
        seconds: time for each row
        rounds: number of turns; the fastest counts, since other load on the machine only adds time
        device: where to compute (default: cpu, and cuda where there is one)

    Returns:
        rows: copies, device, observation, steps_per_s (of all copies together), ms_per_step (of the environment),
        model_ms and waited_ms (of M alone, without and with waiting), share of model, decoder and environment in a
        step, overhead_share: the environment's overhead divided by model_ms; waited_share: divided by waited_ms.
    """
    if min(copies, default=0) < 1 or seconds <= 0 or rounds < 1:
        raise UserError(f"--copies {copies}, --seconds {seconds:g}, --rounds {rounds}: must be more than 0")
    available: tuple[Device, ...] = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for where in (device,) if device else available:
        agent, moments = _asleep(preset, where)
        for n in copies:
            rows.append(_row(agent, moments, n, observation, seconds, rounds))
            text = "{device}, {copies:,} copies: {steps_per_s:,.0f} dreamt steps/s, {ms_per_step:.2f} ms per step"
            print(text.format(**rows[-1]), file=sys.stderr)
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
    """An untrained agent whose M predicts no terminations, and STARTS copies of its environment's first moment."""
    config = config_of(preset, device)
    with closing(World(config.env.id, 1, config.seed, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
        frames = [world.reset().obs]
    last: Any = agent.model.reward_continue.cont_out[-1]
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
        parts["decoder"] = lambda i: agent.model.encoder.decode(now.z, now.feat)
    for call in parts.values():  # the first calls allocate memory, or capture a CUDA graph
        timed(call, 3, agent.device)
    once = timed(parts["total"], 3, agent.device)
    calls = max(3, int(seconds / rounds / len(parts) / max(once, 1e-6)))
    turns = [{part: timed(call, calls, agent.device) for part, call in parts.items()} for _ in range(rounds)]
    ms = {"decoder": 0.0} | {part: 1e3 * min(turn[part] for turn in turns) for part in parts}
    overhead = {by: max(0.0, ms["total"] - ms[by] - ms["decoder"]) for by in ("model", "waited")}
    ms["environment"] = overhead["model"]
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
        "overhead_share": overhead["model"] / ms["model"],
        "waited_share": overhead["waited"] / ms["waited"],
    }


@torch.no_grad()
def timed(call: Callable[[int], Any], calls: int, device: torch.device) -> float:
    """Seconds per call, including the device's work."""
    _wait(device)
    began = time.perf_counter()
    for i in range(calls):
        call(i)
    _wait(device)
    return (time.perf_counter() - began) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
