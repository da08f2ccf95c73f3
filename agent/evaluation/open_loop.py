"""What V and M make of recordings that they never learned from: how near it comes, and a look at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longdream.agent.config.schema import VideoConfig
from longdream.agent.core.learner import Learner, own_randomness
from longdream.agent.data.video.library import Library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.reader import Damaged, Recording
from longdream.agent.evaluation.comparison import Comparison, psnr
from longdream.agent.run.signals import Signals
from longdream.envs.contract import UserError
from longdream.worldmodel.generate import generate, take_in
from longdream.worldmodel.types import Batch

TOGETHER = 8
"""Clips that are judged at once."""
WAYS = ("reconstruction", "one_step", "open_loop", "still")


@dataclass
class Judgement:
    """Over held-out clips: of each way to come by the frames after the context, its PSNR at each of them, `(horizon,)`
    in dB, a mean over clips.

    reconstruction: through V and back. one_step: M, shown all true frames before. open_loop: M on its own. still: the
    last frame of the context, again and again; what there is to beat. looks: the first clips, to be drawn.
    """

    psnr: dict[str, np.ndarray]
    clips: int
    looks: list[Comparison]

    def means(self) -> dict[str, float]:
        """Over the frames."""
        return {f"psnr_{way}": float(curve.mean()) for way, curve in self.psnr.items()}


def check_held_out(recordings: list[Recording], config: VideoConfig) -> None:
    """Raise UserError where no recording is long enough to be judged by."""
    longest = max(recordings, key=lambda recording: recording.length)
    if longest.length < config.context + config.horizon:
        raise UserError(
            f"video.context + video.horizon = {config.context + config.horizon} rows, and the longest held-out "
            f"recording, {longest.name}, has {longest.length}: lower these"
        )


@torch.no_grad()
def judge(
    learner: Learner, library: Library, recordings: list[Recording], clips: int, looks: int, signals: Signals
) -> Judgement:
    """Judge by `clips` clips, always the same ones of these recordings; training does not notice it.

    Raises:
        UserError: nothing is left that can be read. Interrupted: a signal came.
    """
    config, seed = learner.config.video, learner.config.seed
    length, rng = config.context + config.horizon, np.random.default_rng(seed)
    fits = [recording for recording in recordings if recording.length >= length]
    places = [(fits[i % len(fits)], float(share)) for i, share in enumerate(rng.random(clips))]
    squares, seen, count = {way: np.zeros(config.horizon) for way in WAYS}, [], 0
    # compiled layers are for the clips of training: these have other lengths, each of which would be compiled for
    with own_randomness(seed, learner.device), torch.compiler.set_stance("force_eager"):
        for i in range(0, clips, TOGETHER):
            signals.check()
            rows = []
            for recording, share in places[i : i + TOGETHER]:
                start = int(share * (recording.length - length + 1))
                try:
                    rows.append(read_clip(library, recording, start, length, config.size))
                except Damaged as error:
                    library.damaged[recording.name] = str(error)
            if not rows:
                continue
            frames = _predict(learner, rows)
            count += len(rows)
            for way in WAYS:
                error = frames[way].astype(np.float32) - frames["real"][:, config.context :]
                squares[way] += psnr(np.square(error).mean((2, 3, 4))).sum(0)
            for b in range(min(len(rows), looks - len(seen))):
                seen.append(_look(learner, {name: images[b] for name, images in frames.items()}))
    if not count:
        raise UserError(f"none of the held-out recordings in {library.root} can be read")
    return Judgement({way: total / count for way, total in squares.items()}, count, seen)


def _predict(learner: Learner, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Frames uint8, by way `(B, horizon, ...)`; `real` and `kept`, those through V, from the context's first one on."""
    model, context = learner.model, learner.config.video.context
    stacked: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    stacked["obs"] = {"image": stacked.pop("image")}
    batch = Batch.of(stacked, learner.device)
    z, prev, first = model.encoder(batch.obs), batch.prev_action(), batch.clip_first()
    dynamics = model.dynamics
    feat, state = take_in(dynamics, z[:, :context], prev[:, :context], first[:, :context])
    alone = generate(model.objective, dynamics, feat, state, prev[:, context:], model.steps)
    dreamt, guessed = [piece.z for piece in alone], []
    for t in range(context, z.shape[1], dynamics.config.frames_together):
        now = slice(t, t + dynamics.config.frames_together)
        guessed += [piece.z for piece in generate(model.objective, dynamics, feat, state, prev[:, now], model.steps)]
        feat, state = take_in(dynamics, z[:, now], prev[:, now], first[:, now], state)

    def images(latents: torch.Tensor) -> np.ndarray:
        return model.encoder.decode(latents)["image"].cpu().numpy()

    real, kept = stacked["obs"]["image"], images(z)
    return {
        "real": real,
        "kept": kept,
        "reconstruction": kept[:, context:],
        "one_step": images(torch.cat(guessed, 1)),
        "open_loop": images(torch.cat(dreamt, 1)),
        "still": np.repeat(real[:, context - 1 : context], z.shape[1] - context, 1),
    }


def _look(learner: Learner, frames: dict[str, np.ndarray]) -> Comparison:
    """A clip beside the dream of it."""
    context, real, kept = learner.config.video.context, frames["real"], frames["kept"]
    dreamt, nothing = np.concatenate([kept[:context], frames["open_loop"]]), np.zeros(len(real))
    return Comparison(
        learner.spec,
        context,
        {"image": real},
        {"image": kept},
        {"image": dreamt},
        reward=nothing,
        expected=nothing,
        alive=nothing,
        going_on=nothing,
        rewarded=False,
    )
