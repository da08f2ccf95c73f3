"""`longdream bench scale`: what is learned per second by one rank and by several."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from longdream.agent.bench.agents.loop import opened, turn
from longdream.agent.bench.common import config_of, now, resident_bytes
from longdream.agent.bench.model.world_model_cost import clip_update, random_clips
from longdream.agent.cli import launch, output
from longdream.agent.config import options
from longdream.agent.config.checks import check
from longdream.agent.config.schema import Config
from longdream.agent.core.learner import Learner
from longdream.agent.core.ranks import RankFailed, here
from longdream.agent.run.files import to_json
from longdream.agent.train.video import ClipLearner
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

UNTIMED = 8
"""Updates before the timed ones, in which the update is compiled and captured."""
PROFILED = 2
"""Updates after them, in which the time of communication is measured."""
CONDITION = 20
"""Length of the condition of a frame of video."""


def measure(
    preset: str = "quickstart",
    ranks: tuple[int, ...] = (1, 2),
    repeats: int = 50,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Rows and dreamt steps learned from per second, on one rank and on several.

    Each rank has the work of the preset: with n ranks, n times its copies, batch, replay and frames. With a preset of
    kind online a run is trained, without evaluations and checkpoints. With one of kind video M learns from random
    latents. On a machine with fewer GPUs than ranks, use --settings '{"device": "cpu"}'.

    examples
      longdream bench scale --preset memory-maze-9x9 --ranks 1,2 --json
      longdream bench scale --preset video-world-model --ranks 1,2 --json

    Args:
        preset: preset or .yaml file
        ranks: numbers of ranks to compare, on this machine; the first is what the others are compared with
        repeats: timed updates
        settings: settings to change, '{"replay.batch": 4}'

    Returns:
        table, a row per number of ranks: ranks; rows_per_s (replayed rows or frames learned from) and
        dreamt_steps_per_s, of all ranks together; efficiency, rows_per_s by those of as many times the first row's
        ranks; communication, the share of time in which gradients and agreements travel or are waited for; ms (per
        update); gradient_bytes (averaged per update); peak_bytes (of the device, per rank; on the CPU, resident).
        preset, device.

    Raises:
        UserError: settings that cannot be measured or shared.
    """
    if not ranks or min(ranks) < 1 or repeats < 1:
        raise UserError(f"--ranks {','.join(map(str, ranks))}, --repeats {repeats}: must be at least 1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # the profiler's own notes
    table: list[dict[str, Any]] = []
    for count in ranks:
        check(scaled(options.update(options.load(preset), settings or {}), count))
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            given = json.dumps([preset, settings or {}, repeats, str(result)])
            code = launch.launched(count, [sys.executable, "-m", "longdream.agent.bench.agents.scale", given])
            if code:
                raise RankFailed(f"{count} ranks have ended with exit code {code}")
            row = json.loads(result.read_text())
        device = row.pop("device")
        base = table[0] if table else row | {"ranks": count}
        efficiency = row["rows_per_s"] / base["rows_per_s"] * base["ranks"] / count
        table.append({"ranks": count, "efficiency": efficiency, **row})
        print(
            f"{count:3} ranks  {row['rows_per_s']:12,.0f} rows/s  {row['dreamt_steps_per_s']:12,.0f} dreamt steps/s  "
            f"efficiency {efficiency:6.1%}  communication {row['communication']:6.1%}  {row['ms']:8.2f} ms/update"
        )
    return {"preset": preset, "device": device, "table": table}


def scaled(config: Config, count: int) -> Config:
    """The configuration with `count` times its work, so that each of as many ranks has that of one."""
    names = ["learn.encoder_rows"]
    names += ["video.frames"] if config.kind == "video" else ["env.copies", "replay.batch", "replay.capacity"]
    config = options.update(config, {name: count * options.field_value(config, name) for name in names})
    # no recordings are read
    return options.update(config, {"video.data": "."}) if config.kind == "video" else config


def work(preset: str, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One rank's part of the measurement: what all have done."""
    config = scaled(config_of(preset, None, settings), here().count)
    return (_of_video if config.kind == "video" else _of_run)(config, repeats)


def _of_run(config: Config, repeats: int) -> dict[str, Any]:
    with opened(config) as trainer:
        agent = trainer.agent

        def learn(updates: int) -> None:
            until = trainer.count["updates"] + updates
            while trainer.count["updates"] < until:
                turn(trainer)

        learn(UNTIMED)
        before = agent.dream_steps
        updates = trainer.count["updates"]
        began = now(agent.device)
        learn(repeats)
        seconds = now(agent.device) - began
        updates = trainer.count["updates"] - updates
        rows = config.replay.batch * config.replay.length * updates
        dreamt = agent.dream_steps - before
        share = _communication(agent, lambda: learn(PROFILED))
    return _result(agent, rows, dreamt, updates, seconds, share)


def _of_video(config: Config, repeats: int) -> dict[str, Any]:
    size = config.video.size
    actions = ActionSpec((), (-1.0,) * CONDITION, (1.0,) * CONDITION)
    learner = ClipLearner(here().share(config), EnvSpec({"image": ObsSpec("image", (size, size, 3))}, actions))
    length = config.video.lengths[0]
    clips = config.video.frames // length
    batch = random_clips(learner, clips // here().count, length)
    update = clip_update(learner)

    def learn(updates: int) -> None:
        for _ in range(updates):
            update(batch)  # on CUDA it only launches

    learn(UNTIMED)
    began = now(learner.device)
    learn(repeats)
    seconds = now(learner.device) - began
    share = _communication(learner, lambda: learn(PROFILED))
    return _result(learner, repeats * clips * length, 0, repeats, seconds, share)


def _communication(learner: Learner, learn: Any) -> float:
    """Share of the time of `learn` that is spent in collectives: of NCCL's kernels on CUDA, else of gloo's."""
    on_cuda = learner.device.type == "cuda"
    if here().count == 1:
        return 0.0
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        began = now(learner.device)
        learn()
        seconds = now(learner.device) - began
    spent = 0.0
    for event in profiled.key_averages():
        if on_cuda and "ncclDevKernel" in event.key:
            spent += event.self_device_time_total
        elif not on_cuda and event.key.startswith("gloo:"):
            spent += event.cpu_time_total
    return min(1.0, 1e-6 * spent / seconds)


def _result(learner: Learner, rows: int, dreamt: int, updates: int, seconds: float, share: float) -> dict[str, Any]:
    """What all ranks have done together, by the slowest clock; communication is their mean."""
    on_cuda = learner.device.type == "cuda"
    own_peak = torch.cuda.max_memory_allocated(learner.device) if on_cuda else resident_bytes()
    clocks, peaks, shares = here().numbers(seconds, own_peak, share).T
    seconds = float(clocks.max())
    weights = [weight for optimizer in learner.optimizers.values() for weight in optimizer.parameters]
    return {
        "rows_per_s": rows / seconds,
        "dreamt_steps_per_s": dreamt / seconds,
        "communication": float(shares.mean()),
        "ms": 1e3 * seconds / updates,
        "gradient_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "peak_bytes": int(peaks.max()),
        "device": torch.cuda.get_device_name(learner.device) if on_cuda else "cpu",
    }


def main(given: str) -> int:
    """One rank's program."""
    preset, settings, repeats, path = json.loads(given)
    try:
        with launch.as_rank() as rank:
            result = work(preset, settings, repeats)
        if rank == 0:
            Path(path).write_text(to_json(result))
    except Exception as error:
        expected = output.explain(error)
        if expected is None:
            raise
        print(f"longdream: {expected[1]}", file=sys.stderr)
        return expected[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
