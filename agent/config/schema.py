"""What a run is made of: every part's own configuration, and the run's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longdream.controller.types import ControllerConfig
from longdream.worldmodel.dynamics import DynamicsConfig
from longdream.worldmodel.encoder import EncoderConfig
from longdream.worldmodel.model import HeadsConfig
from longdream.worldmodel.objectives.base import ForcingConfig


@dataclass(frozen=True)
class EnvConfig:
    """The real environment."""

    id: str = "longdream/Recall-v0"
    """A registered Gymnasium id, or `module:Id`."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment."""
    copies: int = 8
    """How many run side by side."""
    workers: Literal["sync", "async"] = "sync"
    """Copies in this process, or in one process each (slow environments)."""
    timeout_s: float = 60.0
    """A worker that takes longer for one step is given up."""


@dataclass(frozen=True)
class ReplayConfig:
    """What happened, where it is kept, and how clips are drawn from it."""

    capacity: int = 1_000_000
    """Rows kept, over all copies."""
    keep: Literal["disk", "device"] = "disk"
    """disk: outlives the run. device: in the memory of the device that learns, with an environment that makes tensors
    there; collected anew where a run is resumed."""
    batch: int = 16
    """Clips per update."""
    length: int = 64
    """Rows per clip."""
    starts: float = 0.0
    """Share of clips that begin where an episode begins."""
    surprise: float = 0.0
    """Share of clips drawn around telling rows."""
    around: Literal["surprise", "reward"] = "surprise"
    """Which rows are telling. surprise: in proportion to theirs. reward: those with a reward, all alike, where few have
    one."""


@dataclass(frozen=True)
class VideoConfig:
    """V and M trained on recorded video, without an environment and without C."""

    data: str = ""
    """Folder of recordings; docs/video.md lists the layouts."""
    layout: Literal["auto", "minerl", "vpt", "memory-maze", "teco", "mp4"] = "auto"
    """How they are laid out; auto: as the folder's content says."""
    lengths: tuple[int, ...] = ()
    """Frames per clip, stage after stage: M's updates are shared out evenly. Empty: this is no training on video."""
    frames: int = 1_024
    """Frames per update, of as many clips as that makes."""
    size: int = 64
    """Side of the square that images are brought to."""
    condition: Literal["actions", "pose"] = "actions"
    """What M is told of a frame: the action that led to it, or the pose it was seen from, where recordings have it."""
    choices: int = 0
    """Number of different actions, where recordings number them; 0: as the layout or the files say."""
    actions: Literal["flat", "factored", "vpt"] = "flat"
    """The action set of recordings of Minecraft (docs/minerl.md)."""
    freeze: bool = False
    """V stays as it is after `learn.warmup` updates of its own, and M learns alone."""
    encoder: str = ""
    """A run on video whose V is taken as it is, and stays so: runs can be compared by what M learns alone."""
    keep: Literal["disk", "memory"] = "disk"
    """disk: clips are read when they are drawn. memory: each recording is read once, at its first clip, and kept."""
    retrace: float = 0.0
    """Share of clips whose second half is the exact way back of the first, where M is told poses (`condition`): every
    frame of it was seen before. 0 where heads learn from rewards, of which the way back has none."""
    carry: bool = False
    """Clips follow each other within a recording, and each begins with M's state after the one before."""
    held_out: float = 0.1
    """Share of the recordings that nothing is learned from, to judge by; 0: nobody is judged."""
    context: int = 16
    """Frames of a held-out clip that M is shown before it predicts."""
    horizon: int = 16
    """Frames that it then predicts."""


@dataclass(frozen=True)
class LearnConfig:
    """How much, how fast."""

    steps: int = 20_000
    """Real environment steps, over all copies."""
    prefill: int = 1_000
    """Random steps before learning begins."""
    ratio: float = 64.0
    """Replayed rows learned from per real step."""
    warmup: int = 0
    """Updates of V alone before anything else learns."""
    warmup_model: int = 0
    """Updates of V and M after these, before C learns too: C settles on what a new M makes up faster than M learns
    better."""
    encoder_rows: int = 1_024
    """Rows of each batch that V learns from, at most."""
    encoder_rate: float = 1e-3
    """Learning rates, of AdamW."""
    model_rate: float = 6e-4
    actor_critic_rate: float = 3e-4
    updates: int = 1_000
    """Updates of a C that learns in the dreams of another run (`world`), or of M on video, after V's warm-up."""
    decay: float = 1.0
    """Share of the learning rates that is left at the end; they fall on a straight line."""
    clip: float = 0.3
    """Bound on the norm of each weight's gradient, as a share of the weight's own norm."""
    explore: float = 0.0
    """Share of random actions while collecting."""
    sticky: float = 0.0
    """Chance that a random action is the one before once more: random walks that get somewhere."""
    curiosity: float = 0.0
    """Reward per unit of surprise that M learns to predict, so that C seeks it in dreams."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training and at its end, and saving."""

    every: int = 2_000
    """Real steps between evaluations (on video, updates); 0 for none before the end."""
    episodes: int = 50
    """Episodes in each (on video, held-out clips)."""
    final_episodes: int = 200
    """In the last one."""
    env: str = ""
    """Id of an environment to evaluate in that is not the one of training, with its default arguments."""
    workers: Literal["sync", "async"] = "sync"
    """How the copies of that one run."""
    copies: int = 16
    """Environments side by side."""
    greedy: bool = True
    """C's likeliest actions. false: actions drawn as while learning; where little is seen at once, a greedy C can turn
    on the spot for ever."""
    log_every: int = 500
    """Real steps between lines of metrics (on video, updates)."""
    save_seconds: float = 60.0
    """Wall-clock time between checkpoints."""


@dataclass(frozen=True)
class Config:
    """A run, whole: saved as config.yaml in its folder and runnable again as it is."""

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    exact: bool = False
    """On CUDA: matrix products and attention in float32 throughout, instead of the faster TF32 and bfloat16; it
    goes before `bfloat16`."""
    bfloat16: bool = False
    """On CUDA: where M learns from clips, its matrix products are of bfloat16, which is faster; for images, of which no
    number has to be foreseen to its third digit."""
    compiled: bool = False
    """On CUDA: M's layers are compiled for clips (torch.compile), which takes about a minute when training begins and
    for each further length of clips; and where updates are recorded, the steps of their dreams."""
    recorded: bool = False
    """On CUDA: an update's thousands of kernels are recorded, when three updates were made, and from then on launched
    as one CUDA graph, since launching them one by one can take longer than running them. Not with video.carry, nor for
    controllers that learn in a way of their own. The seconds of the log's parts are then those until recording."""
    threads: int = 0
    """CPU threads of torch; 0 leaves its choice."""
    world: str = ""
    """A run whose V and M are taken as they are, for a new C that learns in their dreams alone, without a real step."""
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    worldmodel: DynamicsConfig = field(default_factory=DynamicsConfig)
    forcing: ForcingConfig = field(default_factory=ForcingConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def evaluation_env(self) -> EnvConfig:
        """The environment that counts."""
        told = self.evaluate
        return replace(self.env, id=told.env, kwargs={}, workers=told.workers) if told.env else self.env
