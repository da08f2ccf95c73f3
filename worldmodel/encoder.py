"""V, the encoder: observations to N latent tokens of D channels per frame, and back.

Images are encoded by strided convolutions down to the token grid. Vectors, discrete values and categories are encoded
by a linear map plus an MLP, whose sum is added to every token. Latents are continuous and bounded by tanh, or
categorical with straight-through gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longdream.worldmodel import ranks
from longdream.worldmodel.categorical import draw_index, uniform_mixture
from longdream.worldmodel.config import EncoderConfig
from longdream.worldmodel.networks import symexp, symlog
from longdream.worldmodel.types import Loss

Latent = Literal["continuous", "categorical"]
UNIMIX = 0.01
"""Weight of the uniform distribution that is mixed into categorical latents, and into their prior."""


class Observed(Protocol):
    """What V needs to know about an observation key."""

    @property
    def kind(self) -> Literal["image", "vector", "discrete", "categories"]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n(self) -> int: ...


class Encoder(nn.Module):
    """V. Observations `{key: (..., *shape)}` to latents `(..., N, D)` and back.

    Args:
        spec: what each observation key is. latent: the kind of latents, which the objective determines.

    Raises:
        ValueError: channels that are not a multiple of the classes, or an image that does not fit the grid.
    """

    def __init__(self, config: EncoderConfig, spec: Mapping[str, Observed], latent: Latent):
        super().__init__()
        self.latent = latent
        if latent == "categorical" and config.channels % config.classes:
            raise ValueError(
                f"encoder.channels = {config.channels} is not a multiple of encoder.classes = {config.classes}"
            )
        self.config = config
        self.spec = dict(spec)
        self.normalised = True
        self.feature_in: nn.Linear | None = None
        self.images = sorted(k for k, s in spec.items() if s.kind == "image")
        self.flats = sorted(k for k, s in spec.items() if s.kind != "image")
        self.grid = config.grid if self.images else 1
        self.tokens = self.grid**2
        self.channels = config.channels
        self.vision = nn.ModuleDict({module_name(k): Vision(config, self.grid, spec[k].shape) for k in self.images})
        self.digits = {k: Digits(spec[k].n) for k in self.flats if spec[k].kind == "categories"}
        self.sizes = {k: self._size(k) for k in self.flats}
        flat = sum(self.sizes.values())
        if flat:
            self.scale = nn.ModuleDict({module_name(k): RunningScale(n) for k, n in self._scaled_sizes().items()})
            self.flat_in = Flat(flat, 4 * config.channels, config.channels, skip=flat**-0.5)
            self.flat_out = Flat(self.tokens * config.channels, 4 * config.channels, flat, skip=0.0)
        if latent == "continuous":
            # without a norm, V got stuck at the mean image; vectors have none, since it would remove their length
            self.norm = nn.RMSNorm(config.channels) if self.images else nn.Identity()

    def _vision(self, key: str) -> Vision:
        return cast(Vision, self.vision[module_name(key)])

    def _scale(self, key: str) -> RunningScale:
        return cast(RunningScale, self.scale[module_name(key)])

    def _size(self, key: str) -> int:
        """Numbers that go into V, and come out, for a key that is no image."""
        if self.spec[key].kind == "discrete":
            return self.spec[key].n
        entries = math.prod(self.spec[key].shape)
        return entries * self.digits[key].size if key in self.digits else entries

    def _scaled_sizes(self) -> dict[str, int]:
        """The keys that are normalised, and their sizes: vectors, and the one-hot vectors of categories. Of a grid in
        which few cells ever change, V got stuck at the most frequent one where these were not."""
        return {k: n for k, n in self.sizes.items() if self.spec[k].kind in ("vector", "categories")}

    def forward(self, obs: Mapping[str, Tensor], draw: bool = False) -> Tensor:
        """Latents `(..., N, D)`: bounded by tanh, or one-hot vectors of the likeliest classes (of sampled ones if
        `draw`)."""
        return self._bound(self._encode(obs), draw)

    def posterior(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sampled one-hot vectors `(..., N, D)` with straight-through gradients (Bengio et al. 2013, arXiv 1308.3432),
        and the log-probabilities `(..., N, D)` that they are sampled from. Of categorical latents alone."""
        self.update_scales(obs)
        probs = self._probs(self._encode(obs))
        return self._one_hots(probs, draw=True), probs.log().flatten(-2)

    def _encode(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Latents `(..., N, D)` before they are bounded."""
        lead = self._lead(obs)
        z = 0
        for key in self.images:
            z = z + self._vision(key).encode(obs[key].flatten(0, len(lead) - 1))
        if self.flats:
            z = z + self.flat_in(self._flat(obs, lead))[:, None]
        assert isinstance(z, Tensor)
        return z.unflatten(0, lead)

    def learn_through_model(self, feature_size: int) -> None:
        """Let V learn by M's loss too: the latents' logits are as V gives them, since M's prior pulls them together
        where nothing is told; and observations are decoded from latents and M's feature of the frame, `(..., F)`, if
        there is one (F > 0)."""
        self.normalised = False
        if feature_size:
            self.feature_in = nn.Linear(feature_size, self.tokens * self.channels)

    def decode(self, z: Tensor, feat: Tensor | None = None) -> dict[str, Tensor]:
        """Latents `(..., N, D)` to observations: images uint8, vectors float32, discrete values and categories
        int64.

        feat: `(..., F)`, M's features of the frames, which observations are decoded from too where V learns through M.
        """
        lead = z.shape[:-2]
        raw = self._decode(self._with_feature(z, feat).flatten(0, -3), exact=True)
        out = {}
        for key, value in raw.items():
            spec = self.spec[key]
            if spec.kind == "image":
                value = ((value + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
            elif spec.kind == "discrete":
                value = value.argmax(-1)
            elif spec.kind == "categories":
                value = self.digits[key].likeliest(value)
            else:
                value = self._scale(key).undo(value)
            out[key] = value.reshape(*lead, *spec.shape)
        return out

    def loss(self, obs: Mapping[str, Tensor]) -> Loss:
        """Reconstruction error, summed over keys: mean squared error of pixels and of normalised vectors, cross-entropy
        of discrete values, and its mean over categories."""
        lead = self._lead(obs)
        self.update_scales(obs)
        z = self(obs, draw=True).flatten(0, len(lead) - 1)
        raw = self._decode(z, exact=False)
        metrics = {}
        total = torch.zeros((), device=next(iter(raw.values())).device)
        for key, value in raw.items():
            target = obs[key].flatten(0, len(lead) - 1)
            spec = self.spec[key]
            if spec.kind == "image":
                error = F.mse_loss(value, self._vision(key).scaled(target))
            elif spec.kind == "discrete":
                error = F.cross_entropy(value, target)
            elif spec.kind == "categories":
                error = self.digits[key].loss(value, target).mean()
            else:
                error = F.mse_loss(value, self._scale(key)(target.flatten(1)))
            metrics[f"reconstruction/{key}"] = error.detach()
            total = total + error * (IMAGE_WEIGHT if spec.kind == "image" else 1)
        return Loss(total, metrics)

    def reconstruction(self, z: Tensor, feat: Tensor, obs: Mapping[str, Tensor]) -> Loss:
        """-log p(obs | z, feat) of rows, up to constants: squared errors summed over pixels and normalised entries, and
        cross-entropy of discrete values, summed over categories; the mean over rows. What V is trained by beside M's
        loss where it learns through M; `loss` is what it is trained by alone.

        Of vectors, the error is divided by its own mean and `LEAST_VARIANCE`: the better V knows them, the more what is
        left counts, as with a variance that is learned (Rybkin et al. 2021, arXiv 2006.13202). With a fixed variance of
        1, V gave up small differences of a few numbers for a smaller KL.

        Args:
            z: `(R, N, D)`. feat: `(R, F)`. obs: `(R, *shape)` per key.
        """
        raw = self._decode(self._with_feature(z, feat), exact=False)
        metrics = {}
        total = torch.zeros((), device=z.device)
        for key, value in raw.items():
            spec = self.spec[key]
            if spec.kind == "discrete":
                error = F.cross_entropy(value, obs[key])
                metrics[f"reconstruction/{key}"] = error.detach()
            elif spec.kind == "categories":
                losses = self.digits[key].loss(value, obs[key])
                metrics[f"reconstruction/{key}"] = losses.mean().detach()
                error = losses.sum(1).mean()
            else:
                target = self._vision(key).scaled(obs[key]) if spec.kind == "image" else self._scaled(key, obs[key])
                squares = (value - target).square()
                mean = squares.mean().detach()
                metrics[f"reconstruction/{key}"] = mean
                error = squares.flatten(1).sum(1).mean()
                if spec.kind == "vector":
                    error = error / (ranks.mean(mean) + LEAST_VARIANCE)
            total = total + error
        return Loss(total, metrics)

    def update_scales(self, obs: Mapping[str, Tensor]) -> None:
        """Take vectors and categories into the running statistics that they are normalised by."""
        lead = self._lead(obs)
        for key in self._scaled_sizes():
            self._scale(key).update(self._numbers(key, obs[key].flatten(0, len(lead) - 1)))

    def _numbers(self, key: str, value: Tensor) -> Tensor:
        """A vector, or categories as one-hot vectors, `(B, *shape)`, as `(B, size)` before they are normalised."""
        return self.digits[key].one_hots(value) if key in self.digits else value.flatten(1)

    def _scaled(self, key: str, value: Tensor) -> Tensor:
        return self._scale(key)(self._numbers(key, value))

    def _with_feature(self, z: Tensor, feat: Tensor | None) -> Tensor:
        if self.feature_in is None or feat is None:
            return z
        return z + self.feature_in(feat).unflatten(-1, (self.tokens, self.channels))

    def _lead(self, obs: Mapping[str, Tensor]) -> torch.Size:
        key = next(iter(self.spec))
        return obs[key].shape[: obs[key].ndim - len(self.spec[key].shape)]

    def _flat(self, obs: Mapping[str, Tensor], lead: torch.Size) -> Tensor:
        parts = []
        for key in self.flats:
            value = obs[key].flatten(0, len(lead) - 1)
            if self.spec[key].kind == "discrete":
                parts.append(F.one_hot(value, self.spec[key].n).float())
            else:
                parts.append(self._scaled(key, value))
        return torch.cat(parts, -1)

    def _decode(self, z: Tensor, exact: bool) -> dict[str, Tensor]:
        """Latents `(B, N, D)` to raw outputs: images in [-0.5, 0.5], at their own resolution if `exact`; normalised
        vectors; logits of discrete values and of categories' digits."""
        out = {key: self._vision(key).decode(z, exact) for key in self.images}
        if self.flats:
            values = self.flat_out(z.flatten(1)).split([self.sizes[k] for k in self.flats], -1)
            out.update(zip(self.flats, values, strict=True))
        return out

    def _bound(self, z: Tensor, draw: bool) -> Tensor:
        if self.latent == "continuous":
            # in the precision of the norm's weights under autocast too, since torch warns about mixed precisions
            return self.norm(z.to(torch.promote_types(z.dtype, torch.float32))).tanh()
        return self._one_hots(self._probs(z), draw)

    def _probs(self, z: Tensor) -> Tensor:
        """Probabilities `(..., N, D / classes, classes)` of categorical latents, from what `_encode` gives."""
        logits = z.unflatten(-1, (-1, self.config.classes))
        if self.normalised:  # learning by pictures alone, V got stuck at latents that say nothing
            logits = logits - logits.mean(-1, keepdim=True)
            logits = 2 * F.rms_norm(logits, logits.shape[-2:])
        return uniform_mixture(logits.flatten(-2), self.config.classes, UNIMIX).unflatten(-1, logits.shape[-2:])

    def _one_hots(self, probs: Tensor, draw: bool) -> Tensor:
        index = draw_index(probs) if draw else probs.argmax(-1)
        hard = F.one_hot(index, self.config.classes).to(probs.dtype)
        return (hard + probs - probs.detach()).flatten(-2)


def module_name(key: str) -> str:
    """A valid module name for an observation key: without dots, and different from all attributes of a ModuleDict."""
    return "key_" + key.replace("%", "%25").replace(".", "%2E")


LEAST_VARIANCE = 0.02
"""Squared error of normalised vectors below which V gains little by knowing them better."""
IMAGE_WEIGHT = 10.0
"""Weight of images in the loss: their mean squared error is small compared with losses of order one."""


class Flat(nn.Module):
    """Vectors and discrete values to latents, or back: a linear map plus an MLP.

    Outside the range of the training data the linear map extrapolates. There is no norm, which would keep directions
    and discard lengths: a cart that is further out than ever before must not be encoded like one near the origin.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, skip: float):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.normal_(self.linear.weight, std=skip)
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.mlp(x)


class Digits:
    """Categories of n values as one-hot vectors of their digits, lowest first, and back.

    Up to `MOST` values are one digit. Others are written in base 16: of bytes, of which many grids use the lowest few,
    the first digit is then the category and the second says nothing.
    """

    MOST = 32
    BASE = 16

    def __init__(self, n: int):
        self.n = n
        self.base = n if n <= self.MOST else self.BASE
        self.count = 1
        while self.base**self.count < n:
            self.count += 1
        self.size = self.base * self.count

    def of(self, values: Tensor) -> Tensor:
        """`(B, *shape)` integers to `(B, cells, count)` digits."""
        values = values.flatten(1).long()
        return torch.stack([values // self.base**i % self.base for i in range(self.count)], -1)

    def one_hots(self, values: Tensor) -> Tensor:
        """`(B, *shape)` integers to `(B, cells * size)`."""
        return F.one_hot(self.of(values), self.base).float().flatten(1)

    def loss(self, logits: Tensor, values: Tensor) -> Tensor:
        """Cross-entropy of each category, `(B, cells)`, of logits `(B, cells * size)`."""
        digits = self.of(values)
        log_probs = logits.float().unflatten(-1, (*digits.shape[1:], self.base)).log_softmax(-1)
        return -log_probs.gather(-1, digits[..., None])[..., 0].sum(-1)

    def likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest values `(B, cells)` int64 under logits `(B, cells * size)`."""
        digits = logits.unflatten(-1, (-1, self.count, self.base)).argmax(-1)
        scale = torch.tensor([self.base**i for i in range(self.count)], device=logits.device)
        return (digits * scale).sum(-1).clamp(max=self.n - 1)


class Vision(nn.Module):
    """Encoder and decoder of one image key: `(B, H, W, C)` uint8 to `(B, N, D)` and back.

    Where V is shaped by observations, a token's channels are those of `parts * parts` parts of its share of the image
    side by side, all by one linear map.

    Images whose size cannot be halved down to the grid are resized first.
    """

    def __init__(self, config: EncoderConfig, grid: int, shape: tuple[int, ...]):
        super().__init__()
        height, width, colours = shape
        base = max(grid, 4)  # smaller grids are merged from 4 x 4
        if base % grid:
            raise ValueError(f"encoder.grid = {grid}: grids under 4 must divide 4 (use 1, 2 or 4 and up)")
        halvings = round(math.log2(min(height, width) / base))
        if halvings < 1:
            largest = min(height, width) // 2
            fix = f"set it to at most {largest}" if largest >= 4 else "images of under 8 pixels cannot be encoded"
            needed = f"{2 * base} x {2 * base} pixels or more"
            raise ValueError(f"image of {height} x {width}: encoder.grid = {grid} needs {needed}; {fix}")
        self.shape = (height, width)
        self.grid = grid
        self.merge = base // grid
        self.size = base * 2**halvings
        # the first halving moves 2 x 2 pixels into channels, since convolutions at full resolution would dominate the
        # cost
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        depths = [4 * colours] + [config.depth * min(2**i, 8) for i in range(halvings - 1)]
        for i, (fine, coarse) in enumerate(pairwise(depths)):
            down += [nn.Conv2d(fine, coarse, 4, 2, 1), ChannelNorm(coarse), nn.SiLU()]
            up = [nn.ConvTranspose2d(coarse, fine, 4, 2, 1)] + ([ChannelNorm(fine), nn.SiLU()] if i else []) + up
        before = depths[-1]
        self.down = nn.Sequential(*down)
        self.up = nn.Sequential(*up)
        for part in (self.down, self.up):
            part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.parts = parts_of_token(config, self.merge) if config.shaped_by == "observation" else 1
        cell = before * (self.merge // self.parts) ** 2
        channels = config.channels // self.parts**2
        self.to_token = nn.Linear(cell, channels)
        self.from_token = nn.Sequential(nn.Linear(channels, cell), nn.SiLU())

    def scaled(self, image: Tensor) -> Tensor:
        """`(B, H, W, C)` uint8 to floats in [-0.5, 0.5], `(B, size, size, C)`."""
        x = image.float() / 255 - 0.5
        if self.shape != (self.size, self.size):
            x = F.interpolate(x.movedim(-1, 1), (self.size, self.size), mode="bilinear", antialias=True).movedim(1, -1)
        return x

    def encode(self, image: Tensor) -> Tensor:
        x = self.down(merge(self.scaled(image), 2).movedim(-1, 1)).movedim(1, -1)
        return merge(self.to_token(merge(x, self.merge // self.parts)), self.parts).flatten(1, 2)

    def decode(self, z: Tensor, exact: bool) -> Tensor:
        """`(B, N, D)` to `(B, H, W, C)` if `exact`, else at V's own square resolution."""
        z = split(z.unflatten(1, (self.grid, self.grid)), self.parts)
        x = split(self.from_token(z), self.merge // self.parts)
        x = split(self.up(x.movedim(-1, 1)).movedim(1, -1), 2)
        if exact and self.shape != (self.size, self.size):
            x = F.interpolate(x.movedim(-1, 1), self.shape, mode="bilinear", antialias=True).movedim(1, -1)
        return x


def parts_of_token(config: EncoderConfig, merged: int) -> int:
    """Into how many parts the side of a token's share of the image can be divided, so that each variable is of one
    part: up to `merged`, the side of that share on V's map."""
    fitting = (n for n in (4, 2) if merged % n == 0 and config.channels % (n * n * config.classes) == 0)
    return next(fitting, 1)


def merge(x: Tensor, side: int) -> Tensor:
    """`(B, H, W, C)` to `(B, H / side, W / side, side * side * C)`: each square of pixels becomes channels."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(3)


def split(x: Tensor, side: int) -> Tensor:
    """The inverse of `merge`."""
    x = x.unflatten(3, (side, side, -1)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


class ChannelNorm(nn.Module):
    """RMS norm over the channels of `(B, C, H, W)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.gain


class RunningScale(nn.Module):
    """Normalises vectors by a running mean and standard deviation.

    Values beyond about `FAR` standard deviations are compressed by a symlog, so that outliers remain distinguishable
    without dominating the loss.
    """

    FAR = 5.0

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update the averages with x `(B, n)` and that of other ranks, of as many rows, at a rate that decreases to
        3e-3."""
        self.count += 1
        rate = (1 / self.count).clamp(min=3e-3)
        self.mean.lerp_(ranks.mean(x.mean(0)), rate)
        self.square.lerp_(ranks.mean((x - self.mean).square().mean(0)), rate)

    def _deviation(self) -> Tensor:
        return self.square.sqrt().clamp(min=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return self.FAR * symlog((x - self.mean) / (self.FAR * self._deviation()))

    def undo(self, x: Tensor) -> Tensor:
        return symexp(x / self.FAR) * self.FAR * self._deviation() + self.mean
