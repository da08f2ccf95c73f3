"""What a mixer is, and the choice of a layer's mixer and attention.

A mixer carries memory from frame to frame. `worldmodel.mixer` names it; everything else in a layer stays the same:

| mixer | memory | attention |
|---|---|---|
| `hybrid` | a scan in each of the layer's token blocks | over a window of frames |
| `ssm` | one scan over the whole frame | none |
| `ssm+local` | one scan over the whole frame | over a window of frames |
| `rotary` | one scan over the whole frame, which can count its own motion (rotary.py) | none |
| `rotary+local` | the same | over a window of frames |
| `gru` | a gated recurrent unit per token, as in RSSMs; frame after frame, so it is slow | none |
| `causal` | none | over all frames so far |
| `window` | none | over a window of frames |
| `package.module:Class` | a `Mixer` of your own | over a window of frames, if its `local` is true |
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from longdream.worldmodel.config import DynamicsConfig
from longdream.worldmodel.mixers.attention import Attention
from longdream.worldmodel.mixers.gru import GRUMixer
from longdream.worldmodel.mixers.rotary import RotaryScanMixer
from longdream.worldmodel.mixers.ssm import ScanMixer
from longdream.worldmodel.types import class_by_name


class Mixer(Protocol):
    """What carries memory from frame to frame in a layer. An `nn.Module` built as `Class(config, grid, block)`: M's
    DynamicsConfig, the side of the token grid, and the layer's entry in `blocks`.

    Its state is one floating-point tensor `(B, ...)`, all zeros when nothing was seen. Before `step` of a frame that
    begins an episode, M zeroes the rows concerned; in `forward` that is the mixer's own task.

    It may also set `grows = True`: the first dimension of its state after B grows with the frames seen. CUDA graphs
    cannot capture such a mixer.
    """

    local: bool
    """Whether attention over a window of frames follows it in the layer."""

    def initial(self, batch: int, device: torch.device | str) -> Tensor:
        """The state of B sequences that have seen nothing."""
        ...

    def __call__(
        self, h: Tensor, first: Tensor, state: Tensor, query_h: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """`forward`: a clip in parallel.

        Args:
            h: `(B, T, N, W)`, normed tokens. first: `(B, T)` bool, frames before which the state is zero.
            state: before frame 0.
            query_h: `(B, T, N, W)` of the query stream, if there is one. Its frame t sees the clean frames before t and
                itself. With chunk_frames > 1, its chunk sees the clean frames before the chunk and itself.
            at: `(B, M)`, frames after which the state is returned as well, without gradient.

        Returns:
            y and query_y `(B, T, N, W)`, the state after the clip, and the states `(B * M, ...)` after the frames `at`
            (any tensor if `at` is None).
        """
        ...

    def step(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One frame `(B, 1, N, W)` that is remembered: y and the new state."""
        ...

    def peek(self, h: Tensor, state: Tensor) -> Tensor:
        """One frame `(B, 1, N, W)` that is not remembered: y."""
        ...


class _Kind(NamedTuple):
    """What a word for `worldmodel.mixer` stands for.

    memory: built as `Mixer` says, or None. attention: over a window of frames, over all frames so far, or none. blocks:
    whether the memory is one for each of the layer's token blocks; else it is one over the whole frame.
    """

    memory: type[ScanMixer] | type[GRUMixer] | None
    attention: Literal["window", "all"] | None
    blocks: bool = False


_KINDS = {
    "hybrid": _Kind(ScanMixer, "window", blocks=True),
    "ssm": _Kind(ScanMixer, None),
    "ssm+local": _Kind(ScanMixer, "window"),
    "rotary": _Kind(RotaryScanMixer, None),
    "rotary+local": _Kind(RotaryScanMixer, "window"),
    "gru": _Kind(GRUMixer, None),
    "causal": _Kind(None, "all"),
    "window": _Kind(None, "window"),
}
MIXERS = tuple(_KINDS)
"""The words for `worldmodel.mixer`."""


def make_mixer(config: DynamicsConfig, grid: int, block: int) -> tuple[Mixer | None, Attention | None]:
    """The mixer and the attention of a layer; either may be absent.

    Raises:
        ValueError: `worldmodel.mixer` is neither a known word nor a class that can be found.
    """
    kind = _KINDS.get(config.mixer)
    if kind is None:
        custom = class_by_name("worldmodel.mixer", config.mixer, dict.fromkeys(MIXERS, ScanMixer))
        mixer = custom(config, grid, block)
        return mixer, Attention(config) if mixer.local else None
    memory = None if kind.memory is None else kind.memory(config, grid, block if kind.blocks else grid)
    attention = None if kind.attention is None else Attention(config, grows=kind.attention == "all")
    return memory, attention
