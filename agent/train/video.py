"""Training on recorded video, without an environment: V and M learn from clips, and are evaluated on held-out ones."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from longdream.agent.config.schema import Config
from longdream.agent.core.device import autocast
from longdream.agent.core.learner import Finite, Learner, Metrics
from longdream.agent.core.ranks import here
from longdream.agent.data.video.kept import Kept
from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import Loader, Place, check_lengths
from longdream.agent.data.video.transfer import Transfer
from longdream.agent.evaluation.open_loop import OpenLoop, check_held_out, evaluate_open_loop
from longdream.agent.evaluation.pictures import drawings
from longdream.agent.evaluation.plots import film, film_path, save_film, save_picture, sheet
from longdream.agent.evaluation.plots import stack as stacked
from longdream.agent.run import folder as run_folder
from longdream.agent.run.signals import Signals
from longdream.agent.train.trainer import LINES, Trainer
from longdream.envs.contract import EnvSpec, ObsSpec, UserError
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.types import Batch, Loss

DRAWN = 4
"""Held-out clips that are drawn at the end."""
HELD_OUT = 0.1
"""Share of the recordings that nothing is learned from, to evaluate on."""


def load_model(folder: Path | str, device: str | None = None) -> tuple[WorldModel, Config, EnvSpec, int]:
    """V and M of a run on video as they were last saved; its config, spec, and updates done.

    Raises:
        UserError: no such run. CheckpointError: nothing in it yet that can be used.
    """
    run = run_folder.open_run(folder)
    if run.config.kind != "video":
        raise UserError(f"{folder} was not trained on video")
    saved, updates = run.saved
    config = run.config if device is None else replace(run.config, device=device)
    with run_folder.fitting(run.folder, saved):
        learner = Learner(replace(config, compiled=False), run.spec)
    run_folder.fill(learner, saved, run.folder, weights_only=True)
    return learner.model, config, run.spec, updates


class ClipLearner(Learner):
    """V and M, learning from clips. state: M's after the last clips, where it is carried to the next."""

    state: State | None = None

    def update(self, batch: Batch, encoder: bool, model: bool, rate_scale: float) -> Metrics:
        """One update of V (`encoder`) and of M (`model`), each by its own loss; metrics as scalar tensors.

        Raises:
            NotFinite: after some updates in a row whose loss or gradient was not finite.
        """
        return self.apply(self._update, (encoder, model), batch, rate_scale)

    def _update(self, batch: Batch, stage: tuple[bool, bool]) -> tuple[Metrics, Finite]:
        metrics: Metrics = {}
        finite: Finite = True
        encoder, model = stage
        if encoder:
            with self.timed("encoder"):
                finite = self.step("encoder", self.model.encoder.loss(self.encoder_rows(batch)), metrics)
            metrics["encoder/psnr"] = -10 * metrics["encoder/reconstruction/image"].log10()
        if model:
            with self.timed("model"):
                finite = finite & self.step("model", self._model_loss(batch), metrics)
        # the state after an update that was skipped may not be finite: start again from zero
        if self.state is not None:
            kept = torch.as_tensor(finite, device=self.device)
            self.state = self.state.map(lambda t: torch.where(kept, t, torch.zeros_like(t)))
        return metrics, finite

    def _model_loss(self, batch: Batch) -> Loss:
        state = self.state
        clips = len(batch.reward)
        if self.config.video.carry and (state is None or len(state.age) != clips):
            state = self.model.dynamics.initial(clips)
        with autocast(self.config.precision, self.device):
            loss, out = self.model.clip_loss(batch, 0, state=state)
        self.state = out.end
        return loss


class VideoTrainer(Trainer):
    """V and M learn from clips of the recordings in `config.video.data`. The folder is a run, though nobody acts in it;
    `load_model` opens it.

    Raises:
        UserError: the recordings cannot be used, or are not those of the checkpoint.
    """

    SHOWN = ("encoder/psnr", "model/prediction", "held_out/psnr_open_loop")
    learner: ClipLearner

    def __init__(self, config: Config, folder: Path, saved: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        super().__init__(config, folder, saved, signals, stack)
        config = here().share(config)
        video = config.video
        self.count = {"frames": 0} | self.count
        self.library = open_library(Path(video.data), video.layout, video.condition, video.actions)
        if video.keep == "memory":
            self.library.reader = Kept(self.library.reader)
        self.learned, self.held_out = self.library.held_out(HELD_OUT if video.held_out_clips else 0.0)
        for length in video.lengths:
            check_lengths(self.learned, self.library.root, length)
        if self.held_out:
            check_held_out(self.held_out, video)
        spec = EnvSpec({"image": ObsSpec("image", (video.size, video.size, 3))}, self.library.reader.action)
        if not self.library.rewarded:  # then nothing is known of ends either
            config = replace(config, heads=replace(config.heads, reward_weight=0.0))
        self.learner = ClipLearner(config, spec)
        if self.learner.model.trains_encoder:
            raise UserError(
                f"forcing.objective = {config.forcing.objective}: V would learn through M, and on video it learns "
                f"alone; use flow, mask or teacher"
            )
        if video.encoder and not saved:
            self._load_encoder(video.encoder)
        self.files = [[recording.name, recording.length] for recording in self.library.recordings]
        self.reported: set[str] = set()
        """Damaged files that were named on the console."""
        place = self._check_recordings(saved) if saved else None
        self.transfer = Transfer(self.learner.device)
        self.loader = Loader(
            self.library,
            self.learned,
            self.plan,
            video.size,
            config.seed,
            video.carry,
            saved["counters"]["updates"] if saved else 0,
            place,
            video.retrace,
            here().rank,
            here().count,
            self.transfer.bring,
        )
        stack.callback(self.loader.close)
        self.waited = 0.0

    def _load_encoder(self, folder: str) -> None:
        """Take over V of another run on video.

        Raises:
            UserError: no such run, or its V is another one.
        """
        model, config, spec, _ = load_model(folder, "cpu")
        if config.encoder != self.config.encoder or spec.obs != self.learner.spec.obs:
            raise UserError(f"video.encoder = {folder}: its encoder.* and video.size must be those of this run")
        self.learner.model.encoder.load_state_dict(model.encoder.state_dict())

    def _check_recordings(self, saved: dict[str, Any]) -> Place:
        """The place among the clips at which the checkpoint was saved.

        Raises:
            UserError: the recordings are others than then.
        """
        clips = saved["clips"]
        if clips["files"] != self.files or saved["spec"] != self.learner.spec.to_json():
            raise UserError(
                f"{self.config.video.data} holds other recordings than when {self.folder} was saved: put them back, or "
                f"begin anew"
            )
        self.library.damaged.update(clips["damaged"])
        self.reported = set(clips["damaged"])
        line = () if "lost" in saved else tuple(map(tuple, clips["place"]["line"]))
        return Place(**clips["place"] | {"line": line})

    @staticmethod
    def total(config: Config) -> int:
        return config.learn.warmup + config.learn.updates

    def plan(self, update: int) -> tuple[int, int]:
        """Frames of a clip, and clips of all ranks, of the batch of an update: V's warm-up has those of the first
        stage."""
        video = self.config.video
        learn = self.config.learn
        stage = max(0, update - learn.warmup) * len(video.lengths) // learn.updates
        length = video.lengths[min(stage, len(video.lengths) - 1)]
        return length, video.frames // length

    def greeting(self, progress: int) -> str:
        text = f"{super().greeting(progress)}, on {self.config.video.data} (layout {self.library.layout}): "
        text += f"{len(self.learned)} recordings to learn from, {len(self.held_out)} held out"
        if short := self.loader.too_short(min(self.config.video.lengths)):
            text += f", {short} of them shorter than every clip"
        return text

    def turn(self) -> None:
        self._report_damaged()
        began = time.perf_counter()
        batch = self.transfer.take(self.loader.next().rows)
        self.waited += time.perf_counter() - began
        self._report_damaged()
        warm = self.learner.updates >= self.config.learn.warmup
        self.count["frames"] += here().count * batch.reward.numel()
        metrics = self.learner.update(batch, not (warm and self.config.video.freeze), warm, self.rate_scale())
        self.averages.add(metrics, self.learner.finite)

    def report(self) -> None:
        """A line of metrics, and an evaluation, where it is time for them."""
        evaluations = self.config.evaluate.times if self.held_out else 0
        metrics: dict[str, Any] = {}
        if self.is_due("evaluated", evaluations + 1, before_the_end=True):
            result = self._evaluate(1)
            metrics = {f"held_out/{key}": value for key, value in result.means().items()} if result else {}
            if result:
                self.logger.draw(self.progress, drawings(result.drawn[0]))
            self.count["evaluated"] = self.progress
        if not self.is_due("logged", LINES) and not metrics:
            return
        place = self.loader.place
        metrics |= {"count/frames": self.count["frames"], "count/epoch": place.epoch, "count/length": place.clip}
        metrics |= {"count/damaged": len(self.library.damaged), "count/too_short": self.loader.too_short(place.clip)}
        seconds = self.learner.seconds | {"wait": self.waited}
        self.write(metrics | {f"time/{key}": value for key, value in seconds.items()})

    def state(self) -> dict[str, Any]:
        state = self.learner.state
        return {
            "spec": self.learner.spec.to_json(),
            "clips": {"files": self.files, "place": asdict(self.loader.place), "damaged": dict(self.library.damaged)},
            "carried": None if state is None else dict(state._asdict()),
        }

    def restore(self, saved: dict[str, Any]) -> list[str]:
        if saved["carried"] and "lost" not in saved:
            self.learner.state = State(**saved["carried"]).map(lambda t: t.to(self.learner.device))
        return []

    def finish(self) -> dict[str, Any]:
        """Evaluate on the held-out recordings, and draw some of them."""
        config = self.config
        library = self.library
        summary: dict[str, Any] = {"data": config.video.data, "layout": library.layout, "seed": config.seed}
        summary |= {"recordings": len(self.learned), "held_out": len(self.held_out), "frames": self.count["frames"]}
        summary |= {"parameters": sum(p.numel() for p in self.learner.model.dynamics.parameters())}
        result: OpenLoop | None = None
        if self.held_out:
            clips = config.video.held_out_clips
            self.logger.note(f"evaluating on {clips} clips of {len(self.held_out)} held-out recordings")
            result = self._evaluate(DRAWN)
        if result:
            summary |= result.means() | {"context": config.video.context, "clips": result.clips}
            summary["curves"] = {way: [round(float(v), 3) for v in curve] for way, curve in result.psnr.items()}
            self.logger.write(self.progress, {f"final/{key}": value for key, value in result.means().items()})
            summary |= {} if here().rank else self._draw(result)
        return self.conclude(summary | {"damaged": len(library.damaged)})

    def _evaluate(self, drawn: int) -> OpenLoop | None:
        clips = self.config.video.held_out_clips
        result = evaluate_open_loop(self.learner, self.library, self.held_out, clips, drawn, self.signals)
        self._report_damaged()
        if result is None:
            self.logger.note("warning: none of the held-out recordings can be read: nothing is evaluated")
        return result

    def _draw(self, result: OpenLoop) -> dict[str, str]:
        """Held-out clips beside the dreams of them, as video and as picture: where these are; nothing if they cannot be
        written."""
        context = self.config.video.context
        title = f"{self.library.layout}, held out   {context} frames, then a dream under the same actions"
        video = film_path(self.folder / "videos" / "held-out.mp4")
        with self.logger.view(str(video)):
            save_film(video, (frame for clip in result.drawn for frame in film(clip, title)), fps=10)
            save_picture(video.with_suffix(".png"), stacked([sheet(clip, title) for clip in result.drawn]))
            return {"video": str(video), "picture": str(video.with_suffix(".png"))}
        return {}

    def _report_damaged(self) -> None:
        for name, why in self.library.damaged.items():
            if name not in self.reported:
                self.reported.add(name)
                self.logger.note(f"warning: {self.library.root / name} {why}: it is left out")
