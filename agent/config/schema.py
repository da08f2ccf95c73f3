"""What a run is made of: every part's own configuration, and the run's.

A field says here, or where its part is configured, all that there is to know of it: type, default, range, the kinds of
runs that it concerns (`Mode`; without one, all), and whether a run that is resumed may change it (`OnResume`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Interval

from longdream.controller.config import ControllerConfig
from longdream.worldmodel.config import DynamicsConfig, EncoderConfig, ForcingConfig, HeadsConfig
from longdream.worldmodel.fields import AT_LEAST_0, AT_LEAST_1, AT_LEAST_2, POSITIVE, SHARE, Mode, OnResume

Device = Literal["auto", "cpu", "cuda"]
Kind = Literal["online", "imagination", "video"]


def is_general(key: str) -> bool:
    """Whether an entry of `env.kwargs` is an argument that every environment has."""
    return key.partition(".")[0] in ("max_episode_steps", "read_as", "act_as")


@dataclass(frozen=True)
class EnvConfig:
    """The real environment."""

    id: str = "longdream/Recall-v0"
    """A registered Gymnasium id, or `module:Id`."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment. Any has `max_episode_steps`: steps after which an episode is truncated; and
    `read_as` and `act_as`: how single entries of its spaces are read."""
    copies: Annotated[int, AT_LEAST_1] = 8
    """How many copies run side by side."""
    workers: Literal["sync", "async", "beside"] = "sync"
    """sync: copies in this process. async: in one process each (slow environments). beside: one process per copy, and
    collecting goes on in a process of its own while the agent learns."""
    timeout_s: Annotated[float, POSITIVE] = 60.0
    """Seconds after which a worker is given up that has not been made, or not finished a step, a reset or its end."""

    @property
    def mode(self) -> Literal["sync", "async"]:
        """Where its copies run, whoever steps them."""
        return "sync" if self.workers == "sync" else "async"


@dataclass(frozen=True)
class ReplayConfig:
    """Where experience is kept, and how clips are sampled from it."""

    capacity: Annotated[int, AT_LEAST_1, Mode("online")] = 1_000_000
    """Rows kept, over all copies."""
    keep: Annotated[Literal["disk", "device"], Mode("online")] = "disk"
    """disk: outlives the run. device: in the memory of the device that learns, with an environment that makes tensors
    there; a run that is resumed collects it anew."""
    batch: Annotated[int, AT_LEAST_1] = 16
    """Clips per update."""
    length: Annotated[int, AT_LEAST_2] = 64
    """Rows per clip."""
    episode_start_fraction: Annotated[float, SHARE] = 0.0
    """Share of clips that begin at the first row of an episode."""
    priority_fraction: Annotated[float, SHARE] = 0.0
    """Share of clips that are sampled around rows of high priority."""
    priority: Annotated[Literal["surprise", "reward"], Mode("online")] = "surprise"
    """surprise: a row's priority is its surprise. reward: every row with a reward has the same priority, all others
    none."""


@dataclass(frozen=True)
class VideoConfig:
    """V and M trained on recorded video, without an environment and without C."""

    data: Annotated[str, OnResume()] = ""
    """Folder of recordings; docs/video.md lists the layouts."""
    layout: Literal["auto", "minerl", "vpt", "memory-maze", "teco", "mp4"] = "auto"
    """How they are laid out; auto: as the folder's content says."""
    lengths: tuple[Annotated[int, AT_LEAST_2], ...] = (64,)
    """Frames per clip, stage after stage: M's updates are divided evenly among the stages."""
    frames: Annotated[int, AT_LEAST_1] = 1_024
    """Frames per update, of as many clips as that makes."""
    size: Annotated[int, Interval(ge=8)] = 64
    """Height and width that images are resized to."""
    condition: Literal["actions", "pose"] = "actions"
    """What M is conditioned on at each frame: the action that led to it, or, where recordings have it, the pose that it
    was seen from."""
    actions: Literal["flat", "factored", "vpt"] = "flat"
    """The action set of recordings of Minecraft (docs/minerl.md)."""
    freeze: bool = False
    """V learns for `learn.warmup` updates and is then frozen, while M learns."""
    encoder: str = ""
    """A run on video whose V is loaded and frozen, so that runs differ by what M learns alone."""
    keep: Literal["disk", "memory"] = "disk"
    """disk: clips are read when they are sampled. memory: each recording is read once, at its first clip, and kept."""
    retrace: Annotated[float, SHARE] = 0.0
    """Share of clips whose second half is the exact way back of the first, where M is conditioned on poses: every frame
    of it was seen before. 0 where heads learn from rewards, of which the way back has none."""
    carry: bool = False
    """Clips follow each other within a recording, and each begins with M's state after the one before."""
    held_out_clips: Annotated[int, AT_LEAST_0] = 16
    """Clips per evaluation, of a tenth of the recordings, which nothing is learned from. 0: nothing is held out, and
    nothing is evaluated."""
    context: Annotated[int, AT_LEAST_1] = 16
    """Frames of a held-out clip that M is given before it predicts."""
    horizon: Annotated[int, AT_LEAST_1] = 16
    """Frames that it then predicts."""


@dataclass(frozen=True)
class LearnConfig:
    """How much is learned, and how fast."""

    steps: Annotated[int, AT_LEAST_1, Mode("online"), OnResume()] = 20_000
    """Real environment steps, over all copies."""
    prefill: Annotated[int, AT_LEAST_0, Mode("online")] = 1_000
    """Random steps before learning begins."""
    train_ratio: Annotated[float, AT_LEAST_0, Mode("online")] = 64.0
    """Replayed rows learned from per real step."""
    warmup: Annotated[int, AT_LEAST_0, Mode("online", "video")] = 0
    """Updates of V alone before anything else learns."""
    warmup_model: Annotated[int, AT_LEAST_0, Mode("online")] = 0
    """Updates of V and M after these, before C learns too: C exploits the errors of an untrained M faster than M
    corrects them."""
    encoder_rows: Annotated[int, AT_LEAST_1, Mode("online", "video")] = 1_024
    """Rows of each batch that V learns from, at most."""
    encoder_rate: Annotated[float, AT_LEAST_0, Mode("online", "video")] = 1e-3
    """Learning rate of V (AdamW)."""
    model_rate: Annotated[float, AT_LEAST_0, Mode("online", "video")] = 6e-4
    """Learning rate of M."""
    actor_critic_rate: Annotated[float, AT_LEAST_0, Mode("online", "imagination")] = 3e-4
    """Learning rate of C."""
    updates: Annotated[int, AT_LEAST_1, Mode("imagination", "video"), OnResume()] = 1_000
    """Updates of C in the dreams of another run, or of M on video (after V's warm-up)."""
    decay: Annotated[float, SHARE] = 1.0
    """Share of the learning rates that is left at the end; they fall linearly."""
    agc: Annotated[float, POSITIVE] = 0.3
    """Adaptive gradient clipping: bound on the norm of each weight's gradient, as a share of the weight's own norm."""
    explore: Annotated[float, SHARE, Mode("online")] = 0.0
    """Share of random actions while collecting."""
    sticky: Annotated[float, SHARE, Mode("online")] = 0.0
    """Probability that a random action repeats the one before, so that random walks cover some distance: nearly this in
    the last copy of the environment, evenly less in those before it."""
    curiosity: Annotated[float, AT_LEAST_0, Mode("online")] = 0.0
    """Reward per unit of surprise that M learns to predict, so that C seeks it in dreams."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training and at its end, logging and saving."""

    every: Annotated[int, AT_LEAST_0, Mode("online")] = 2_000
    """Real steps between evaluations; 0 for none before the end."""
    times: Annotated[int, AT_LEAST_0, Mode("imagination", "video")] = 10
    """Evaluations before the end, evenly over the updates."""
    episodes: Annotated[int, AT_LEAST_1, Mode("online", "imagination")] = 50
    """Episodes per evaluation."""
    final_episodes: Annotated[int, AT_LEAST_1, Mode("online", "imagination")] = 200
    """Episodes in the last one."""
    env: Annotated[str, Mode("online", "imagination")] = ""
    """Id of an environment to evaluate in that is not the one of training, with its default arguments."""
    copies: Annotated[int, AT_LEAST_1, Mode("online", "imagination")] = 16
    """Copies of the environment side by side."""
    greedy: Annotated[bool, Mode("online", "imagination")] = True
    """C's most probable actions. false: actions are sampled as in training; where little is seen at once, a greedy C
    can turn on the spot for ever."""
    log_every: Annotated[int, AT_LEAST_1, Mode("online")] = 500
    """Real steps between lines of metrics."""
    save_seconds: Annotated[float, AT_LEAST_0] = 60.0
    """Seconds of wall-clock time between checkpoints."""


@dataclass(frozen=True)
class LogConfig:
    """Where metrics are shown, beside the record in metrics.jsonl."""

    to: tuple[str, ...] = ("tensorboard",)
    """tensorboard, wandb, mlflow, or dotted paths `package.module:Class` to sinks of your own, with commas between
    them. With none (`to: []` in a YAML file) evaluations are neither shown in pictures nor diagnosed, which saves
    seconds."""


@dataclass(frozen=True)
class Config:
    """A run, whole: saved as config.yaml in its folder and runnable again as it is."""

    kind: Kind = "online"
    """online: V, M and C learn while C acts in an environment. imagination: a new C learns in the dreams of another run
    (`world`), without a real step. video: V and M learn from recordings (`video.data`)."""
    seed: Annotated[int, Interval(ge=0, lt=2**31)] = 0
    """Of everything random."""
    device: Annotated[Device, OnResume()] = "auto"
    """Where V, M and C compute; auto: on a GPU where there is one."""
    precision: Annotated[Literal["float32", "tf32", "bfloat16"], Mode("online", "video")] = "tf32"
    """On CUDA. float32: matrix products and attention in float32 throughout. tf32: in TF32, and attention in bfloat16.
    bfloat16: also the matrix products of M over clips, which is faster; for images, of which no number has to be
    predicted to its third digit."""
    compiled: Annotated[bool, Mode("online", "video")] = False
    """On CUDA: compile M's layers for clips (torch.compile), which takes about a minute at the start and for each
    further length of clips; with `cuda_graphs` also the steps of dreams."""
    cuda_graphs: bool = False
    """On CUDA: after three updates, capture an update as one CUDA graph and replay it, since launching its thousands of
    kernels one by one can take longer than running them. Not with video.carry, nor for controllers that do not learn by
    gradient. Timings of an update's parts in the log are then those before the capture."""
    threads: Annotated[int, AT_LEAST_0, OnResume()] = 0
    """CPU threads of torch; 0 leaves its choice."""
    init: Annotated[str, Mode("online", "video")] = ""
    """A run whose V, M and C this run begins with, as in fine-tuning: its weights, with new optimizers. Its agent, and
    not chance, then acts in the prefill."""
    world: Annotated[str, Mode("imagination")] = ""
    """The run whose V and M a run of kind imagination uses."""
    env: Annotated[EnvConfig, Mode("online")] = field(default_factory=EnvConfig)
    replay: Annotated[ReplayConfig, Mode("online", "imagination")] = field(default_factory=ReplayConfig)
    video: Annotated[VideoConfig, Mode("video")] = field(default_factory=VideoConfig)
    encoder: Annotated[EncoderConfig, Mode("online", "video")] = field(default_factory=EncoderConfig)
    worldmodel: Annotated[DynamicsConfig, Mode("online", "video")] = field(default_factory=DynamicsConfig)
    forcing: Annotated[ForcingConfig, Mode("online", "video")] = field(default_factory=ForcingConfig)
    heads: Annotated[HeadsConfig, Mode("online", "video")] = field(default_factory=HeadsConfig)
    controller: Annotated[ControllerConfig, Mode("online", "imagination")] = field(default_factory=ControllerConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    evaluate: Annotated[EvaluateConfig, OnResume()] = field(default_factory=EvaluateConfig)
    log: Annotated[LogConfig, OnResume()] = field(default_factory=LogConfig)

    @property
    def evaluation_env(self) -> EnvConfig:
        """The environment to evaluate in. The arguments that any environment has hold there too."""
        if not self.evaluate.env:
            return self.env
        kwargs = {key: value for key, value in self.env.kwargs.items() if is_general(key)}
        return replace(self.env, id=self.evaluate.env, kwargs=kwargs)
