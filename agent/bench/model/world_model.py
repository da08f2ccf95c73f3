"""`longdream bench world-model`: memory and cost of M with each mixer, on the same recordings of video."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longdream.agent.bench.common import device_of
from longdream.agent.bench.model.world_model_cost import cost_of, step_capture
from longdream.agent.bench.model.world_model_pictures import draw_curves, draw_strip
from longdream.agent.config import flags, options
from longdream.agent.config.checks import check
from longdream.agent.config.schema import Config, Device
from longdream.agent.core.device import own_randomness
from longdream.agent.core.ranks import leave
from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.reader import Damaged
from longdream.agent.evaluation.similarity import Similarity
from longdream.agent.run.files import to_json
from longdream.agent.run.folder import open_run, write
from longdream.agent.train.video import HELD_OUT, ClipLearner, VideoTrainer, load_model
from longdream.envs.contract import UserError
from longdream.worldmodel.generate import generate, read_context
from longdream.worldmodel.mixers.base import MIXERS
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.types import Batch

Task = Literal["retrieval", "reasoning"]

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"worldmodel.mixer": name} for name in MIXERS},
    "hybrid/block-1": {"worldmodel.mixer": "hybrid", "worldmodel.blocks": (1,)},
    "hybrid/no-prefix": {"worldmodel.mixer": "hybrid", "forcing.prefix": 0.0},
}
"""Variants that can be compared, with the settings that differ from the preset: the mixers, and the hybrid without
mixed block sizes and without clean prefixes. (The hybrid without blocks is `ssm+local`.)"""
ZEROED = "hybrid/zeroed"
"""The trained hybrid with the states of its scans set to zero at the end of the context."""
TOGETHER = 16
"""Clips that are generated at a time."""


def measure(
    data: Path | None = None,
    tasks: tuple[Task, ...] = ("retrieval", "reasoning"),
    mixers: tuple[str, ...] = ("hybrid", "ssm", "ssm+local", "causal", "window"),
    seeds: tuple[int, ...] = (0,),
    context: int = 256,
    ahead: int = 64,
    clips: int = 16,
    steps: int | None = None,
    context_level: float = 1.0,
    preset: str = "video-world-model",
    settings: dict[str, Any] | None = None,
    contexts: tuple[int, ...] = (64, 256, 1024, 4096),
    out: Path = Path("runs/world-model"),
    device: Device | None = None,
) -> dict[str, Any]:
    """Train M with each mixer on the same recordings; compare memory and cost.

    Retrieval: `context` frames, then the exact way back, given the poses of these frames. Reasoning: `context` frames,
    then `ahead` new ones. If the preset freezes V, all runs share one V, which a first run in `out` learns. That folder
    also contains a run for each mixer and seed. Training can be interrupted (Ctrl-C, SIGTERM) and resumed by the same
    command. With --gpus N, or under torchrun, ranks train together (docs/scale.md).

    examples
      longdream collect --env longdream/FastMemoryMaze-9x9-v0 --policy navigator --episodes 200 --out maze
      longdream bench world-model --data maze --mixers hybrid,window --seeds 0,1
      longdream bench world-model --data maze --settings '{"learn.updates": 500}' --context 64 --json

    Args:
        data: recordings with poses (Memory Maze's layout)
        tasks: what is generated after the context
        mixers: values of worldmodel.mixer, hybrid/block-1 or hybrid/no-prefix
        seeds: seeds of the runs
        context: frames that M receives
        ahead: new frames in reasoning
        clips: held-out clips for the evaluation
        steps: denoising steps per generated frame (default: the preset's forcing.steps)
        context_level: noise level that M is given for frames that it has generated (1: clean; with a little less, M
            treats its own small errors as noise)
        preset: preset or .yaml file that all runs share
        settings: settings that all runs change, '{"learn.updates": 500}'
        contexts: lengths at which cost is measured
        out: folder of the runs and pictures
        device: where to compute (default: as in the preset)

    Returns:
        rows: mixer, task, params, seed, updates, psnr, ssim, lpips (null without its weights), psnr_curve, ssim_curve,
        psnr_ceiling (of V's reconstructions), train_frames_per_s, wall_s. cost: mixer, context, train_ms_per_frame,
        generate_ms_per_frame, state_bytes, peak_bytes (null without CUDA). pictures.
    """
    if data is None:
        raise UserError("on what? Name a folder of recordings: --data DIR")
    for name in mixers:
        if name not in VARIANTS:
            raise UserError(f"--mixers: {name!r}" + flags.suggest(name, VARIANTS, f": there are {', '.join(VARIANTS)}"))
    if (steps is not None and steps < 1) or not 0 <= context_level <= 1:
        raise UserError(f"--steps {steps}, --context_level {context_level}: at least 1, and between 0 and 1")
    if not mixers or not seeds or not tasks or min(context - 2, ahead, clips, *contexts, 1) < 1:
        raise UserError(
            f"--context {context}, --ahead {ahead}, --clips {clips}, --contexts {contexts}: at least 3, 1, 1 and 1; "
            f"and --mixers, --seeds and --tasks must not be empty"
        )
    common = options.update(options.load(preset), {"video.data": str(data), **(settings or {})})
    if device:
        common = replace(common, device=device)
    if common.video.condition != "pose":
        raise UserError(f"preset {preset}: video.condition must be pose: M follows the way back by its poses")
    where = device_of(common.device)
    check(common)
    common = _with_encoder(common, out / "encoder")
    trainings = {}
    for name in mixers:
        for seed in seeds:
            folder = out / f"{name.replace('/', '-')}-s{seed}"
            trainings[name, seed] = folder, _trained(_variant(common, name, seed), folder)
    if leave():  # the rest is for the first rank
        return {}
    held_out = _clips(common, 1 + context + ahead, clips)
    similarity = Similarity(where)
    rows = []
    examples: dict[tuple[Task, int], dict[str, np.ndarray]] = {}
    for name in mixers:
        for seed in seeds:
            config = _variant(common, name, seed)
            folder, training = trainings[name, seed]
            model, _, spec, _ = load_model(folder, common.device)
            evaluation = _Evaluation(model, config, held_out, context, ahead, steps or model.steps, context_level)
            for variant in [name, ZEROED] if name == "hybrid" else [name]:
                for task in tasks:
                    row, frames = evaluation.evaluate(variant, task, similarity)
                    rows.append({"mixer": variant, "task": task, "seed": seed, **training, **row})
                    examples.setdefault((task, seed), {})[variant] = frames
                    write(out / "world-model.json", to_json({"rows": rows, "context": context}, indent=1) + "\n")
                    print(
                        f"{variant}, {task}, seed {seed}: {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}", file=sys.stderr
                    )
    cost = []
    speed = {}
    for name in mixers:
        learner = ClipLearner(_variant(common, name, seeds[0]), spec)
        speed[name] = 1e3 / cost_of(learner, common.video.lengths[-1])["train_ms_per_frame"]
        cost += [{"mixer": name, "context": length, **cost_of(learner, length)} for length in contexts]
    for row in rows:
        row["train_frames_per_s"] = round(speed["hybrid" if row["mixer"] == ZEROED else row["mixer"]])
    pictures = [draw_curves(rows, task, context, out / f"{task}.png") for task in tasks]
    pictures += [
        draw_strip(frames, f"{task}, seed {seed}, after {context} frames", out / f"{task}-s{seed}-strip.png")
        for (task, seed), frames in examples.items()
    ]
    _print_tables(rows, cost, context, similarity)
    result = {"rows": rows, "cost": cost, "context": context, "pictures": [str(path) for path in pictures]}
    write(out / "world-model.json", to_json(result, indent=1) + "\n")
    return result


def _with_encoder(common: Config, folder: Path) -> Config:
    """The configuration with the V of the run in `folder`, if V is frozen after its warm-up.

    That run is trained now if it is not finished. Its M is not used and therefore small."""
    video = common.video
    learn = common.learn
    if not video.freeze or not learn.warmup:
        return common
    length = min(video.lengths)
    alone = {"learn.updates": 1, "worldmodel.mixer": "window", "worldmodel.layers": 1, "compiled": False}
    alone |= {"video.lengths": (length,), "video.frames": max(length, learn.encoder_rows), "video.retrace": 0.0}
    _trained(options.update(common, alone), folder)
    return options.update(common, {"video.encoder": str(folder), "learn.warmup": 0})


def _variant(common: Config, name: str, seed: int) -> Config:
    config = options.update(common, VARIANTS[name] | {"worldmodel.matched": True, "seed": seed})
    check(config)
    return config


def _trained(config: Config, folder: Path) -> dict[str, Any]:
    """Train the run, or resume it. Returns the values of its training for its rows.

    Raises:
        UserError: the folder holds a run of another configuration.
    """
    if folder.exists() and open_run(folder).config != config:
        raise UserError(f"{folder} holds a run of other settings: name another --out, or remove it")
    summary = VideoTrainer.train(config, folder, resume=folder.exists(), console=True)
    return {"params": summary["parameters"], "updates": summary["updates"], "wall_s": summary["wall_s"]}


class _Evaluation(NamedTuple):
    """The evaluation of a trained M on held-out clips."""

    model: WorldModel
    config: Config
    rows: list[dict[str, np.ndarray]]
    context: int
    ahead: int
    steps: int
    level: float

    @torch.no_grad()
    def evaluate(self, variant: str, task: Task, similarity: Similarity) -> tuple[dict[str, Any], np.ndarray]:
        """The results as a row, and the first clip `(2, n, H, W, 3)`: true and generated frames."""
        curves: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": [], "lpips": [], "ceiling": []}
        example = np.empty(0)
        device = next(self.model.parameters()).device
        with own_randomness(self.config.seed, device):
            for begin in range(0, len(self.rows), TOGETHER):
                real, kept, made = self._generate(self.rows[begin : begin + TOGETHER], variant, task, device)
                for name, values in similarity(made, real).items():
                    curves[name].append(values)
                curves["ceiling"].append(similarity.psnr(kept, real))
                if not begin:
                    example = torch.stack([real[0], made[0]]).cpu().numpy()
        row: dict[str, Any] = {}
        for name in ("psnr", "ssim", "lpips"):
            curve = np.concatenate(curves[name]).mean(0) if curves[name] else None
            row[name] = None if curve is None else float(curve.mean())
            if name != "lpips":
                row[f"{name}_curve"] = None if curve is None else [round(float(v), 4) for v in curve]
        row |= {"psnr_ceiling": float(np.concatenate(curves["ceiling"]).mean()), "clips": len(self.rows)}
        return row, example

    def _generate(
        self, rows: list[dict[str, np.ndarray]], variant: str, task: Task, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames after the context, `(B, n, H, W, 3)` uint8: true ones, V's reconstructions, and generated ones."""
        stacked: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        images = torch.from_numpy(stacked.pop("image")).to(device)
        batch = Batch.of({"obs": {}, **stacked}, device)
        model = self.model
        context = self.context
        # the row before the context is read only for its action: the pose of the context's first frame
        z = model.encoder({"image": images[:, 1:]})
        pose = batch.prev_action()[:, 1:]
        if task == "retrieval":
            after = torch.arange(context - 2, -1, -1, device=device)
        else:
            after = torch.arange(context, context + self.ahead, device=device)
        chunk_frames = model.dynamics.config.chunk_frames
        after = after[: len(after) // chunk_frames * chunk_frames]
        first = torch.zeros_like(batch.is_first[:, :context])
        feat, state = read_context(model.dynamics, z[:, :context], pose[:, :context], first)
        if variant == ZEROED:
            state = state.without_long_memory()
        pieces = generate(
            model.objective,
            model.dynamics,
            feat,
            state,
            pose[:, after],
            self.steps,
            context_level=self.level,
            capture=step_capture(model, device),
        )
        made = torch.cat([model.encoder.decode(piece.z)["image"] for piece in pieces], 1)
        return images[:, 1:][:, after], model.encoder.decode(z[:, after])["image"], made


def _clips(config: Config, length: int, clips: int) -> list[dict[str, np.ndarray]]:
    """Clips of held-out recordings, the same ones for every run on this data.

    Raises:
        UserError: there are no recordings, none is long enough, or none can be read.
    """
    video = config.video
    library = open_library(Path(video.data), video.layout, video.condition, video.actions)
    _, held_out = library.held_out(HELD_OUT)
    fits = [recording for recording in held_out if recording.length >= length]
    if not fits:
        longest_recording = max((recording.length for recording in held_out), default=0)
        raise UserError(
            f"--context and --ahead need {length} rows; the longest held-out recording has {longest_recording}"
        )
    rng = np.random.default_rng(0)
    rows = []
    for i in range(clips):
        recording = fits[i % len(fits)]
        start = int(rng.integers(recording.length - length + 1))
        try:
            rows.append(read_clip(library, recording, start, length, video.size))
        except Damaged as error:
            print(f"warning: {recording.path} {error}: it is left out", file=sys.stderr)
    if not rows:
        raise UserError(f"none of the held-out recordings in {library.root} can be read")
    return rows


def _print_tables(rows: list[dict[str, Any]], cost: list[dict[str, Any]], context: int, similarity: Similarity) -> None:
    print(f"after {context} frames of context")
    print(
        "| mixer | task | seed | params | PSNR | SSIM | LPIPS | V's PSNR | frames/s in training |\n" + "|---" * 9 + "|"
    )
    for row in rows:
        lpips = "–" if row["lpips"] is None else f"{row['lpips']:.3f}"
        print(
            f"| {row['mixer']} | {row['task']} | {row['seed']} | {row['params'] / 1e6:.2f}M | {row['psnr']:.2f} | "
            f"{row['ssim']:.3f} | {lpips} | {row['psnr_ceiling']:.2f} | {row['train_frames_per_s']:,} |"
        )
    if similarity.without:
        print(f"LPIPS: {similarity.without}")
    if cost:
        print(
            "\n| mixer | frames | training, ms a frame | generation, ms a frame | state, MB | peak, MB |\n"
            + "|---" * 6
            + "|"
        )
    for row in cost:
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        print(
            f"| {row['mixer']} | {row['context']:,} | {row['train_ms_per_frame']:.3f} | "
            f"{row['generate_ms_per_frame']:.2f} | {row['state_bytes'] / 1e6:.2f} | {peak} |"
        )
