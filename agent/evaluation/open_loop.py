"""Evaluation of V and M on held-out recordings: PSNR of their predictions, and some of these as pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longdream.agent.config.schema import VideoConfig
from longdream.agent.core.device import own_randomness
from longdream.agent.core.learner import Learner
from longdream.agent.core.ranks import here
from longdream.agent.data.video.library import Library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.reader import Damaged, Recording
from longdream.agent.evaluation.comparison import Comparison, psnr
from longdream.agent.run.signals import Signals
from longdream.envs.contract import UserError
from longdream.worldmodel.generate import generate, read_context
from longdream.worldmodel.types import Batch

TOGETHER = 8
"""Clips that are evaluated at a time."""
WAYS = ("reconstruction", "one_step", "open_loop", "still")
"""Ways to predict the frames after the context, see OpenLoop."""


@dataclass
class OpenLoop:
    """Results on held-out clips.

    psnr: for each way to predict the frames after the context, the PSNR of each frame, `(horizon,)` in dB, a mean over
        clips. reconstruction: V's encoder and decoder. one_step: M, given all true frames before. open_loop: M, given
        only the context. still: the last frame of the context repeated, the baseline.
    drawn: the first clips, for pictures.
    """

    psnr: dict[str, np.ndarray]
    clips: int
    drawn: list[Comparison]

    def means(self) -> dict[str, float]:
        """Means over the frames."""
        return {f"psnr_{way}": float(curve.mean()) for way, curve in self.psnr.items()}


def check_held_out(recordings: list[Recording], config: VideoConfig) -> None:
    """Raise UserError if no held-out recording is long enough for the evaluation."""
    longest_recording = max(recordings, key=lambda recording: recording.length)
    if longest_recording.length < config.context + config.horizon:
        raise UserError(
            f"video.context + video.horizon = {config.context + config.horizon} rows, and the longest held-out "
            f"recording, {longest_recording.name}, has {longest_recording.length}: lower these"
        )


@torch.no_grad()
def evaluate_open_loop(
    learner: Learner, library: Library, recordings: list[Recording], clips: int, drawn: int, signals: Signals
) -> OpenLoop | None:
    """Evaluate on `clips` clips, always the same ones of these recordings, of which each rank takes some. The random
    state of training is unchanged.

    None if none of them can be read: a damaged file does not end a run.

    Args:
        drawn: number of clips to return for pictures.

    Raises:
        Interrupted: a signal was received.
    """
    config = learner.config.video
    seed = learner.config.seed
    length = config.context + config.horizon
    rng = np.random.default_rng(seed)
    fits = [recording for recording in recordings if recording.length >= length]
    places = [(fits[i % len(fits)], float(share)) for i, share in enumerate(rng.random(clips))]
    mine = here().span(clips)
    places = places[mine.start : mine.stop]
    totals = {way: np.zeros(config.horizon) for way in WAYS}
    examples: list[Comparison] = []
    count = 0
    # clips have other lengths than in training, for which the compiled layers would be compiled again
    with (
        here().together(),
        own_randomness(seed, learner.device),
        torch.compiler.set_stance("force_eager"),
    ):
        for i in range(0, len(places), TOGETHER):
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
                totals[way] += psnr(np.square(error).mean((2, 3, 4))).sum(0)
            for b in range(min(len(rows), drawn - len(examples))):
                examples.append(_comparison(learner, {name: images[b] for name, images in frames.items()}))
    everywhere = here().gather([count, [totals[way].tolist() for way in WAYS]])
    count = sum(part[0] for part in everywhere)
    totals = {way: np.sum([part[1][i] for part in everywhere], axis=0) for i, way in enumerate(WAYS)}
    if not count:
        return None
    return OpenLoop({way: total / count for way, total in totals.items()}, count, examples)


def _predict(learner: Learner, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Predicted frames by way, uint8 `(B, horizon, ...)`, and the clips: `real`, and `kept`, V's reconstructions."""
    model = learner.model
    context = learner.config.video.context
    stacked: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    stacked["obs"] = {"image": stacked.pop("image")}
    batch = Batch.of(stacked, learner.device)
    z = model.encoder(batch.obs)
    prev = batch.prev_action()
    first = batch.clip_first()
    dynamics = model.dynamics
    feat, state = read_context(dynamics, z[:, :context], prev[:, :context], first[:, :context])
    open_loop = [piece.z for piece in generate(model.objective, dynamics, feat, state, prev[:, context:], model.steps)]
    one_step = []
    for t in range(context, z.shape[1], dynamics.config.chunk_frames):
        now = slice(t, t + dynamics.config.chunk_frames)
        one_step += [piece.z for piece in generate(model.objective, dynamics, feat, state, prev[:, now], model.steps)]
        feat, state = read_context(dynamics, z[:, now], prev[:, now], first[:, now], state)

    def images(latents: torch.Tensor) -> np.ndarray:
        return model.encoder.decode(latents)["image"].cpu().numpy()

    real = stacked["obs"]["image"]
    kept = images(z)
    return {
        "real": real,
        "kept": kept,
        "reconstruction": kept[:, context:],
        "one_step": images(torch.cat(one_step, 1)),
        "open_loop": images(torch.cat(open_loop, 1)),
        "still": np.repeat(real[:, context - 1 : context], z.shape[1] - context, 1),
    }


def _comparison(learner: Learner, frames: dict[str, np.ndarray]) -> Comparison:
    """One clip and the dream of it, from its frames by way."""
    context = learner.config.video.context
    real = frames["real"]
    kept = frames["kept"]
    dreamt = np.concatenate([kept[:context], frames["open_loop"]])
    zeros = np.zeros(len(real))
    return Comparison(
        learner.spec,
        context,
        {"image": real},
        {"image": kept},
        {"image": dreamt},
        reward=zeros,
        expected=zeros,
        alive=zeros,
        going_on=zeros,
        rewarded=False,
    )
