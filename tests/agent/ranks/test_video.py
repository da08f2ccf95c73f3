"""Recordings are shared by ranks without overlap, and a run of several ranks goes on in the middle of an epoch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longdream.agent.config import options
from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import Loader

SHORT = {"learn.updates": 8, "learn.warmup": 3, "evaluate.times": 1, "video.held_out_clips": 3, "video.carry": True}


def batches(folder: Path, shard: int, shards: int, carry: bool) -> list[dict[str, Any]]:
    library = open_library(folder)
    loader = Loader(library, library.recordings, lambda _: (4, 4), 64, 0, carry, shard=shard, shards=shards)
    try:
        return [loader.next().rows for _ in range(6)]
    finally:
        loader.close()


@pytest.mark.parametrize("carry", [False, True])
def test_the_parts_of_ranks_are_the_batches_of_one(mazes: Path, carry: bool) -> None:
    whole = batches(mazes, 0, 1, carry)
    parts = [batches(mazes, shard, 2, carry) for shard in range(2)]
    for one, first, second in zip(whole, *parts, strict=True):
        assert len(first["reward"]) == len(second["reward"]) == 2
        for key in ("reward", "is_first", "action"):
            assert np.array_equal(one[key], np.concatenate([first[key], second[key]])), key
        assert np.array_equal(one["obs"]["image"], np.concatenate([first["obs"]["image"], second["obs"]["image"]]))


RUN = """
import json, sys
from pathlib import Path
from longdream.agent.config import options
from longdream.agent.core.ranks import here, joined
from longdream.agent.run.signals import Interrupted
from longdream.agent.train.video import VideoTrainer

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
config = options.update(options.load("video-tiny"), settings)


class Stopped(VideoTrainer):
    def turn(self):
        super().turn()
        if here().rank and self.progress == 6:
            self.signals.number = 15


with joined():
    VideoTrainer.train(config, folder / "whole", console=False)
    try:
        Stopped.train(config, folder / "stopped", console=False)
    except Interrupted:
        pass
    else:
        raise AssertionError("it was not stopped")
    VideoTrainer.train(config, folder / "stopped", resume=True, console=False)
"""


def record(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def test_two_ranks_learn_from_video_and_go_on_in_the_middle_of_an_epoch(mazes: Path, tmp_path: Path) -> None:
    settings = SHORT | {"video.data": str(mazes)}
    options.update(options.load("video-tiny"), settings)
    store = {"WORLD_SIZE": "2", "LONGDREAM_STORE": str(tmp_path / "store")}
    command = [sys.executable, "-c", RUN, str(tmp_path), json.dumps(settings)]
    processes = [
        subprocess.Popen(command, env=os.environ | store | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=250)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    whole = record(tmp_path / "whole")
    assert any("model/prediction" in line for line in whole) and any(
        "held_out/psnr_open_loop" in line for line in whole
    )
    assert whole[-1]["final/psnr_open_loop"] > 0
    assert [line["count/frames"] for line in whole if "count/frames" in line][-1] == 11 * 16
    assert record(tmp_path / "stopped") == whole
