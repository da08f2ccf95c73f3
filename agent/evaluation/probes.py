"""What M's features know of a maze: the offline probes of Memory Maze (Pasukonis et al. 2022, arXiv 2210.13383).

An MLP reads the maze's layout, or the places of its targets, from features that stay as they are and the pose of the
agent. What it reads from M's features and not from V's latent, M has remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longdream.agent.data import npz_episodes
from longdream.agent.data.video.library import Library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.reader import Recording
from longdream.agent.run import files
from longdream.agent.run.export import header_of
from longdream.envs.contract import UserError
from longdream.envs.memory_maze.policies import visible
from longdream.worldmodel.model import WorldModel

AGES = (0, 100, 250, 500, 1001)
"""Bounds of the ages of an episode, in steps, that results are told for."""
SINCE = (0, 1, 30, 100, 250, 1001)
"""Bounds of the steps since a target was last seen."""
HIDDEN = 1024
LAYERS = 4
RATE = 3e-4
HALF_VIEW = np.deg2rad(40.0)
"""Half of the camera's horizontal field of view."""
BATCH = 1024
"""Rows of an update of a probe."""
STREAMS = 64
"""Episodes that M watches at once."""
FILE = "probe.safetensors"
"""The probe of M's features in a run; `longdream play` shows what it reads."""
MOST_BYTES = 1 << 28
"""Size of that file, at most."""


@dataclass(frozen=True)
class Episodes:
    """Recorded episodes of one length, as they are probed.

    image `(E, T, H, W, 3)` uint8. prev_action `(E, T, A)`, which led to each row, as M is conditioned on it. pose `(E,
    T, 4)`: position, -1 to 1 across the maze, and the direction ahead. walls `(E, S, S)`: 1 at a wall. targets `(E, K,
    2)`, in cells. seen `(E, T, K)`: steps since each target was in view, or T where it has not been yet.
    """

    image: np.ndarray
    prev_action: np.ndarray
    pose: np.ndarray
    walls: np.ndarray
    targets: np.ndarray
    seen: np.ndarray

    @property
    def size(self) -> int:
        """Cells along a side of the maze."""
        return self.walls.shape[-1]


def read(library: Library, recordings: list[Recording], side: int) -> Episodes:
    """The recordings, with what is true of them.

    Args:
        side: of the images that V takes, in pixels.

    Raises:
        UserError: they have no probes, or differ in length, size of the maze or number of targets.
    """
    parts: list[dict[str, np.ndarray]] = []
    for recording in recordings:
        clip = read_clip(library, recording, 0, recording.length, side)
        truth = npz_episodes.read(recording.path)
        layout = truth["maze_layout"][0]
        position = truth["agent_pos"].astype(np.float64)
        parts.append(
            {
                "image": clip["image"],
                "prev_action": np.concatenate([clip["before"][None], clip["action"][:-1]]),
                "pose": pose_of(layout, position, truth["agent_dir"]),
                "walls": (layout == 0).astype(np.float32),
                "targets": truth["targets_pos"][0].astype(np.float32),
                "seen": since_seen(layout, position, truth["targets_pos"][0], truth["targets_vec"]),
            }
        )
    kinds = {tuple(part[key].shape for key in ("image", "walls", "targets")) for part in parts}
    if len(kinds) > 1:
        raise UserError(f"{library.root}: episodes differ in length, size of the maze or number of targets")
    return Episodes(**{key: np.stack([part[key] for part in parts]) for key in parts[0]})


def since_seen(layout: np.ndarray, position: np.ndarray, targets: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Steps since each target was last in view, `(T, K)`; T where it has not been yet.

    In view: less than half the camera's field of view aside, with free cells all along the line to it.

    Args:
        layout: `(S, S)`, 1 = free. position: `(T, 2)`. targets: `(K, 2)`. vectors: `(T, K, 2)`, to the right and ahead.
    """
    steps, count = vectors.shape[:2]
    aside = np.abs(np.arctan2(vectors[..., 0], vectors[..., 1])) < HALF_VIEW
    free = np.stack(
        [visible(np.broadcast_to(layout, (steps, *layout.shape)), position, np.tile(t, (steps, 1))) for t in targets], 1
    )
    time = np.arange(steps)[:, None]
    last = np.maximum.accumulate(np.where(aside & free, time, -steps), 0)
    return np.minimum(time - last, steps).reshape(steps, count)


@torch.no_grad()
def features(
    model: WorldModel,
    episodes: Episodes,
    key: str,
    erased: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """V's latent and M's feature after each row, `(E, T, ...)` float16 on the CPU, by "V" and "M".

    Args:
        key: of the images among the observations of V.
        erased: M's long memory is erased before every row.
        progress: called with the rows done and all of them.
    """
    device = next(model.parameters()).device
    count, length = episodes.image.shape[:2]
    collected: dict[str, list[Tensor]] = {"V": [], "M": []}
    for begin in range(0, count, STREAMS):
        image = torch.from_numpy(episodes.image[begin : begin + STREAMS])
        action = torch.from_numpy(episodes.prev_action[begin : begin + STREAMS]).to(device)
        streams = len(image)
        state = model.dynamics.initial(streams)
        rows: dict[str, list[Tensor]] = {"V": [], "M": []}
        for t in range(length):
            z = model.encoder({key: image[:, t].to(device)})
            if erased:
                state = state.without_long_memory()
            first = torch.full((streams,), t == 0, device=device)
            feat, state = model.commit(state, z, action[:, t], first)
            rows["V"].append(z.flatten(1).half().cpu())
            rows["M"].append(feat.half().cpu())
            if progress and t % 100 == 99:
                progress(begin * length + streams * (t + 1), count * length)
        for name, values in rows.items():
            collected[name].append(torch.stack(values, 1))
    return {name: torch.cat(values) for name, values in collected.items()}


class Probe(nn.Module):
    """An MLP of four hidden layers, each with LayerNorm and ELU, on a feature and a pose."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: int, outputs: int, hidden: int):
        super().__init__()
        sizes = [inputs + 4, *[hidden] * LAYERS]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ELU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, outputs))
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Take features `(inputs,)` of this mean and deviation to numbers of mean 0 and deviation 1."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=1e-3))

    def forward(self, feature: Tensor, pose: Tensor) -> Tensor:
        """Outputs `(..., outputs)` of features `(..., inputs)` and poses `(..., 4)`."""
        return self.net(torch.cat([(feature - self.mean) / self.deviation, pose], -1))


class MazeProbe(nn.Module):
    """A probe of the walls and one of the targets, of a maze of `size` x `size` cells with `count` targets."""

    def __init__(self, inputs: int, size: int, count: int, hidden: int):
        super().__init__()
        self.size = size
        self.walls = Probe(inputs, size * size, hidden)
        self.targets = Probe(inputs, 2 * count, hidden)

    def forward(self, feature: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of walls `(..., S S)`, and places `(..., 2 K)` from -1 to 1, of features `(..., F)` and poses."""
        return self.walls(feature, pose), self.targets(feature, pose)

    @torch.no_grad()
    def read(self, feature: Tensor, pose: Tensor) -> Reading:
        """The map as it is read from features `(..., F)` and poses `(..., 4)`."""
        walls, places = self(feature, pose)
        shape = feature.shape[:-1]
        shown = (places.view(*shape, -1, 2) + 1) * self.size / 2
        return Reading(walls.sigmoid().view(*shape, self.size, self.size).cpu().numpy(), shown.cpu().numpy())


@dataclass(frozen=True)
class Reading:
    """What probes read: wall probabilities `(..., S, S)`, row 0 at y = 0, and places `(..., K, 2)` in cells."""

    walls: np.ndarray
    places: np.ndarray


def pose_of(layout: np.ndarray, position: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Poses `(..., 4)`, as probes take them, of positions `(..., 2)` in cells and directions `(..., 2)`."""
    return np.concatenate([2 * position.astype(np.float64) / layout.shape[-1] - 1, ahead], -1).astype(np.float32)


def fit(train: Episodes, feature: Tensor, updates: int, seed: int) -> MazeProbe:
    """Train a probe of the walls and one of the targets.

    Args:
        feature: `(E, T, F)`, of each row of the episodes. F may be 0: the probe then knows the pose.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        probe = MazeProbe(feature.shape[-1], train.size, train.targets.shape[1], HIDDEN).to(device)
        if feature.shape[-1]:
            sample = feature.flatten(0, 1)[:: max(1, feature.shape[1] // 50)].float()
            for part in (probe.walls, probe.targets):
                part.standardise(sample.mean(0), sample.std(0))
        optimizer = torch.optim.AdamW(probe.parameters(), RATE)
        pose = torch.from_numpy(train.pose)
        truth = targets_of(train, device)
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - update / updates))  # falls in the second half
            e = torch.randint(len(pose), (BATCH,))
            t = torch.randint(pose.shape[1], (BATCH,))
            walls, places = probe(feature[e, t].float().to(device), pose[e, t].to(device))
            loss = probe_loss(walls, places, truth[0][e], truth[1][e])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe


def reading_of(probe: MazeProbe, episodes: Episodes, feature: Tensor) -> Reading:
    """What a probe reads after each row of episodes, from features `(E, T, F)`."""
    device = next(probe.parameters()).device
    pairs = zip(feature, torch.from_numpy(episodes.pose), strict=True)
    parts = [probe.read(rows.float().to(device), pose.to(device)) for rows, pose in pairs]
    return Reading(np.stack([part.walls for part in parts]), np.stack([part.places for part in parts]))


def save(folder: Path, probe: MazeProbe, step: int) -> Path:
    """Write a probe of M's features beside the run that M is of; step: of the checkpoint. Returns its path.

    Raises:
        UserError: there is a link where it belongs.
    """
    path = folder / FILE
    files.check_own_path(folder, path)
    path.write_bytes(safetensors.torch.save(probe.state_dict(), {"step": str(step)}))
    return path


def load(folder: Path, inputs: int, step: int) -> MazeProbe | None:
    """The probe beside a run, on the CPU; None if none was trained.

    Args:
        inputs: size of M's features. step: of the checkpoint whose M it is to read.

    Raises:
        UserError: it is of another checkpoint, or the file is damaged.
    """
    path = folder / FILE
    try:
        with files.opened(path) as (file, size):
            blob = file.read(min(size, MOST_BYTES))
        known = header_of(blob)["step"]
        tensors = safetensors.torch.load(blob)
        cells, hidden = tensors[f"walls.net.{3 * LAYERS}.weight"].shape
        probe = MazeProbe(inputs, math.isqrt(cells), len(tensors[f"targets.net.{3 * LAYERS}.bias"]) // 2, hidden)
        probe.load_state_dict(tensors)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be used ({reason}): train it again with longdream bench probe") from None
    if known != str(step):
        raise UserError(f"{path} reads M of step {known}, not of {step}: train it again with longdream bench probe")
    return probe


def targets_of(episodes: Episodes, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a probe is to say of each episode: walls `(E, S S)`, and places `(E, 2 K)` from -1 to 1."""
    walls = torch.from_numpy(episodes.walls).flatten(1).to(device)
    places = torch.from_numpy(2 * episodes.targets / episodes.size - 1).flatten(1).to(device)
    return walls, places


def probe_loss(walls: Tensor, places: Tensor, true_walls: Tensor, true_places: Tensor) -> Tensor:
    """Binary cross-entropy of the walls, and squared error of the places."""
    return nn.functional.binary_cross_entropy_with_logits(walls, true_walls) + nn.functional.mse_loss(
        places, true_places
    )


def constant(train: Episodes, held_out: Episodes) -> Reading:
    """The best answer that does not look: the share of walls of each cell, and the mean place of each target."""
    shape = held_out.pose.shape[:2]
    walls = np.broadcast_to(train.walls.mean(0), (*shape, *train.walls.shape[1:]))
    return Reading(walls, np.broadcast_to(train.targets.mean(0), (*shape, *train.targets.shape[1:])))


def score(episodes: Episodes, reading: Reading) -> list[dict[str, Any]]:
    """By age of the episode, and over all ages: walls_accuracy in percent, and objects_error, the mean distance in
    cells."""
    right = ((reading.walls > 0.5) == (episodes.walls[:, None] > 0.5)).mean((-2, -1))
    error = np.linalg.norm(reading.places - episodes.targets[:, None], axis=-1).mean(-1)
    length = right.shape[1]
    bounds = [(low, high) for low, high in pairwise(AGES) if low < length]
    return [
        {
            "age": f"{low}-{min(high, length) - 1}",
            "walls_accuracy": float(100 * right[:, low:high].mean()),
            "objects_error": float(error[:, low:high].mean()),
        }
        for low, high in [*bounds, (0, length)]
    ]


def score_since(episodes: Episodes, reading: Reading) -> list[dict[str, Any]]:
    """objects_error by steps since the target was last seen; "never" where it has not been. Bins without targets are
    left out."""
    error = np.linalg.norm(reading.places - episodes.targets[:, None], axis=-1)
    length = error.shape[1]
    bins = [
        (f"{low}-{high - 1}", (episodes.seen >= low) & (episodes.seen < min(high, length)))
        for low, high in pairwise(SINCE)
    ]
    bins.append(("never", episodes.seen >= length))
    return [{"since_seen": name, "objects_error": float(error[where].mean())} for name, where in bins if where.any()]


def supervised(
    model: WorldModel, train: Episodes, held_out: Episodes, key: str, updates: int, clips: int, seed: int
) -> Reading:
    """Train V, M and probes together to tell walls and targets, on whole episodes: what features could know.

    Args:
        model: with weights of its own, which are changed.
        clips: episodes per update.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        device = next(model.parameters()).device
        probe = MazeProbe(model.feature_size, train.size, train.targets.shape[1], HIDDEN).to(device)
        parts = [*model.encoder.parameters(), *model.dynamics.parameters(), *probe.parameters()]
        optimizer = torch.optim.AdamW(parts, RATE)
        truth = targets_of(train, device)
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, (update + 1) / 100, 2 * (1 - update / updates))
            e = torch.randint(len(train.pose), (clips,))
            feat = _whole(model, train, e.numpy(), key)
            pose = torch.from_numpy(train.pose[e.numpy()]).to(device)
            walls, places = probe(feat, pose)
            true = [value[e][:, None].expand(-1, feat.shape[1], -1) for value in truth]
            loss = probe_loss(walls, places, true[0], true[1])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parts, 1.0)
            optimizer.step()
        with torch.no_grad():
            feat = torch.cat([_whole(model, held_out, np.array([e]), key) for e in range(len(held_out.pose))])
    return reading_of(probe, held_out, feat)


def _whole(model: WorldModel, episodes: Episodes, which: np.ndarray, key: str) -> Tensor:
    """M's features `(B, T, F)` of whole episodes, with gradients."""
    device = next(model.parameters()).device
    image = torch.from_numpy(episodes.image[which]).to(device)
    categorical = model.objective.latent == "categorical"
    z = model.encoder.posterior({key: image})[0] if categorical else model.encoder({key: image})
    action = torch.from_numpy(episodes.prev_action[which]).to(device)
    first = torch.zeros(image.shape[:2], dtype=torch.bool, device=device)
    first[:, 0] = True
    return model.dynamics(
        z, action, torch.ones(image.shape[:2], device=device), first, model.dynamics.initial(len(z))
    ).feat
