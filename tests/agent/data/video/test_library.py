"""A folder of recordings: its layout is recognised or named, what is wrong with it is said, a share is held out."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from longdream.agent.data.video.library import LAYOUTS, open_library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.reader import Damaged
from longdream.envs.contract import UserError


def test_a_folder_that_is_not_recognised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        open_library(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt is a file: --data names the folder of recordings, such as"):
        open_library(tmp_path / "notes.txt")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(UserError) as caught:
        open_library(tmp_path)
    assert all(f"{name}: {kind.what}" in str(caught.value) for name, kind in LAYOUTS.items())
    assert "\n" not in str(caught.value)


def test_a_layout_can_be_named(tmp_path: Path, shades, write_maze, write_mp4) -> None:
    write_maze(tmp_path / "a.npz")
    write_mp4(tmp_path / "film.mp4", shades(9))
    assert open_library(tmp_path).layout == "memory-maze"
    assert open_library(tmp_path, "mp4").recordings[0].name == "film.mp4"
    with pytest.raises(UserError, match="no recordings of layout teco: NPZ files with entries video and actions"):
        open_library(tmp_path, "teco")


def test_frames_of_mixed_size(tmp_path: Path, shades, write_mp4) -> None:
    write_mp4(tmp_path / "a.mp4", shades(9))
    write_mp4(tmp_path / "b.mp4", shades(9, side=48))
    with pytest.raises(UserError, match=r"frames of mixed size, 32 x 32 in a\.mp4 and 48 x 48 in b\.mp4"):
        open_library(tmp_path)


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"none of the 1 recordings in .* can be read: a\.mp4 is damaged or no video"):
        open_library(tmp_path)


def test_a_share_is_held_out(mazes: Path) -> None:
    library = open_library(mazes)
    learned, held_out = library.held_out(0.3)
    assert len(held_out) == 2 and len(learned) == 4
    assert {r.name for r in learned} | {r.name for r in held_out} == {r.name for r in library.recordings}
    assert open_library(mazes).held_out(0.3) == (learned, held_out)
    assert library.held_out(0) == (library.recordings, []) and len(library.held_out(0.01)[1]) == 1
    assert set(library.held_out(0.5)[1]) >= set(held_out)  # a larger share holds the smaller
    for path in sorted(mazes.iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match="holds one recording"):
        open_library(mazes).held_out(0.1)


def test_folders_as_people_have_them(tmp_path: Path, shades, write_maze, write_mp4) -> None:
    """Linked folders, names in capitals, what macOS leaves, and files of statistics that come first by name."""
    write_maze(tmp_path / "elsewhere" / "a.npz")
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "linked-again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "circle").symlink_to(data, target_is_directory=True)
    write_maze(data / "deep" / "B.NPZ")
    write_maze(data / "__MACOSX" / "c.npz")
    (data / "deep" / "._B.NPZ").write_bytes(b"\0\5\x16\7")
    np.savez(data / "_stats.npz", mean=np.zeros(3))
    (data / "gone.npz").symlink_to(tmp_path / "nothing.npz")
    os.mkfifo(data / "pipe.npz")
    library = open_library(data)
    assert library.layout == "memory-maze"
    assert [recording.name for recording in library.recordings] == ["deep/B.NPZ", "linked/a.npz"]
    assert "has no image" in library.damaged.pop("_stats.npz") and "cannot be read" in library.damaged.pop("gone.npz")
    assert "is no file but a FIFO" in library.damaged.pop("pipe.npz")
    assert not library.damaged
    write_mp4(tmp_path / "films" / "a.mp4", shades(9))
    (tmp_path / "films" / "a.mp4").rename(tmp_path / "films" / "A.MP4")
    np.save(tmp_path / "films" / "A.npy", np.arange(9) % 3)
    (tmp_path / "films" / "A.npy").rename(tmp_path / "films" / "A.NPY")
    write_mp4(tmp_path / "films" / "c.mp4", shades(9))
    np.save(tmp_path / "films" / "c.npy", np.arange(9) % 3)
    os.mkfifo(tmp_path / "films" / "b.mkv")
    os.mkfifo(tmp_path / "films" / "b.npy")
    films = open_library(tmp_path / "films")
    assert films.reader.action.parts == (3,) and list(films.damaged) == ["b.mkv"]


def test_bytes_of_any_kind_damage_only_their_file(mazes: Path) -> None:
    whole = (mazes / "episode-1.npz").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(40):
        data = bytearray(whole)
        for at in rng.integers(len(data) - 1500, len(data), 6) if i % 2 else rng.integers(0, 400, 6):
            data[at] = rng.integers(256)
        (mazes / "episode-1.npz").write_bytes(data)
        library = open_library(mazes)
        assert len(library.recordings) + len(library.damaged) == 6 and set(library.damaged) <= {"episode-1.npz"}
        for recording in library.recordings[:2]:
            with suppress(Damaged):
                read_clip(library, recording, 0, 12, 16)
