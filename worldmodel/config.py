"""Configuration of V, M, its objective and its heads. Nothing is imported here that takes long: help reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from longdream.worldmodel.fields import AT_LEAST_0, AT_LEAST_1, AT_LEAST_2, SHARE


@dataclass(frozen=True)
class DynamicsConfig:
    """Size and shape of M."""

    mixer: str = "hybrid"
    """hybrid: a scan and attention over a window of frames. window: attention over the window alone, which remembers
    nothing older. ssm, ssm+local, rotary, rotary+local, gru, causal, or a dotted path `package.module:Class` to a
    Mixer of your own: see worldmodel/mixers/base.py."""
    layers: Annotated[int, AT_LEAST_1] = 2
    """Number of layers."""
    width: Annotated[int, AT_LEAST_1] = 64
    """Channels per token."""
    num_heads: Annotated[int, AT_LEAST_1] = 4
    """Heads of both the scan and the attention, of width / num_heads channels each."""
    state_size: Annotated[int, AT_LEAST_1] = 16
    """Size of the scan's state per channel."""
    window: Annotated[int, AT_LEAST_1] = 4
    """Frames that the attention sees, including the present one."""
    chunk_frames: Annotated[int, AT_LEAST_1] = 1
    """Frames of a chunk, within which attention is not causal (5, of a window of 10, in Po et al. 2025). An agent acts
    after every frame and needs 1."""
    attention: Literal["triton", "sdpa", "flex"] = "triton"
    """How attention over clips is computed on CUDA. triton: by this project's kernels. sdpa: in dense blocks, as on
    every other device. flex: by FlexAttention in training, compiled for each clip length.
    `longdream bench attention` compares them."""
    blocks: tuple[Annotated[int, AT_LEAST_1], ...] = (1,)
    """Side of the scan's token blocks, one per layer, repeated as needed; no larger than the token grid."""
    matched: bool = False
    """Set the width of every layer's MLP so that the layer has as many parameters as a layer of `hybrid` has at this
    width. Mixers can then be compared at equal size."""
    tied_condition_keys: bool = False
    """Make memory address its content by the condition from the first update on. The frame's action (or pose) is added
    to its tokens; read keys are initialised to the write keys (c = b in scans, q = k in attention); keys of scans pass
    through a squared ReLU, which separates them better. Where frames are recalled by the pose they were seen from, M
    learns in hundreds of updates what otherwise takes thousands (docs/video.md)."""
    predict_residual: bool = False
    """Predict the difference from the previous frame instead of the frame (of logits, where latents are categorical).
    What hardly changes between frames, such as positions among an observation's numbers, then need not be copied
    through every layer."""
    frame_mlp_width: Annotated[int, AT_LEAST_0] = 0
    """Width of an MLP that maps all tokens of the previous frame and the action to an additive part of the prediction;
    0: none. It learns how an action moves the view in about a hundred updates, for which the layers need thousands
    (docs/results.md, Memory Maze)."""
    feature_skip: bool = False
    """Append each frame's latents to the feature that C and the heads read, as [z, h] in World Models (arXiv
    1803.10122). With predict_residual, M itself has less reason to keep them in its features."""


@dataclass(frozen=True)
class EncoderConfig:
    """Size and latent form of V."""

    grid: Annotated[int, Interval(ge=1, le=16)] = 1
    """Side of the token grid, 1 to 16: N = grid * grid tokens per frame. Observations without images always have 1."""
    channels: Annotated[int, AT_LEAST_1] = 32
    """D: channels per token; for categorical latents, the number of variables times their classes."""
    classes: Annotated[int, AT_LEAST_2] = 8
    """Classes per categorical variable; must divide channels."""
    depth: Annotated[int, AT_LEAST_1] = 16
    """Channels of the first convolution; doubled at each halving, up to 8 times."""
    shaped_by: Literal["model", "observation"] = "model"
    """Where V learns through M. model: M's losses reach V, and M learns by V's reconstruction, which is decoded from
    M's features too. observation: they meet in the KL alone. V reconstructs from its latents, in which each variable is
    of a part of the image, so that it sees small things early (docs/objectives.md)."""


@dataclass(frozen=True)
class ForcingConfig:
    """The objective of M and its sampler."""

    objective: str = "flow"
    """flow, mask, teacher, prior, or a dotted path `package.module:Class` to an Objective of your own."""
    history: Literal["noisy", "clean"] = "clean"
    """What noised frames see of their past. clean: clean frames alone. noisy: noised frames too, behind a clean
    prefix."""
    steps: Annotated[int, AT_LEAST_1] = 1
    """Denoising steps per dreamt frame."""
    ramp: bool = False
    """Weight the loss by 0.9 tau + 0.1 instead of evenly (flow; Hafner et al. 2025, arXiv 2509.24527)."""
    prefix: Annotated[float, SHARE] = 1.0
    """Share of clips that have a clean prefix (history noisy; 0.5 in Po et al. 2025). Dreams start in prefixes: an
    agent needs 1."""
    shortcut: Annotated[float, SHARE] = 0.0
    """Share of noised frames that learn to be denoised in few, long steps (flow; Frans et al. 2024, arXiv 2410.12557).
    It costs two more passes of M per update."""

    free_nats: Annotated[float, AT_LEAST_0] = 1.0
    """KL of a frame below which `prior` has no gradient (Hafner et al. 2023, arXiv 2301.04104, section 3)."""
    past: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of a loss of `prior` that has each feature tell a frame of its past. M then remembers in hundreds of
    updates what the reward alone teaches it in thousands (docs/objectives.md)."""


@dataclass(frozen=True)
class HeadsConfig:
    """Reward and continuation heads."""

    hidden: Annotated[int, AT_LEAST_1] = 128
    """Width of their MLPs."""
    bins: Annotated[int, Ge(3)] = 255
    """Bins of the two-hot reward."""
    reward_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the losses of both heads beside M's own: an end takes all rewards that would have followed it. 0:
    neither is learned, as from video."""
