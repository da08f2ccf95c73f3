"""`longdream bench act`: the cost of acting at the start and at the end of a long episode."""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing
from typing import Any

import numpy as np

from longdream.agent.bench.common import MB, config_of, resident_bytes
from longdream.agent.config.schema import Device
from longdream.agent.core.actor import Carry
from longdream.agent.core.agent import Agent
from longdream.envs.contract import UserError
from longdream.envs.make import World


def measure(preset: str = "quickstart", steps: int = 20_000, device: Device | None = None) -> dict[str, Any]:
    """Time and memory per step of acting in one endless episode: does either grow with the age of the episode?

    An untrained agent of a preset acts in one copy of its environment, on real observations. is_first is always False,
    so that its memory sees one long episode. Only the agent is timed, not the environment.

    Args:
        preset: preset or .yaml file
        steps: number of steps, after 200 warm-up steps
        device: where to compute (default: as in the preset)

    Returns:
        ms_per_step_start, ms_per_step_end: medians over the first and the last 1,000 steps, or over a quarter of all
        steps if that is less. state_bytes_start, state_bytes_end: size of everything that is carried from step to step.
        rss_growth_mb: growth of resident memory from the end of the first of these windows to the last step.
    """
    if steps < 4:
        raise UserError(f"--steps {steps}: must be at least 4")
    config = config_of(preset, device)
    with closing(World(config.env.id, 1, config.seed, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
        window = min(1_000, steps // 4)
        seconds = np.zeros(steps)
        row = world.reset()
        carry = agent.initial(1)
        size = resident = 0
        for t in range(-200, steps):
            began = time.perf_counter()
            carry, _ = agent.observe(carry, row, measure=False)
            action = agent.act(carry, greedy=False)  # returns to the CPU, so that a GPU has finished
            carry = agent.acted(carry, action)
            seconds[max(t, 0)] = time.perf_counter() - began
            if t == 0:
                size = carry_bytes(carry)
            if t == window - 1:
                resident = resident_bytes()
            row = dataclasses.replace(world.step(action), is_first=np.zeros(1, np.bool_))
    result = {
        "preset": preset,
        "device": str(agent.device),
        "steps": steps,
        "ms_per_step_start": round(1e3 * float(np.median(seconds[:window])), 4),
        "ms_per_step_end": round(1e3 * float(np.median(seconds[-window:])), 4),
        "state_bytes_start": size,
        "state_bytes_end": carry_bytes(carry),
        "rss_growth_mb": round((resident_bytes() - resident) / MB, 2),
    }
    print(f"preset {preset}, one stream on {agent.device}, {steps:,} steps of one episode")
    for name, unit in (("ms_per_step", "ms per step"), ("state_bytes", "bytes of state")):
        print(f"  {unit:15} {result[f'{name}_start']:>9} at the start {result[f'{name}_end']:>9} at the end")
    print(f"  resident memory grew by {result['rss_growth_mb']} MB")
    return result


def carry_bytes(carry: Carry) -> int:
    """Size in bytes of all tensors that acting carries from one row to the next."""
    sizes = [carry.feat.nbytes, carry.action.nbytes]
    carry.state.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)
