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


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_vpt(tmp_path: Path, write_mp4, shades, name: str) -> None:
    write_mp4(tmp_path / name, shades(6))
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


def test_lines_as_others_write_them(tmp_path: Path, write_mp4, shades) -> None:
    """A mark of byte order, buttons as floats, blank lines and a last line without an end are read."""
    write_mp4(tmp_path / "a.mp4", shades(6))
    lines = [line(("w",)), line((), (0,)).replace("[0]", "[0.0]"), "", line(("w",)), line((), (0,)), line(), line()]
    (tmp_path / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    library = open_library(tmp_path)
    names = action_set("flat", HUMAN, "ObtainDiamondShovel").names[0]
    taken = read_clip(library, library.recordings[0], 0, 5, 16)["action"].argmax(1)
    assert [names[i] for i in taken] == ["forward", "attack", "forward", "attack", "noop"]


def with_tick(number: int) -> str:
    return json.dumps(json.loads(line()) | {"tick": number, "serverTick": 7})


BAD = {
    "no such file": (None, "has no b.jsonl beside it"),
    "empty": ([], "empty jsonl file"),
    "lines are missing": ([with_tick(i) for i in (0, 1, 4, 5)], "line 3 is tick 4, after tick 1: lines are missing"),
    "a camera that is no number": ([line(dx=float("nan"))] * 6, "the camera of tick 0 is not finite"),
    "a number beyond floats": ([line().replace('"dx": 0.0', '"dx": 1' + 400 * "0")] * 6, "OverflowError"),
    "buttons that are none": ([line().replace('"buttons": []', '"buttons": null')] * 6, "line 1 is no tick"),
    "lists": (["[]"] * 6, "line 1 is no tick"),
}


@pytest.mark.parametrize(("lines", "why"), BAD.values(), ids=BAD)
def test_one_bad_file_of_ticks_is_left_out(tmp_path: Path, write_mp4, shades, lines: Any, why: str) -> None:
    for name in "abc":
        write_mp4(tmp_path / f"{name}.mp4", shades(6))
        (tmp_path / f"{name}.jsonl").write_text("\n".join([line()] * 6))
    (tmp_path / "b.jsonl").unlink()
    if lines is not None:
        (tmp_path / "b.jsonl").write_text("\n".join(lines))
    library = open_library(tmp_path)
    told = dict(library.damaged)
    for recording in library.recordings:
        try:
            read_clip(library, recording, 0, 2, 16)
        except Damaged as error:
            told[recording.name] = str(error)
    assert list(told) == ["b.mp4"] and why in told["b.mp4"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"reward": np.zeros((5, 1))}, "reward of shape (5, 1)"),
        ({"action$camera": np.zeros(())}, "action$camera of shape ()"),
        ({"action$camera": np.full((5, 2), np.inf)}, "the camera of tick 0 is not finite"),
        ({"reward": np.full(5, np.nan)}, "has reward nan"),
        (None, "has no rendered.npz beside it"),
    ],
)
def test_one_bad_stream_is_left_out(tmp_path: Path, write_mp4, shades, wrong: Any, why: str) -> None:
    folder = tmp_path / "MineRLTreechop-v0"
    for name in ("one", "two"):
        stream(folder / name, write_mp4, shades(6), TICKS)
    rendered = folder / "one" / "rendered.npz"
    if wrong is None:
        rendered.unlink()
    else:
        np.savez(rendered, **dict(np.load(rendered)) | wrong)
    library = open_library(tmp_path)
    told = dict(library.damaged)
    for recording in library.recordings:
        try:
            read_clip(library, recording, 0, 4, 16)
        except Damaged as error:
            told[recording.name] = str(error)
    assert list(told) == ["MineRLTreechop-v0/one/recording.mp4"] and why in next(iter(told.values()))
