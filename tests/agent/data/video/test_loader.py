"""Clips in an order that depends on nothing but seed, epoch and position, and survives damage."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longdream.agent.data.video.kept import Kept
from longdream.agent.data.video.library import open_library
from longdream.agent.data.video.loader import Loaded, Loader, Place, check_lengths, read_clip, retraced
from longdream.agent.data.video.order import epoch_order
from longdream.envs.contract import UserError
from longdream.worldmodel.types import Batch

LENGTHS = [12, 7, 3, 20]


def stays(update: int) -> tuple[int, int]:
    return 4, 3


@contextmanager
def loader(
    folder: Path, plan=stays, seed: int = 0, carry: bool = False, known: dict[str, str] | None = None, **kwargs: Any
) -> Iterator[Loader]:
    library = open_library(folder)
    library.damaged.update(known or {})
    made = Loader(library, library.recordings, plan, 64, seed, carry, **kwargs)
    try:
        yield made
    finally:
        made.close()


def same(one: Loaded, other: Loaded) -> bool:
    keys = [key for key in one.rows if key != "obs"]
    equal = all(np.array_equal(one.rows[key], other.rows[key]) for key in keys)
    return equal and np.array_equal(one.rows["obs"]["image"], other.rows["obs"]["image"]) and one.place == other.place


# -- order ------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_clip_once() -> None:
    order = epoch_order(LENGTHS, 4, 2, seed=0, epoch=0, carry=False)
    assert order.shape == (4, 2, 2)  # 3 + 1 + 0 + 5 clips, of which one fills no batch
    clips = [(int(i), int(start)) for i, start in order.reshape(-1, 2)]
    rows = [(i, start + k) for i, start in clips for k in range(4)]
    assert len(set(rows)) == len(rows) and all(0 <= row < LENGTHS[i] for i, row in rows)
    assert clips != sorted(clips)


@pytest.mark.parametrize("carry", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch(carry: bool) -> None:
    made = [epoch_order(LENGTHS * 3, 4, 2, *where, carry) for where in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2]) and not np.array_equal(made[0], made[3])


def test_carried_clips_follow_each_other() -> None:
    order = epoch_order([40, 40, 40], 4, 3, seed=0, epoch=0, carry=True)
    assert order.shape == (10, 3, 2)
    for lane in order.swapaxes(0, 1):
        assert len(set(lane[:, 0].tolist())) == 1 and lane[:, 1].tolist() == list(range(0, 40, 4))


def test_few_clips_come_again_within_a_batch() -> None:
    order = epoch_order([9], 4, 5, seed=0, epoch=0, carry=False)
    assert order.shape == (1, 5, 2)
    assert len(epoch_order([3], 4, 5, seed=0, epoch=0, carry=False)) == 0


# -- loading ----------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_contract(mazes: Path) -> None:
    with loader(mazes) as clips:
        batch = Batch.of(clips.next().rows)
    assert batch.obs["image"].shape == (3, 4, 64, 64, 3) and batch.action.shape == (3, 4, 6)
    assert batch.is_first[:, 0].all() and not batch.is_first[:, 1:].any()
    # before its first row a clip knows what was done there, if there was a row before
    begins = batch.reward[:, 0] == 0
    assert ((batch.prev_action()[:, 0].sum(1) == 0) == begins).all()
    assert (batch.prev_action()[:, 1:] == batch.action[:, :-1]).all()


@pytest.mark.parametrize("carry", [False, True])
def test_it_goes_on_from_any_place(mazes: Path, carry: bool) -> None:
    def plan(update: int) -> tuple[int, int]:
        return (4, 3) if update < 7 else (6, 2)

    with loader(mazes, plan, carry=carry) as clips:
        whole = [clips.next() for _ in range(12)]
    assert [loaded.place.epoch for loaded in whole[:8]] == [0] * 6 + [1] * 1 + [
        2
    ] * 1  # 18 clips; other clips, new epoch
    for stop in (3, 6, 7, 9):
        with loader(mazes, plan, carry=carry, update=stop, place=whole[stop - 1].place) as clips:
            assert all(same(clips.next(), loaded) for loaded in whole[stop:])


def test_carried_clips_say_where_they_do_not_follow(tmp_path: Path, write_maze) -> None:
    for i, n in enumerate((12, 12, 8)):
        write_maze(tmp_path / f"{i}.npz", n, seed=i)
    with loader(tmp_path, lambda _: (4, 2), carry=True) as clips:
        batches = [clips.next() for _ in range(8)]
    before = ((-1, -1),) * 2
    for loaded in batches:
        for b, (recording, behind) in enumerate(loaded.place.line):
            assert loaded.rows["is_first"][b, 0] == (before[b] != (recording, behind - 4))
        before = loaded.place.line
    first = np.concatenate([loaded.rows["is_first"][:, 0] for loaded in batches])
    assert 0 < first.sum() < len(first)


# -- damage -----------------------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(b"image.npy") + 60_000  # inside the compressed pictures, behind the first rows
    data[at : at + 2000] = bytes(2000)
    path.write_bytes(data)


@pytest.mark.parametrize("carry", [False, True])
def test_damaged_files_are_named_once_and_skipped(mazes: Path, carry: bool) -> None:
    spoil(mazes / "episode-2.npz")
    (mazes / "episode-4.npz").write_bytes(b"")
    with loader(mazes, carry=carry) as clips:
        assert list(clips.library.damaged) == ["episode-4.npz"]
        batches = [clips.next() for _ in range(15)]
        assert sorted(clips.library.damaged) == ["episode-2.npz", "episode-4.npz"]
        names = [recording.name for recording in clips.recordings]
    assert [list(each.damaged) for each in batches if each.damaged] == [["episode-2.npz"]]
    when = next(i for i, each in enumerate(batches) if each.damaged)
    assert all(names[i] != "episode-2.npz" for each in batches[when:] for i, _ in each.place.line)
    known = {name: why for each in batches[:9] for name, why in each.damaged.items()}
    with loader(mazes, carry=carry, known=known, update=9, place=batches[8].place) as clips:
        assert all(same(clips.next(), each) for each in batches[9:])


def test_nothing_left(tmp_path: Path, write_maze) -> None:
    write_maze(tmp_path / "a.npz")
    spoil(tmp_path / "a.npz")
    with (
        loader(tmp_path) as clips,
        pytest.raises(UserError, match=r"recording of 4 rows is left that can be read; of 1, a\.npz is damaged"),
    ):
        for _ in range(5):
            clips.next()


def test_recordings_that_are_too_short(tmp_path: Path, write_maze) -> None:
    write_maze(tmp_path / "a.npz", 6)
    write_maze(tmp_path / "b.npz", 9)
    with loader(tmp_path, lambda _: (8, 1)) as clips:
        assert clips.too_short(8) == 1 and clips.too_short(6) == 0
        assert {i for _ in range(4) for i, _ in clips.next().place.line} == {1}
    library = open_library(tmp_path)
    with pytest.raises(UserError, match=r"clips of 10 rows are asked for.*b\.npz, has 9: lower video\.lengths"):
        check_lengths(library.recordings, tmp_path, 10)


def test_an_error_in_the_reading_thread_is_told(mazes: Path) -> None:
    def plan(update: int) -> tuple[int, int]:
        if update == 3:
            raise UserError("no plan")
        return 4, 3

    with loader(mazes, plan) as clips, pytest.raises(UserError, match="no plan"):
        for _ in range(7):
            clips.next()


@pytest.mark.parametrize("wrong", [{"action": np.ones((12, 6))}, {"reward": np.full(12, np.nan, np.float32)}])
def test_what_one_file_says_wrongly_ends_no_run(mazes: Path, wrong: dict[str, np.ndarray]) -> None:
    episode = dict(np.load(mazes / "episode-1.npz"))
    np.savez(mazes / "episode-1.npz", **episode | wrong)
    with loader(mazes) as clips:
        for _ in range(7):
            clips.next()
        assert list(clips.library.damaged) == ["episode-1.npz"]


def test_a_place_is_small(mazes: Path) -> None:
    with loader(mazes) as clips:
        place = clips.next().place
    assert place == Place(0, 1, 4, place.line) and len(place.line) == 3


# -- ways of loading --------------------------------------------------------------------------------------------------


def test_the_way_back_shows_what_was_seen(mazes: Path) -> None:
    def poses() -> Any:
        library = open_library(mazes, condition="pose")
        return Loader(library, library.recordings, lambda update: (7, 4), 64, 0, False, retrace=0.5)

    clips = poses()
    try:
        batches = [clips.next() for _ in range(2)]
    finally:
        clips.close()
    for loaded in batches:
        rows = loaded.rows
        poses = np.concatenate([rows["before"][:, None], rows["action"]], 1)  # of row t at t
        for b, (image, pose) in enumerate(zip(rows["obs"]["image"], poses, strict=True)):
            back = b % 2 == 1  # every second clip
            assert np.array_equal(image[4:], image[2::-1]) == back
            assert np.array_equal(pose[4:7], pose[2::-1]) == back
            assert rows["is_first"][b].tolist() == [True] + [False] * 6
            assert not (back and (rows["reward"][b].any() or rows["truncated"][b].any()))


def test_a_clip_of_two_rows_goes_nowhere() -> None:
    rows = {key: np.arange(2.0) for key in ("image", "reward", "surprise", "terminated", "truncated")}
    rows_back = retraced(rows | {"action": np.ones((2, 3)), "before": np.zeros(3)})
    assert rows_back["image"].tolist() == [0, 1] and rows_back["action"].tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("carry", [False, True])
def test_what_is_kept_in_memory_is_what_is_on_disk(mazes: Path, carry: bool) -> None:
    library = open_library(mazes)
    library.reader = Kept(library.reader)
    kept = Loader(library, library.recordings, stays, 64, 0, carry)
    with loader(mazes, carry=carry) as clips:
        assert all(same(kept.next(), clips.next()) for _ in range(12))
        for recording in library.recordings:  # nothing is asked of the files any more
            recording.path.unlink()
        kept.close()
    assert read_clip(library, library.recordings[0], 2, 5, 64)["image"].shape == (5, 64, 64, 3)
