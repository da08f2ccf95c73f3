"""What M remembers of video, and what it costs: mixers side by side on the same recordings."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longdream.agent.bench.common import Device, device_of
from longdream.agent.bench.model.world_model_cost import cost_of, recorder
from longdream.agent.bench.model.world_model_pictures import draw_curves, draw_strip
from longdream.agent.config import options, ranges
from longdream.agent.config.schema import Config
from longdream.agent.core.learner import own_randomness
from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.reader import Damaged
from longdream.agent.evaluation.similarity import Similarity
from longdream.agent.run import folder as run
from longdream.agent.train import video as video_loop
from longdream.envs.contract import UserError
from longdream.worldmodel.generate import generate, take_in
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.types import Batch

Task = Literal["retrieval", "reasoning"]

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"worldmodel.mixer": name} for name in ("hybrid", "ssm", "ssm+local", "causal", "window")},
    "hybrid/block-1": {"worldmodel.mixer": "hybrid", "worldmodel.blocks": (1,)},
    "hybrid/no-prefix": {"worldmodel.mixer": "hybrid", "forcing.prefix": 0.0},
}
"""What can be compared, and the settings of each beside the preset's: the mixers, and the hybrid without mixed block
sizes and without clean prefixes. (Without blocks it is `ssm+local`.)"""
ZEROED = "hybrid/zeroed"
"""The trained hybrid once more, its scans' states set to zero where the context ends."""
TOGETHER = 16
"""Clips that are generated side by side."""


def measure(
    data: Path | None = None,
    tasks: tuple[Task, ...] = ("retrieval", "reasoning"),
    mixers: tuple[str, ...] = ("hybrid", "ssm", "ssm+local", "causal", "window"),
    seeds: tuple[int, ...] = (0,),
    context: int = 256,
    ahead: int = 64,
    clips: int = 16,
    steps: int | None = None,
    context_level: float | None = None,
    preset: str = "video-world-model",
    settings: dict[str, Any] | None = None,
    contexts: tuple[int, ...] = (64, 256, 1024, 4096),
    out: Path = Path("runs/world-model"),
    device: Device | None = None,
) -> dict[str, Any]:
    """Train M with each mixer on the same recordings; see what each remembers and what it costs.

    Retrieval: `context` frames, then the exact way back, under the poses of these frames. Reasoning: `context` frames,
    then `ahead` new ones. All see by one V, which a first run in `out` learns, if the preset freezes V. A run for each
    mixer and seed lies there too and is gone on with where it stands: training can be stopped (Ctrl-C, SIGTERM) and
    taken up again by the same command.

    examples
      longdream collect --env longdream/FastMemoryMaze-9x9-v0 --policy navigator --episodes 200 --out maze
      longdream bench world-model --data maze --mixers hybrid,window --seeds 0,1
      longdream bench world-model --data maze --settings '{"learn.updates": 500}' --context 64 --json

    Args:
        data: recordings with poses (Memory Maze's layout)
        tasks: what is generated after the context
        mixers: names of worldmodel.mixer, hybrid/block-1 or hybrid/no-prefix
        seeds: of the runs
        context: frames that M is shown
        ahead: new frames of reasoning
        clips: held-out clips to judge by
        steps: denoising steps per generated frame (default: the preset's forcing.steps)
        context_level: level that M is told of frames it has generated (default: the preset's forcing.context_level)
        preset: what all runs have in common
        settings: more of that, '{"learn.updates": 500}'
        contexts: lengths at which cost is measured
        out: folder of the runs and pictures
        device: where to compute (default: as the preset says)

    Returns:
        rows: mixer, task, params, seed, updates, psnr, ssim, lpips (null without its weights), psnr_curve, ssim_curve,
        psnr_ceiling (of V, there and back), train_frames_per_s, wall_s. cost: mixer, context, train_ms_per_frame,
        generate_ms_per_frame, state_bytes, peak_bytes (null without CUDA). pictures.
    """
    if data is None:
        raise UserError("on what? Name a folder of recordings: --data DIR")
    for name in mixers:
        if name not in VARIANTS:
            raise UserError(
                f"--mixers: {name!r}" + options.suggest(name, VARIANTS, f": there are {', '.join(VARIANTS)}")
            )
    if (steps is not None and steps < 1) or not 0 <= (context_level or 0) <= 1:
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
        raise UserError(f"preset {preset}: video.condition must be pose: the way back is told by poses")
    where = device_of(common.device)
    ranges.check(common)
    common = _seeing(common, out / "encoder")
    shown = _clips(common, 1 + context + ahead, clips)
    similarity, rows = Similarity(where), []
    looks: dict[tuple[Task, int], dict[str, np.ndarray]] = {}
    for name in mixers:
        for seed in seeds:
            config = _variant(common, name, seed)
            folder = out / f"{name.replace('/', '-')}-s{seed}"
            known = _trained(config, folder)
            model, _, spec, _ = video_loop.load_model(folder, common.device)
            judged = _Judged(model, config, shown, context, ahead, steps or model.steps, context_level)
            for way in [name, ZEROED] if name == "hybrid" else [name]:
                for task in tasks:
                    row, frames = judged.judge(way, task, similarity)
                    rows.append({"mixer": way, "task": task, "seed": seed, **known, **row})
                    looks.setdefault((task, seed), {})[way] = frames
                    run.write(
                        out / "world-model.json", run.to_json({"rows": rows, "context": context}, indent=1) + "\n"
                    )
                    print(f"{way}, {task}, seed {seed}: {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}", file=sys.stderr)
    cost, speed = [], {}
    for name in mixers:
        learner = video_loop.ClipLearner(_variant(common, name, seeds[0]), spec)
        speed[name] = 1e3 / cost_of(learner, common.video.lengths[-1])["train_ms_per_frame"]
        cost += [{"mixer": name, "context": length, **cost_of(learner, length)} for length in contexts]
    for row in rows:
        row["train_frames_per_s"] = round(speed["hybrid" if row["mixer"] == ZEROED else row["mixer"]])
    pictures = [draw_curves(rows, task, context, out / f"{task}.png") for task in tasks]
    pictures += [
        draw_strip(frames, f"{task}, seed {seed}, after {context} frames", out / f"{task}-s{seed}-strip.png")
        for (task, seed), frames in looks.items()
    ]
    _tell(rows, cost, context, similarity)
    found = {"rows": rows, "cost": cost, "context": context, "pictures": [str(path) for path in pictures]}
    run.write(out / "world-model.json", run.to_json(found, indent=1) + "\n")
    return found


def _seeing(common: Config, folder: Path) -> Config:
    """The same, with the V that the run in `folder` has learned or now learns, where V is to be frozen after a warm-up
    of its own. M of that run is as small as can be, since nobody asks for it."""
    video, learn = common.video, common.learn
    if not video.freeze or not learn.warmup:
        return common
    length = min(video.lengths)
    alone = {"learn.updates": 1, "worldmodel.mixer": "window", "worldmodel.layers": 1, "compiled": False}
    alone |= {"video.lengths": (length,), "video.frames": max(length, learn.encoder_rows), "video.retrace": 0.0}
    _trained(options.update(common, alone), folder)
    return options.update(common, {"video.encoder": str(folder), "learn.warmup": 0})


def _variant(common: Config, name: str, seed: int) -> Config:
    more = VARIANTS[name] | {"worldmodel.matched": True, "seed": seed}
    config = options.update(common, more)
    ranges.check(config)
    return config


def _trained(config: Config, folder: Path) -> dict[str, Any]:
    """Train the run, or what is left of it; what its rows say of it."""
    if folder.exists():
        before = run.open_run(folder).config
        if before != config:
            raise UserError(f"{folder} holds a run of other settings: name another --out, or remove it")
    found = video_loop.train(config, folder, resume=folder.exists(), console=True)
    return {"params": found["parameters"], "updates": found["updates"], "wall_s": found["wall_s"]}


class _Judged(NamedTuple):
    """A trained run, and the held-out clips that it is judged by."""

    model: WorldModel
    config: Config
    rows: list[dict[str, np.ndarray]]
    context: int
    ahead: int
    steps: int
    level: float | None

    @torch.no_grad()
    def judge(self, way: str, task: Task, similarity: Similarity) -> tuple[dict[str, Any], np.ndarray]:
        """A row, and the first clip: truth above what was generated `(2, n, H, W, 3)`."""
        curves: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": [], "lpips": [], "ceiling": []}
        look = np.empty(0)
        device = next(self.model.parameters()).device
        with own_randomness(self.config.seed, device):
            for begin in range(0, len(self.rows), TOGETHER):
                real, kept, made = self._generate(self.rows[begin : begin + TOGETHER], way, task, device)
                for name, values in similarity(made, real).items():
                    curves[name].append(values)
                curves["ceiling"].append(similarity.psnr(kept, real))
                if not begin:
                    look = torch.stack([real[0], made[0]]).cpu().numpy()
        row: dict[str, Any] = {}
        for name in ("psnr", "ssim", "lpips"):
            curve = np.concatenate(curves[name]).mean(0) if curves[name] else None
            row[name] = None if curve is None else float(curve.mean())
            if name != "lpips":
                row[f"{name}_curve"] = None if curve is None else [round(float(v), 4) for v in curve]
        return row | {"psnr_ceiling": float(np.concatenate(curves["ceiling"]).mean()), "clips": len(self.rows)}, look

    def _generate(
        self, rows: list[dict[str, np.ndarray]], way: str, task: Task, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames after the context, `(B, n, H, W, 3)` uint8: the truth, through V and back, and generated."""
        stacked: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        images = torch.from_numpy(stacked.pop("image")).to(device)
        batch = Batch.of({"obs": {}, **stacked}, device)
        model, context = self.model, self.context
        # the row before the context is there for its pose alone: it tells from where the context's first frame was seen
        z, pose = model.encoder({"image": images[:, 1:]}), batch.prev_action()[:, 1:]
        if task == "retrieval":
            after = torch.arange(context - 2, -1, -1, device=device)
        else:
            after = torch.arange(context, context + self.ahead, device=device)
        chunk = model.dynamics.config.frames_together
        after = after[: len(after) // chunk * chunk]
        first = torch.zeros_like(batch.is_first[:, :context])
        feat, state = take_in(model.dynamics, z[:, :context], pose[:, :context], first)
        if way == ZEROED:
            state = state.without_long_memory()
        pieces = generate(
            model.objective,
            model.dynamics,
            feat,
            state,
            pose[:, after],
            self.steps,
            context_level=self.level,
            record=recorder(model, device),
        )
        made = torch.cat([model.encoder.decode(piece.z)["image"] for piece in pieces], 1)
        return images[:, 1:][:, after], model.encoder.decode(z[:, after])["image"], made


def _clips(config: Config, length: int, clips: int) -> list[dict[str, np.ndarray]]:
    """Clips of held-out recordings, the same ones for every run on this data.

    Raises:
        UserError: no recordings, none that is long enough, or none that can be read.
    """
    video = config.video
    library = open_library(Path(video.data), video.layout, video.condition, video.choices, video.actions)
    _, held_out = library.held_out(video.held_out)
    fits = [recording for recording in held_out if recording.length >= length]
    if not fits:
        longest = max((recording.length for recording in held_out), default=0)
        raise UserError(f"--context and --ahead need {length} rows; the longest held-out recording has {longest}")
    rng, found = np.random.default_rng(0), []
    for i in range(clips):
        recording = fits[i % len(fits)]
        start = int(rng.integers(recording.length - length + 1))
        try:
            found.append(read_clip(library, recording, start, length, video.size))
        except Damaged as error:
            print(f"warning: {recording.path} {error}: it is left out", file=sys.stderr)
    if not found:
        raise UserError(f"none of the held-out recordings in {library.root} can be read")
    return found


def _tell(rows: list[dict[str, Any]], cost: list[dict[str, Any]], context: int, similarity: Similarity) -> None:
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
