"""`longdream bench act`: what acting costs, at the start of a long episode and at its end."""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing
from typing import Any

import numpy as np

from longdream.agent.bench.common import MB, Device, config_of, resident_bytes
from longdream.agent.core.agent import Agent, Carry
from longdream.envs.contract import UserError
from longdream.envs.make import World


def measure(preset: str = "quickstart", steps: int = 20_000, device: Device | None = None) -> dict[str, Any]:
    """Time and memory per acted step of one endless episode: does either grow with the episode's age?

    An untrained agent of a preset acts in one copy of its environment, on real observations, but is told of no
    episode's end: to its memory, all steps are one episode. Timed is the agent alone, not the environment.

    Args:
        preset: preset or .yaml file
        steps: acted steps, after 200 of warm-up
        device: where to compute (default: as in the preset)

    Returns:
        ms_per_step_start, ms_per_step_end: medians over the first and the last 1,000 steps, or a quarter of all if that
        is less. state_bytes_start, state_bytes_end: all that is carried from step to step. rss_growth_mb: of resident
        memory, from the end of the first of these windows to the end.
    """
    if steps < 4:
        raise UserError(f"--steps {steps}: must be at least 4")
    config = config_of(preset, device)
    with closing(World(config.env.id, 1, config.seed, config.env.kwargs)) as world:
        agent = Agent(config, world.spec)
        window, seconds = min(1_000, steps // 4), np.zeros(steps)
        row, carry = world.reset(), agent.initial(1)
        size = resident = 0
        for t in range(-200, steps):
            began = time.perf_counter()
            carry, _ = agent.observe(carry, row, measure=False)
            action = agent.act(carry, greedy=False)  # on the CPU: a GPU has finished by then
            carry = agent.acted(carry, action)
            seconds[max(t, 0)] = time.perf_counter() - began
            if t == 0:
                size = carry_bytes(carry)
            if t == window - 1:
                resident = resident_bytes()
            row = dataclasses.replace(world.step(action), is_first=np.zeros(1, np.bool_))
    found = {
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
        print(f"  {unit:15} {found[f'{name}_start']:>9} at the start {found[f'{name}_end']:>9} at the end")
    print(f"  resident memory grew by {found['rss_growth_mb']} MB")
    return found


def carry_bytes(carry: Carry) -> int:
    """Bytes of all tensors that acting carries from one row to the next."""
    sizes = [carry.feat.nbytes, carry.action.nbytes]
    carry.state.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)
