"""Recordings of Minecraft: MineRL 0.4's and Video PreTraining's, ticks as actions of the environments' own sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.reader import Damaged
from longdream.envs.contract import UserError
from longdream.envs.minerl.actions import action_set
from longdream.envs.minerl.controls import CONTROLS, HUMAN

KEYS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")


def stream(path: Path, write_mp4, frames: np.ndarray, ticks: list[dict[str, Any]]) -> None:
    """A stream of MineRL 0.4; tick t was rewarded with t."""
    write_mp4(path / "recording.mp4", frames)
    entries = {f"action${key}": np.array([tick.get(key, 0) for tick in ticks]) for key in KEYS}
    entries["action$camera"] = np.array([tick.get("camera", (0, 0)) for tick in ticks], np.float32)
    np.savez(path / "rendered.npz", reward=np.arange(len(ticks), dtype=np.float64), **entries)
    (path / "metadata.json").write_text(json.dumps({"duration_steps": len(ticks)}))


TICKS = [{"forward": 1}, {"attack": 1}, {}, {"camera": (0, -15)}, {"forward": 1, "jump": 1}]
NAMES = ["forward", "attack", "noop", "look_left", "forward_jump"]


def test_minerl(tmp_path: Path, write_mp4, shades) -> None:
    folder = tmp_path / "MineRLTreechop-v0"
    stream(folder / "one", write_mp4, shades(6), TICKS)
    stream(folder / "two", write_mp4, shades(5), TICKS)  # a frame is missing
    stream(folder / "zero", write_mp4, np.concatenate([shades(9)[8:].repeat(2, 0), shades(6)]), TICKS)  # a lobby
    library = open_library(tmp_path)
    assert library.layout == "minerl" and library.reader.rewarded
    assert [r.name for r in library.recordings] == [
        f"MineRLTreechop-v0/{name}/recording.mp4" for name in ("one", "zero")
    ]
    assert "5 frames and 5 actions" in library.damaged["MineRLTreechop-v0/two/recording.mp4"]
    names = action_set("flat", CONTROLS["Treechop"], "Treechop").names[0]
    rows = read_clip(library, library.recordings[0], 0, 6, 16)
    assert [names[i] for i in rows["action"][:5].argmax(1)] == NAMES and not rows["action"][5].any()
    assert rows["reward"].tolist() == [0, 0, 1, 2, 3, 4]  # what tick t brought arrives with row t + 1
    assert np.abs(rows["image"].astype(int) - shades(6, 16)).max() <= 2
    lobby = read_clip(library, library.recordings[1], 0, 6, 16)
    assert np.abs(lobby["image"].astype(int) - shades(6, 16)).max() <= 2 and (lobby["action"] == rows["action"]).all()
    rows = read_clip(library, library.recordings[0], 2, 3, 16)
    assert names[rows["before"].argmax()] == "attack" and rows["reward"].tolist() == [1, 2, 3]
    assert open_library(folder / "one").recordings[0].length == 6  # a single stream, too
    factored = open_library(tmp_path, actions="factored").reader.action
    assert len(factored.parts) == 7 and factored.parts[-1] == 11
    stream(tmp_path / "MineRLNavigateDense-v0" / "three", write_mp4, shades(6), TICKS)
    with pytest.raises(UserError, match="recordings of MineRLNavigateDense-v0, MineRLTreechop-v0: give those of one"):
        open_library(tmp_path)


def line(keys: tuple[str, ...] = (), buttons: tuple[int, ...] = (), dx: float = 0.0) -> str:
    keyboard = {"keys": [f"key.keyboard.{key}" for key in keys]}
    return json.dumps({"mouse": {"dx": dx, "dy": 0.0, "buttons": buttons, "newButtons": ()}, "keyboard": keyboard})


def test_vpt(tmp_path: Path, write_mp4, shades) -> None:
    write_mp4(tmp_path / "a.mp4", shades(6))
    lines = [line(("w",)), line((), (0,)), line(), line(dx=-100.0), line(("w", "space")), line(("e",)), line()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    library = open_library(tmp_path)
    assert library.layout == "vpt" and not library.reader.rewarded and library.recordings[0].length == 6
    names = action_set("flat", HUMAN, "ObtainDiamondShovel").names[0]
    rows = read_clip(library, library.recordings[0], 1, 5, 16)
    assert [names[i] for i in rows["action"].argmax(1)] == [*NAMES[1:], "inventory"]  # line t was done at frame t
    assert names[rows["before"].argmax()] == "forward"
    assert open_library(tmp_path, actions="vpt").reader.action.parts == (8641, 121)
    with pytest.raises(UserError, match="has no poses"):
        open_library(tmp_path, condition="pose")


def test_a_broken_line_damages_the_recording(tmp_path: Path, write_mp4, shades) -> None:
    write_mp4(tmp_path / "a.mp4", shades(6))
    (tmp_path / "a.jsonl").write_text("\n".join([line()] * 3 + ["{"] + [line()] * 2))
    library = open_library(tmp_path)
    with pytest.raises(Damaged, match="line 4 is no tick"):
        read_clip(library, library.recordings[0], 0, 2, 16)
