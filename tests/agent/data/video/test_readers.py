"""A reader per layout: rows are what the files say, and what they cannot say is refused."""

import ast
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from longdream.agent.data.video import mp4, npz
from longdream.agent.data.video.folder import load
from longdream.agent.data.video.library import Library, open_library
from longdream.agent.data.video.loader import read_clip
from longdream.agent.data.video.memory_maze import POSE, pose_code
from longdream.agent.data.video.reader import Damaged
from longdream.agent.evaluation.plots import film_path, save_film
from longdream.envs.contract import UserError
from longdream.envs.images import resize_area


def only(library: Library, start: int, clip: int, size: int = 32) -> dict[str, np.ndarray]:
    return read_clip(library, library.recordings[0], start, clip, size)


# -- video files ------------------------------------------------------------------------------------------------------


def test_frames_are_found_by_their_number(tmp_path: Path, shades, write_mp4) -> None:
    frames = shades(50)
    write_mp4(tmp_path / "a.mp4", frames)
    assert mp4.measure(tmp_path / "a.mp4") == (50, (32, 32))
    for start, stop in ((0, 1), (0, 50), (17, 23), (49, 50)):
        decoded = mp4.decode(tmp_path / "a.mp4", start, stop, 32)
        assert decoded.shape == (stop - start, 32, 32, 3) and decoded.dtype == np.uint8
        assert np.abs(decoded.astype(int) - frames[start:stop]).max() <= 2, (start, stop)


def test_a_video_of_an_unknown_kind_is_damaged(tmp_path: Path, shades, write_mp4) -> None:
    write_mp4(tmp_path / "a.mp4", shades(6))
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    with pytest.raises(Damaged, match="of a kind that cannot be decoded"):
        mp4.measure(tmp_path / "a.mp4")


def test_a_video_that_is_cut_short_is_damaged(tmp_path: Path, write_mp4) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, np.random.default_rng(0).integers(256, size=(30, 32, 32, 3)).astype(np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Damaged, match="is damaged or no video"):
        mp4.measure(path)
    path.write_bytes(b"")
    with pytest.raises(Damaged, match="is damaged or no video"):
        mp4.measure(path)


# -- entries of NPZ files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_of_an_entry(tmp_path: Path, save) -> None:
    values = np.random.default_rng(0).normal(size=(40, 3, 2))
    save(tmp_path / "a.npz", values=values, other=np.arange(4))
    assert npz.entries(tmp_path / "a.npz")["values"] == ((40, 3, 2), np.dtype(float))
    for start, stop in ((0, 40), (7, 9), (39, 40), (5, 5)):
        np.testing.assert_array_equal(npz.rows(tmp_path / "a.npz", "values", start, stop), values[start:stop])
    with pytest.raises(Damaged, match="ends before row 41"):
        npz.rows(tmp_path / "a.npz", "values", 0, 41)
    with pytest.raises(Damaged, match="KeyError"):
        npz.rows(tmp_path / "a.npz", "none")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.ones((3, 2), ">f4")),
        np.zeros(()),
        np.zeros((0, 4), bool),
        np.array([("a", 1)], [("name", "<U3"), ("n", "i4")]),  # read by numpy
    ],
)
def test_headers_are_read_as_numpy_reads_them(tmp_path: Path, array: np.ndarray) -> None:
    for version in ((1, 0), (2, 0)):
        with open(tmp_path / "a.npy", "wb") as file:
            np.lib.format.write_array(file, array, version)
        with open(tmp_path / "a.npy", "rb") as file:
            shape, dtype, fortran = npz.read_header(file)
            assert (shape, dtype, fortran) == (array.shape, array.dtype, np.isfortran(array))
            assert len(file.read()) == array.nbytes  # the array comes next


def test_headers_are_read_without_ast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CPython 3.11 it fails at times where several threads read: whole files would be left out, or end the run."""

    def fail(_: str) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    np.save(tmp_path / "a.npy", np.arange(40) % 3)
    np.savez(tmp_path / "a.npz", a=np.zeros((3, 2)))
    monkeypatch.setattr(ast, "literal_eval", fail)
    with pytest.raises(SystemError):
        np.load(tmp_path / "a.npy")
    assert len(load(tmp_path / "a.mp4")) == 40 and npz.rows(tmp_path / "a.npz", "a").shape == (3, 2)


def test_a_changed_byte_is_found_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", values=np.zeros((100, 10)))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[4000] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(Damaged, match="Bad CRC-32"):
        npz.rows(tmp_path / "a.npz", "values", 50, 100)


# -- Memory Maze ------------------------------------------------------------------------------------------------------


def test_memory_maze(tmp_path: Path, write_maze) -> None:
    frames = write_maze(tmp_path / "deep" / "a.npz")
    library = open_library(tmp_path)
    assert library.layout == "memory-maze" and library.reader.rewarded and library.reader.action.parts == (6,)
    assert library.recordings[0].length == 12 and library.recordings[0].name == "deep/a.npz"
    rows = only(library, 0, 5, 64)
    np.testing.assert_array_equal(rows["image"], frames[:5])
    assert rows["action"].argmax(1).tolist() == [1, 2, 3, 4, 5]  # row t holds what was chosen from it
    assert rows["reward"].tolist() == [0, 1, 2, 3, 4] and rows["before"].tolist() == [0] * 6
    assert rows["is_first"].tolist() == [True] + [False] * 4 and not rows["truncated"].any()
    rows = only(library, 7, 5, 64)
    assert rows["before"].argmax() == 1 and rows["action"][:4].argmax(1).tolist() == [2, 3, 4, 5]
    assert not rows["action"][4].any() and not rows["is_first"].any()  # nobody knows what was done at the end
    assert rows["truncated"].tolist() == [False] * 4 + [True] and not rows["terminated"].any()


def test_pose_in_place_of_actions(tmp_path: Path, write_maze) -> None:
    write_maze(tmp_path / "a.npz")
    library = open_library(tmp_path, condition="pose")
    assert library.reader.action.parts == () and library.reader.action.size == POSE
    rows = only(library, 3, 4)
    # row t holds the pose of row t + 1: M is told it when it predicts that row
    np.testing.assert_allclose(rows["action"][:, 0], 2 * np.arange(4, 8) / 9 - 1, rtol=1e-6)
    place, look = np.stack([2 * np.arange(3, 8) / 9 - 1, np.zeros(5)], 1), np.array([[1.0, 0.0]] * 5)
    poses = np.concatenate([rows["before"][None], rows["action"]])
    np.testing.assert_allclose(poses, pose_code(place, look), atol=1e-5)
    assert not only(library, 8, 4)["action"][3].any()


def test_poses_are_told_in_waves() -> None:
    place, angle = np.array([[0.5, -1.0], [0.03, 0.2]]), np.array([0.0, 2.0])
    code = pose_code(place, np.stack([np.cos(angle), np.sin(angle)], 1))
    assert code.shape == (2, POSE) and code.dtype == np.float32 and (np.abs(code) <= 1).all()
    np.testing.assert_allclose(code[:, :2], place, atol=1e-6)
    np.testing.assert_allclose(code[0, 2:4], [1, 0], atol=1e-6)  # sin of half a turn's half, of a whole one
    np.testing.assert_allclose(code[1, -8:-4], np.sin(2.0 * np.arange(1, 5)), atol=1e-6)
    np.testing.assert_allclose(code[1, -4:], np.cos(2.0 * np.arange(1, 5)), atol=1e-6)
    near = pose_code(place + np.array([[0, 0], [1 / 9, 0]]), np.stack([np.cos(angle), np.sin(angle)], 1))
    assert np.abs(near[1] - code[1]).max() > 0.5  # half a cell away is far in the finest waves


def test_memory_maze_files_that_are_none(tmp_path: Path, write_maze) -> None:
    write_maze(tmp_path / "a.npz")
    episode = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", **episode | {"reward": np.zeros(3)})
    np.savez(tmp_path / "c.npz", **{key: value for key, value in episode.items() if key != "targets_pos"})
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    library = open_library(tmp_path)
    assert [recording.name for recording in library.recordings] == ["a.npz"]
    assert "'reward' has shape (3,), not (12)" in library.damaged["b.npz"]
    assert "has no targets_pos" in library.damaged["c.npz"] and "BadZipFile" in library.damaged["d.npz"]
    np.savez(tmp_path / "a.npz", **episode | {"action": np.ones((12, 6))})
    with pytest.raises(Damaged, match=r"has an 'action' that is no one-hot, in row 2"):
        only(open_library(tmp_path), 2, 4)
    np.savez(tmp_path / "a.npz", **episode | {"agent_pos": np.full((12, 2), 99.0)})
    with pytest.raises(Damaged, match=r"has a pose in rows 2 to 6 that lies outside the maze"):
        only(open_library(tmp_path, condition="pose"), 2, 4)


# -- TECO -------------------------------------------------------------------------------------------------------------


def test_teco(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(256, size=(10, 24, 32, 3)).astype(np.uint8)
    np.savez_compressed(tmp_path / "a.npz", video=frames, actions=np.arange(10) % 4)
    library = open_library(tmp_path)
    assert library.layout == "teco" and not library.reader.rewarded and library.reader.action.parts == (4,)
    assert library.recordings[0].size == (24, 32)
    rows = only(library, 2, 4, 16)
    assert rows["image"].shape == (4, 16, 16, 3) and rows["action"].argmax(1).tolist() == [3, 0, 1, 2]
    assert rows["before"].argmax() == 2 and not rows["reward"].any()
    np.savez(tmp_path / "a.npz", video=frames, actions=np.arange(10) % 5)
    with pytest.raises(Damaged, match=r"has action 4 in row 4, which is out of range: there are 4, 0 to 3"):
        only(open_library(tmp_path), 0, 6)
    with pytest.raises(UserError, match="has no poses"):
        open_library(tmp_path, condition="pose")
    np.savez(tmp_path / "b.npz", video=frames, actions=np.zeros(9, int))
    np.savez(tmp_path / "c.npz", video=frames[..., 0], actions=np.zeros(10, int))
    damaged = open_library(tmp_path).damaged
    assert "'actions' of shape (9,)" in damaged["b.npz"] and "'video' of shape (10, 24, 32)" in damaged["c.npz"]


# -- a folder of mp4 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.MOV", "a.mkv"])
def test_videos_without_actions(tmp_path: Path, shades, write_mp4, name: str) -> None:
    write_mp4(tmp_path / name, shades(12))
    library = open_library(tmp_path)
    assert library.layout == "mp4" and library.reader.action.size == 1
    rows = only(library, 4, 6, 16)
    assert rows["action"].shape == (6, 1) and not rows["action"].any()
    assert np.abs(rows["image"].astype(int) - shades(6, 16, 4)).max() <= 2


def test_videos_with_actions(tmp_path: Path, shades, write_mp4) -> None:
    for name, n in (("a", 12), ("b", 8)):
        write_mp4(tmp_path / f"{name}.mp4", shades(n))
        np.save(tmp_path / f"{name}.npy", np.arange(n) % 5)
    library = open_library(tmp_path)
    assert library.reader.action.parts == (5,)
    rows = only(library, 2, 4)
    assert rows["action"].argmax(1).tolist() == [2, 3, 4, 0] and rows["before"].argmax() == 1
    np.save(tmp_path / "a.npy", np.arange(12) % 5 - 1)
    assert "whose action -1 in row 0 is out of range" in open_library(tmp_path).damaged["a.mp4"]
    np.save(tmp_path / "a.npy", np.zeros((12, 2)))
    with pytest.raises(UserError, match=r"b\.mp4 are not of the same kind as those of .*a\.mp4"):
        open_library(tmp_path)
    np.save(tmp_path / "b.npy", np.linspace(0, 1.5, 14).reshape(7, 2))  # one less than there are frames
    library = open_library(tmp_path)
    assert library.reader.action.parts == () and library.reader.action.size == 2
    assert "is out of range: numbers must lie in -1 to 1" in library.damaged["b.mp4"]
    np.save(tmp_path / "b.npy", np.linspace(0, 1, 14).reshape(7, 2))
    rows = read_clip(open_library(tmp_path), open_library(tmp_path).recordings[1], 3, 4, 32)
    np.testing.assert_allclose(rows["action"][:, 0], np.arange(3, 7) * 2 / 13, rtol=1e-6)
    (tmp_path / "b.npy").unlink()
    with pytest.raises(UserError, match=r"b\.npy is missing, .*a\.npy is there"):
        open_library(tmp_path)


@pytest.mark.parametrize(
    "change",
    [(b"}", b" "), (b"(8,)", b"(8" + b"0" * 40 + b",)"), (b"'descr'", b"'descr\n"), (b"False", b"F" + b"(" * 300)],
    ids=["no end", "too long", "a broken line", "brackets"],
)
def test_headers_that_are_none_are_one_bad_file(tmp_path: Path, shades, write_mp4, change: tuple[bytes, bytes]) -> None:
    for name in "abc":
        write_mp4(tmp_path / f"{name}.mp4", shades(8))
        np.save(tmp_path / f"{name}.npy", np.zeros(8, int))
    data = (tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(data.replace(*change))
    assert "which is no NPY file of actions" in open_library(tmp_path).damaged["b.mp4"]


BAD = {
    "fewer actions than frames": (np.zeros((5, 2)), "has 8 frames and 5 actions"),
    "words": (np.array(["left"] * 8), r"b\.npy, which holds <U4 of shape \(8,\): actions are whole numbers"),
    "another kind": (np.zeros(8, int), "lies beside actions of whole numbers, others have of 2 float numbers each"),
    "objects": (np.array([None] * 8), "it holds pickled objects"),
    "not a number": (np.full((8, 2), np.nan), "in row 0 is out of range"),
    "cut short": (None, "b.npy, which is no NPY file of actions"),
    "missing": ("missing", "has no b.npy beside it, as others have"),
    "a folder": ("folder", "has no b.npy beside it, as others have"),
}


@pytest.mark.parametrize(("actions", "why"), BAD.values(), ids=BAD)
def test_one_bad_file_of_actions_is_left_out(tmp_path: Path, shades, write_mp4, actions, why: str) -> None:
    for name in "abc":
        write_mp4(tmp_path / f"{name}.mp4", shades(8))
        np.save(tmp_path / f"{name}.npy", np.full((8, 2), 0.5))
    bad = tmp_path / "b.npy"
    if isinstance(actions, np.ndarray):
        np.save(bad, actions)
    elif actions is None:
        bad.write_bytes(bad.read_bytes()[:-20])
    else:
        bad.unlink()
        if actions == "folder":
            bad.mkdir()
    library = open_library(tmp_path)
    assert [recording.name for recording in library.recordings] == ["a.mp4", "c.mp4"]
    assert list(library.damaged) == ["b.mp4"] and re.search(why, library.damaged["b.mp4"])
    assert library.reader.action.size == 2


def test_a_number_that_is_no_action_costs_no_memory(tmp_path: Path, shades, write_mp4) -> None:
    for name, largest in (("a", 2), ("b", 2_000_000_000), ("c", 1)):
        write_mp4(tmp_path / f"{name}.mp4", shades(8))
        np.save(tmp_path / f"{name}.npy", np.array([0] * 7 + [largest]))
    library = open_library(tmp_path)
    assert library.reader.action.parts == (3,) and "action 2000000000 in row 7" in library.damaged["b.mp4"]


@pytest.mark.parametrize("actions", [np.array([0, 1] * 4)[:, None], np.array([False, True] * 4)])
def test_whole_numbers_as_others_save_them(tmp_path: Path, shades, write_mp4, actions: np.ndarray) -> None:
    write_mp4(tmp_path / "a.mp4", shades(8))
    np.save(tmp_path / "a.npy", actions)
    library = open_library(tmp_path)
    assert library.reader.action.parts == (2,) and only(library, 0, 4)["action"].argmax(1).tolist() == [0, 1, 0, 1]


# -- videos as cameras and editors leave them -------------------------------------------------------------------------


def write_turned(path: Path, frames: np.ndarray, degrees: float, mirrored: bool = False) -> None:
    """An mp4 whose header says by how many degrees, against the clock, a player turns it."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width = frames.shape[2]
        stream.height = frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees, hflip=mirrored)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_video_is_turned_as_a_player_turns_it(tmp_path: Path, quarters: int, mirrored: bool) -> None:
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 250  # a corner is white, another one grey
    frames[:, 16:, :32] = 100
    write_turned(tmp_path / "a.mp4", frames, 90 * quarters, mirrored)
    shown = np.rot90(frames, quarters, (1, 2))
    if mirrored:  # after the turn; ffmpeg shows these files in the same way
        shown = shown[:, :, ::-1]
    assert mp4.measure(tmp_path / "a.mp4") == (4, shown.shape[1:3])
    decoded = mp4.decode(tmp_path / "a.mp4", 1, 3, 32)
    assert np.abs(decoded.astype(int) - resize_area(shown[1:3], 32, 32)).mean() < 3


def cut_at_its_start(path: Path, frames: int) -> None:
    """Lets an edit list begin `frames` of the 20 frames a second later, as cutting without encoding again does."""
    data = bytearray(path.read_bytes())
    scale = int.from_bytes(data[(at := data.index(b"mdhd") + 16) : at + 4], "big")
    at = data.index(b"elst") + 8  # behind the name, version and flags; then the number of edits
    assert data[at - 4] == 0 and int.from_bytes(data[at : at + 4], "big") == 1
    begun = int.from_bytes(data[at + 8 : at + 12], "big") + frames * scale // 20
    data[at + 8 : at + 12] = begun.to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize("cut", [1, 7, 20, 33])
def test_frames_that_are_cut_off_are_not_there(tmp_path: Path, shades, write_mp4, cut: int) -> None:
    frames = shades(50)
    write_mp4(tmp_path / "a.mp4", frames)
    cut_at_its_start(tmp_path / "a.mp4", cut)
    assert mp4.measure(tmp_path / "a.mp4") == (50 - cut, (32, 32))
    for start, stop in ((0, 1), (0, 50 - cut), (3, 9), (49 - cut, 50 - cut)):
        decoded = mp4.decode(tmp_path / "a.mp4", start, stop, 32)
        assert np.abs(decoded.astype(int) - frames[cut:][start:stop]).max() <= 2, (start, stop)


def test_a_video_in_fragments(tmp_path: Path, shades) -> None:
    """As cameras and browsers record: the header does not count frames, and searching finds later fragments."""
    av = pytest.importorskip("av")
    frames = shades(40)
    flags = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(str(tmp_path / "a.mp4"), "w", options=flags) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "8", "bf": "2", "crf": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())
    assert mp4.measure(tmp_path / "a.mp4") == (40, (32, 32))
    for start in range(0, 36, 3):
        decoded = mp4.decode(tmp_path / "a.mp4", start, start + 4, 32)
        assert np.abs(decoded.astype(int) - frames[start : start + 4]).max() <= 2, start


def test_a_video_without_pictures(tmp_path: Path, shades, write_mp4) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    write_mp4(tmp_path / "b.mp4", shades(5))
    assert open_library(tmp_path).damaged == {"a.mp4": "holds no video"}


def test_frames_that_were_damaged_are_not_learned_from(tmp_path: Path, write_mp4) -> None:
    """What the decoder had to fill in is refused, and what builds on it; from the next key frame on all is well."""
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    frames = np.random.default_rng(0).integers(256, size=(8, 32, 32, 3)).astype(np.uint8).repeat(5, 0)
    write_mp4(path, frames)
    whole = path.read_bytes()
    true = mp4.decode(path, 0, 40, 16)
    refused = 0
    # (the encoder's bytes differ between machines: damage is tried at many places)
    for at in range(whole.index(b"mdat") + 900, len(whole) - 5000, 400):
        path.write_bytes(whole[:at] + bytes(40) + whole[at + 40 :])
        os.utime(path, ns=(at, at))  # what was cached of another version is not used
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            try:
                told = [(frame.is_corrupt, bool(frame.key_frame)) for frame in container.decode(video=0)]
            except av.error.InvalidDataError:
                continue
        bad = [i for i, (corrupt, _) in enumerate(told) if corrupt]
        keys = [i for i, (_, key) in enumerate(told) if key]
        if not bad or len(told) < 40 or bad[0] > 37 or {bad[0] + 1, bad[0] + 2} & set(keys):
            continue
        for first in (bad[0], bad[0] + 1):
            with pytest.raises(Damaged, match="cannot be decoded"):
                mp4.decode(path, first, first + 2, 16)
            refused += 1
        if after := [key for key in keys if key > bad[-1]]:
            np.testing.assert_array_equal(mp4.decode(path, after[0], 40, 16), true[after[0] :])
    assert refused


def test_only_mp4_files_need_pyav(tmp_path: Path, write_maze, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    write_maze(tmp_path / "maze" / "a.npz")
    assert only(open_library(tmp_path / "maze"), 0, 4)["image"].shape == (4, 32, 32, 3)
    (tmp_path / "a.mp4").write_bytes(b"video")
    with pytest.raises(UserError, match=r"reading .*a\.mp4 needs PyAV: pip install 'longdream\[video\]'"):
        open_library(tmp_path, "mp4")
    assert film_path(tmp_path / "dream.mp4") == tmp_path / "dream.gif"
    with pytest.raises(
        UserError, match=r"writing .*dream\.mp4 needs PyAV: pip install 'longdream\[video\]', or name a \.gif"
    ):
        save_film(tmp_path / "dream.mp4", [], 5)
