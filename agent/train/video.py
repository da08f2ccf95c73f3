"""The loop without an environment: V and M learn from clips of recorded video, and are judged by those held out."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longdream.agent.cli.report import show_table
from longdream.agent.config.schema import Config
from longdream.agent.core.learner import Learner
from longdream.agent.data.video.kept import Kept
from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import Loader, Place, check_lengths
from longdream.agent.data.video.transfer import Transfer
from longdream.agent.evaluation.open_loop import Judgement, check_held_out, judge
from longdream.agent.evaluation.plots import film, save_film, save_picture, sheet, stack
from longdream.agent.run import folder as run
from longdream.agent.run.signals import Signals
from longdream.agent.train.trainer import UpdateLoop
from longdream.envs.contract import EnvSpec, ObsSpec, UserError
from longdream.worldmodel.dynamics import State
from longdream.worldmodel.model import WorldModel
from longdream.worldmodel.types import Batch, Loss

CONCERNS = (
    "seed",
    "device",
    "exact",
    "bfloat16",
    "compiled",
    "recorded",
    "threads",
    "video.",
    "encoder.",
    "worldmodel.",
    "forcing.",
)
CONCERNS += (
    "heads.hidden",
    "heads.bins",
    "heads.reward_weight",
    "heads.cont_weight",
    "learn.updates",
    "learn.warmup",
    "learn.agc",
)
CONCERNS += ("learn.encoder_rows", "learn.encoder_rate", "learn.model_rate", "learn.decay", "evaluate.every")
CONCERNS += ("evaluate.episodes", "evaluate.final_episodes", "evaluate.log_every", "evaluate.save_seconds")
"""Settings that such a run heeds."""
LOOKS = 4
"""Held-out clips that are drawn at the end."""


def check(config: Config, given: Any) -> None:
    """Raise UserError where settings (dotted names) were given that mean nothing to this run, or data is missing."""
    if not config.video.lengths:
        if foreign := [name for name in given if name.startswith("video.")]:
            raise UserError(
                f"--{foreign[0]}: this run learns in an environment; presets video-... learn from recordings"
            )
        return
    if foreign := [name for name in given if not name.startswith(CONCERNS)]:
        raise UserError(f"--{foreign[0]} means nothing to a run that learns from recordings: leave it out")
    if not config.video.data:
        raise UserError("learn from what? Name a folder of recordings: --data DIR")


def train(config: Config, folder: Path, resume: bool = False, console: bool = True) -> dict[str, Any]:
    """Train V and M of `config` on the recordings in `config.video.data`; returns what is also written to summary.json.

    The folder is a run, though nobody acts in it; `load_model` opens it. It resumes as online.train does, exactly.

    Raises:
        UserError: the configuration, the folder or the recordings cannot be used.
        Interrupted, NotFinite, DiskFull: as online.train.
    """
    return VideoTraining.train(config, folder, resume, console)


def load_model(folder: Path | str, device: str | None = None) -> tuple[WorldModel, Config, EnvSpec, int]:
    """V and M of a run on video as they were last saved; its config, spec, and updates done.

    Raises:
        UserError: no such run. CheckpointError: nothing in it yet that can be used.
    """
    opened = run.open_run(folder)
    if not opened.config.video.lengths:
        raise UserError(f"{folder} was not trained on video")
    tree, updates = opened.saved
    config = opened.config if device is None else replace(opened.config, device=device)
    learner = Learner(replace(config, compiled=False), opened.spec)
    run.fill(learner, tree, opened.folder, weights_only=True)
    return learner.model, config, opened.spec, updates


class ClipLearner(Learner):
    """V and M, learning from clips. `state`: M's after the last clips, where they are carried on."""

    state: State | None = None

    def update(self, batch: Batch, see: bool, predict: bool, pace: float) -> dict[str, Tensor]:
        """One update of V (`see`) and of M (`predict`), each by its own loss; its metrics as scalar tensors.

        Raises:
            NotFinite: after some updates in a row whose loss or gradient was not finite.
        """
        return self._make((see, predict), partial(self._update, see=see, predict=predict), batch, pace)

    def _update(self, batch: Batch, see: bool, predict: bool) -> tuple[dict[str, Tensor], Tensor | bool]:
        metrics: dict[str, Tensor] = {}
        ok: Tensor | bool = True
        if see:
            ok = self._learn_to_see(metrics, batch)
            metrics["encoder/psnr"] = -10 * metrics["encoder/reconstruction/image"].log10()
        if predict:
            ok = ok & self._learn("model", metrics, lambda: self._model_loss(batch))
        if self.state is not None:  # what is carried from an update that was skipped may not be finite: begin anew
            kept = torch.as_tensor(ok, device=self.device)
            self.state = self.state.map(lambda t: torch.where(kept, t, torch.zeros_like(t)))
        return metrics, ok

    def _model_loss(self, batch: Batch) -> Loss:
        state, clips = self.state, len(batch.reward)
        if self.config.video.carry and (state is None or len(state.age) != clips):
            state = self.model.dynamics.initial(clips)
        with self.half_precision():
            loss, out = self.model.study(batch, 0, state=state)
        self.state = out.end
        return loss


class VideoTraining(UpdateLoop):
    """V and M in training on clips."""

    SHOW = ("encoder/psnr", "model/prediction", "held_out/psnr_open_loop")
    learner: ClipLearner

    def __init__(self, config: Config, folder: Path, tree: dict[str, Any] | None, signals: Signals, stack: ExitStack):
        super().__init__(config, folder, tree, signals, stack)
        video = config.video
        self.count = {"frames": 0} | self.count
        self.library = open_library(Path(video.data), video.layout, video.condition, video.choices, video.actions)
        if video.keep == "memory":
            self.library.reader = Kept(self.library.reader)
        self.learned, self.held_out = self.library.held_out(video.held_out)
        for length in video.lengths:
            check_lengths(self.learned, self.library.root, length)
        if self.held_out:
            check_held_out(self.held_out, video)
        reader = self.library.reader
        spec = EnvSpec({"image": ObsSpec("image", (video.size, video.size, 3))}, reader.action)
        if not self.library.rewarded:  # then nothing is known of ends either
            config = replace(config, heads=replace(config.heads, reward_weight=0.0, cont_weight=0.0))
        self.learner = ClipLearner(config, spec)
        if video.encoder and not tree:
            self._see_as(video.encoder)
        self.files = [[recording.name, recording.length] for recording in self.library.recordings]
        self.told: set[str] = set()
        """Damaged files that were named."""
        place = None
        if tree:
            saved = tree["clips"]
            if saved["files"] != self.files or tree["spec"] != spec.to_json():
                raise UserError(
                    f"{video.data} holds other recordings than when {folder} was saved: put them back, or begin anew"
                )
            self.library.damaged.update(saved["damaged"])
            self.told = set(saved["damaged"])
            place = Place(**saved["place"] | {"line": tuple(map(tuple, saved["place"]["line"]))})
        updates = tree["counters"]["updates"] if tree else 0
        self.transfer = Transfer(self.learner.device)
        self.loader = Loader(
            self.library,
            self.learned,
            self.plan,
            video.size,
            config.seed,
            video.carry,
            updates,
            place,
            video.retrace,
            self.transfer.bring,
        )
        stack.callback(self.loader.close)
        self.waited = 0.0

    def _see_as(self, folder: str) -> None:
        """Take over V of another run on video.

        Raises:
            UserError: no such run, or its V is another one.
        """
        model, known, spec, _ = load_model(folder, "cpu")
        mine = self.learner
        if known.encoder != self.config.encoder or spec.obs != mine.spec.obs:
            raise UserError(f"video.encoder = {folder}: its encoder.* and video.size must be those of this run")
        mine.model.encoder.load_state_dict(model.encoder.state_dict())

    @staticmethod
    def total(config: Config) -> int:
        return config.learn.warmup + config.learn.updates

    def plan(self, update: int) -> tuple[int, int]:
        """Frames of a clip, and clips, of the batch of an update: V's warm-up has those of the first stage."""
        video, learn = self.config.video, self.config.learn
        stage = max(0, update - learn.warmup) * len(video.lengths) // learn.updates
        length = video.lengths[min(stage, len(video.lengths) - 1)]
        return length, video.frames // length

    def greeting(self) -> str:
        short = self.loader.too_short(min(self.config.video.lengths))
        told = f"{len(self.learned)} recordings to learn from, {len(self.held_out)} held out"
        if short:
            told += f", {short} of them shorter than every clip"
        return f"{super().greeting()}, on {self.config.video.data} (layout {self.library.layout}): {told}"

    def update(self) -> dict[str, Any]:
        self._tell_damaged()
        began = time.perf_counter()
        batch = self.transfer.take(self.loader.next().rows)
        self.waited += time.perf_counter() - began
        self._tell_damaged()
        learner, config = self.learner, self.config
        warm = learner.updates >= config.learn.warmup
        self.count["frames"] += batch.reward.numel()
        return learner.update(batch, not (warm and config.video.freeze), warm, self.pace())

    def log(self) -> None:
        """A line of metrics, and a judgement, where it is time for them."""
        updates, clock, total = self.learner.updates, self.config.evaluate, self.total(self.config)
        judged = self.held_out and clock.every and not updates % clock.every and updates < total
        if updates % clock.log_every and updates < total and not judged:
            return
        found = (
            {f"held_out/{key}": value for key, value in self._judge(clock.episodes, 0).means().items()}
            if judged
            else {}
        )
        place, seconds = self.loader.place, self.learner.seconds | {"wait": self.waited}
        counts = {"frames": self.count["frames"], "epoch": place.epoch, "length": place.clip}
        counts |= {"damaged": len(self.library.damaged), "too_short": self.loader.too_short(place.clip)}
        told = {f"count/{key}": value for key, value in counts.items()}
        self.write(found | told | {f"time/{key}": value for key, value in seconds.items()})

    def state(self) -> dict[str, Any]:
        state = self.learner.state
        return {
            "clips": {"files": self.files, "place": asdict(self.loader.place), "damaged": dict(self.library.damaged)},
            "carried": None if state is None else dict(state._asdict()),
        }

    def restore(self, tree: dict[str, Any]) -> None:
        if tree["carried"]:
            self.learner.state = State(**tree["carried"]).map(lambda t: t.to(self.learner.device))

    def finish(self) -> dict[str, Any]:
        """Judge by the held-out recordings, and draw some of them."""
        config, library = self.config, self.library
        found: dict[str, Any] = {"data": config.video.data, "layout": library.layout, "seed": config.seed}
        found |= {"recordings": len(self.learned), "held_out": len(self.held_out), "frames": self.count["frames"]}
        found |= {"parameters": sum(p.numel() for p in self.learner.model.dynamics.parameters())}
        if self.held_out:
            clips = config.evaluate.final_episodes
            self.logger.note(f"judging by {clips} clips of {len(self.held_out)} held-out recordings")
            judged = self._judge(clips, LOOKS)
            found |= judged.means() | {"context": config.video.context, "clips": judged.clips}
            found["curves"] = {way: [round(float(v), 3) for v in curve] for way, curve in judged.psnr.items()}
            self.logger.write(self.learner.updates, {f"final/{key}": value for key, value in judged.means().items()})
            found |= self._draw(judged)
        return self.conclude(found | {"damaged": len(library.damaged)})

    def _judge(self, clips: int, looks: int) -> Judgement:
        judged = judge(self.learner, self.library, self.held_out, clips, looks, self.signals)
        self._tell_damaged()
        return judged

    def _draw(self, judged: Judgement) -> dict[str, str]:
        """Held-out clips beside the dreams of them, as video and as picture: where these are."""
        title = (
            f"{self.library.layout}, held out   {self.config.video.context} frames, then a dream under the same actions"
        )
        video = self.folder / "videos" / "held-out.mp4"
        save_film(video, (frame for look in judged.looks for frame in film(look, title)), fps=10)
        save_picture(video.with_suffix(".png"), stack([sheet(look, title) for look in judged.looks]))
        return {"video": str(video), "picture": str(video.with_suffix(".png"))}

    def _tell_damaged(self) -> None:
        for name, why in self.library.damaged.items():
            if name not in self.told:
                self.told.add(name)
                self.logger.note(f"warning: {self.library.root / name} {why}: it is left out")


def summary_table(summary: dict[str, Any]) -> None:
    """Print what the summary of such a run says."""
    rows = []
    for way, label, remark in (
        ("open_loop", "open loop", "PSNR in dB of held-out frames after the context: M on its own"),
        ("one_step", "one step", "M, shown all true frames before"),
        ("still", "still", "the last frame of the context, to compare with"),
        ("reconstruction", "reconstruction", "V alone, there and back"),
    ):
        if f"psnr_{way}" in summary:
            rows.append((label, f"{summary[f'psnr_{way}']:.2f}", remark))
    rows.append(("frames", f"{summary['frames']:,}", f"{summary['updates']:,} updates, {summary['wall_s']:,.0f} s"))
    rows.append(("recordings", str(summary["recordings"]), f"and {summary['held_out']} held out"))
    if summary["damaged"]:
        rows.append(("damaged", str(summary["damaged"]), "files left out"))
    for key in ("run", "video", "picture"):
        if summary.get(key):
            rows.append((key, summary[key], ""))
    show_table(f"{summary['data']} ({summary['layout']})", rows)
