"""What a checkpoint and a record hold of each rank (agent/core/ranks.py).

A checkpoint is that of rank 0: weights, optimizers, and all that is its own. What the other ranks have of their own
(environment, index of the replay, random states) lies beside it, packed, under "ranks". So it is whole or not there.
"""

from __future__ import annotations

import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longdream.agent.core.learner import Learner
from longdream.agent.core.ranks import RankFailed, here
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run_folder
from longdream.agent.run.metrics import Averages


def collect(own: dict[str, Any]) -> dict[str, Any]:
    """On rank 0 its own part of a checkpoint, with those of the other ranks."""
    others = here().to_first(checkpoint.to_bytes(own) if here().rank else b"")
    return own | {"ranks": others} if others else own


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run as this rank goes on from it; see `run_folder.newest`.

    Where it was saved by another number of ranks, their own parts mean nothing here: "lost" says what that is.
    """
    ranks = here()
    with warnings.catch_warnings():
        if ranks.rank:  # rank 0 says what there is to say
            warnings.simplefilter("ignore")
        saved = run_folder.newest(folder)
    if saved is None:
        return None
    others = saved.get("ranks", [])
    with run_folder.fitting(folder, saved):
        if len(others) + 1 == ranks.count:
            return saved | checkpoint.from_bytes(others[ranks.rank - 1]) if ranks.rank else saved
        return _of_others(saved, len(others) + 1)


def _of_others(saved: dict[str, Any], before: int) -> dict[str, Any]:
    lost = ["the random states"]
    if "collector" in saved:
        lost = ["the replay", "the episodes under way", *lost]
    elif saved.get("carried"):
        lost = ["M's carried state", *lost]
    count = saved["count"]
    first = here().rank == 0
    if not first:  # these counts are of rank 0 alone
        count = count | {key: 0 for key in ("lost_worlds", "faults") if key in count}
    return saved | {
        "lost": f"the run was saved by {before} rank{'s' * (before > 1)} and goes on with {here().count}: weights, "
        f"optimizers and counts are kept; lost: {', '.join(lost)}",
        "collector": None,
        "collected": saved.get("collected", [0, 0]) if first else [0, 0],
        "averages": {"sums": {}, "numbers": {}},
        "count": count,
    }


def restore_randomness(saved: dict[str, Any], learner: Learner) -> None:
    """Continue torch's random stream of this rank; a new one, where the checkpoint is of other ranks."""
    if "lost" in saved:
        seed_torch(learner, saved["progress"])
        return
    torch.set_rng_state(saved["random"]["torch"])
    if learner.device.type == "cuda" and saved["random"]["cuda"]:
        torch.cuda.set_rng_state_all(saved["random"]["cuda"])


def seed_torch(learner: Learner, progress: int) -> None:
    """Seed torch's random stream of this rank from here on."""
    root = here().seed(learner.config.seed, progress)
    torch.manual_seed(int(np.random.SeedSequence(root).generate_state(1)[0]))


def check_weights(learner: Learner) -> None:
    """Check that all ranks have the same weights.

    Raises:
        RankFailed: they do not.
    """
    if here().count == 1:
        return
    checksum = 0
    for module in learner.modules().values():
        for value in module.state_dict().values():
            if isinstance(value, torch.Tensor):
                checksum = zlib.crc32(value.detach().cpu().numpy().tobytes(), checksum)
    if len({*here().numbers(checksum)[:, 0]}) > 1:
        raise RankFailed("the ranks have different weights: all must run the same version of the same program")


def means(averages: Averages) -> dict[str, float]:
    """Means over what all ranks have added."""
    if here().count == 1:
        return averages.means()
    whole = Averages()
    own = {key: [float(total), int(averages.numbers[key])] for key, total in averages.sums.items()}
    for part in here().gather(own):
        for key, (total, number) in part.items():
            whole.sums[key] = whole.sums.get(key, 0.0) + total
            whole.numbers[key] = whole.numbers.get(key, 0) + number
    return whole.means()


def replay_folder(folder: Path) -> Path:
    """Where this rank's replay lies in the folder of a run."""
    return folder / (f"replay-{here().rank}" if here().rank else "replay")


def remove_stale(folder: Path) -> None:
    """Delete the replays of ranks that a run no longer has, once no checkpoint that goes on needs them."""
    if here().rank:
        return
    for path in folder.glob("replay-*"):
        number = path.name.removeprefix("replay-")
        if number.isdecimal() and int(number) >= here().count:
            shutil.rmtree(path, ignore_errors=True)
