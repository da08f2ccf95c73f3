import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longdream.agent.data.replay import MAX_SEGMENTS, Replay
from longdream.agent.run import checkpoint
from longdream.agent.run.checkpoint import DiskFull
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, Row, UserError

SPEC = EnvSpec(
    {"image": ObsSpec("image", (3, 2, 1)), "where": ObsSpec("vector", (2,)), "clock": ObsSpec("discrete", (), 1 << 40)},
    ActionSpec(parts=(3, 2)),
)


def row_at(env, time):
    """What stream `env` holds at `time`, for arrays of both; episodes have another length in each environment."""
    env, time = np.broadcast_arrays(env, time)
    length = 4 + 3 * env
    action = np.concatenate([np.eye(3)[(time + env) % 3], np.eye(2)[time % 2]], axis=-1)
    return {
        "obs": {
            "image": np.broadcast_to((time * 7 + env)[..., None, None, None] % 256, (*time.shape, 3, 2, 1)),
            "where": np.stack([env, time], axis=-1),
            "clock": time,
        },
        "action": action,
        "reward": time / 2 - env,
        "is_first": time % length == 0,
        "terminated": (time % length == length - 1) & (time % 2 == 0),
        "truncated": (time % length == length - 1) & (time % 2 == 1),
        "surprise": (time * 13 + env * 5) % 11 - 2.0,
    }


def fill(replay: Replay, begin: int, end: int) -> None:
    for now in range(begin, end):
        data = row_at(np.arange(replay.num_envs), np.array(now))
        obs = {key: data["obs"][key].astype(spec.dtype) for key, spec in SPEC.obs.items()}
        row = Row(obs, data["is_first"], data["reward"].astype(np.float32), data["terminated"], data["truncated"])
        replay.add(row, data["action"].astype(np.float32), data["surprise"].astype(np.float32))


def check(clips: dict, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Every clip is one piece of one stream, every value is where it belongs; returns environments and first times."""
    envs, times = clips["obs"]["where"][:, 0, 0].astype(int), clips["obs"]["clock"][:, 0]
    expected = row_at(envs[:, None], times[:, None] + np.arange(length))
    expected |= expected.pop("obs")
    got = {**clips, **clips["obs"]}
    del got["obs"]
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert value.shape == (batch, length, *expected[key].shape[2:])
        assert np.array_equal(value, expected[key].astype(value.dtype)), key
    types = {key: value.dtype for key, value in got.items()}
    assert types == {"image": np.uint8, "where": np.float32, "clock": np.int64} | dict.fromkeys(
        ("action", "reward", "surprise"), np.float32
    ) | dict.fromkeys(("is_first", "terminated", "truncated"), bool)
    return envs, times


def same(a: dict, b: dict) -> bool:
    pairs = [(a[key], b[key]) for key in a if key != "obs"] + [(a["obs"][key], b["obs"][key]) for key in a["obs"]]
    return a.keys() == b.keys() and all(np.array_equal(x, y) for x, y in pairs)


MODES = [
    {},
    {"episode_start_fraction": 1.0},
    {"priority_fraction": 1.0},
    {"episode_start_fraction": 0.3, "priority_fraction": 0.4},
]


@given(data=st.data())
def test_clips_are_contiguous_and_span_no_gap(data, tmp_path_factory):
    num_envs, segment_rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    capacity = num_envs * segment_rows * data.draw(st.integers(2, 9)) + data.draw(st.integers(0, num_envs - 1))
    total, length = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 30))
    folder = tmp_path_factory.mktemp("replay")
    try:
        replay = Replay(folder, SPEC, num_envs, capacity, segment_rows)
        fill(replay, 0, total)
        assert len(replay) <= capacity
        first = max(0, -(-total // segment_rows) - replay.max_segments) * segment_rows
        alive = np.zeros(total, bool)
        alive[first:] = True
        state = replay.state()
        lost = data.draw(st.sets(st.sampled_from([seq for seq, _, _ in state["segments"]]), max_size=3))
        for seq in lost:
            (folder / f"segment_{seq:09d}.bin").unlink()
            alive[seq * segment_rows : (seq + 1) * segment_rows] = False
        if lost:
            assert len(replay.restore(state)) == len(lost)
        assert len(replay) == alive.sum() * num_envs
        valid = [t for t in range(total - length + 1) if alive[t : t + length].all()]
        assert replay.can_sample(length) == bool(valid)
        rng = np.random.default_rng(0)
        if not valid:
            with pytest.raises(UserError, match=f"no clip of {length} rows"):
                replay.sample(rng, 1, length)
            return
        for mode in MODES:
            envs, times = check(replay.sample(rng, 20, length, **mode), 20, length)
            assert set(envs) <= set(range(num_envs)) and set(times) <= set(valid)
    finally:
        replay.close()
        shutil.rmtree(folder)


def gapped(folder: Path) -> tuple[Replay, list[int]]:
    """Two streams of times 20..65, of which 30..39 are lost."""
    replay = Replay(folder, SPEC, 2, 100, 10)
    fill(replay, 0, 66)
    state = replay.state()
    (folder / "segment_000000003.bin").unlink()
    assert len(replay.restore(state)) == 1
    return replay, [*range(20, 30), *range(40, 66)]


def assert_drawn_like(counts: dict, expected: dict) -> None:
    """Counts agree with expected probabilities within five standard deviations, cell by cell."""
    total = sum(counts.values())
    assert set(counts) <= {cell for cell, p in expected.items() if p > 0}
    for cell, p in expected.items():
        assert abs(counts.get(cell, 0) - total * p) <= 5 * np.sqrt(total * p * (1 - p)) + 1e-9, cell


def draw(replay: Replay, length: int, rounds: int = 60, **mode) -> dict[tuple[int, int], int]:
    rng, counts = np.random.default_rng(1), {}
    for _ in range(rounds):
        clips = replay.sample(rng, 200, length, **mode)
        for cell in zip(*map(np.ndarray.tolist, check(clips, 200, length)), strict=True):
            counts[cell] = counts.get(cell, 0) + 1
    return counts


def test_every_clip_is_equally_likely(tmp_path):
    replay, alive = gapped(tmp_path)
    valid = [t for t in alive if {t, t + 1, t + 2} <= set(alive)]
    expected = {(env, t): 1 / (2 * len(valid)) for env in (0, 1) for t in valid}
    assert_drawn_like(draw(replay, 3), expected)


def test_every_episode_start_is_equally_likely(tmp_path):
    replay, alive = gapped(tmp_path)
    firsts = [(env, t) for env in (0, 1) for t in alive if t % (4 + 3 * env) == 0 and {*range(t, t + 5)} <= set(alive)]
    assert_drawn_like(draw(replay, 5, episode_start_fraction=1.0), {cell: 1 / len(firsts) for cell in firsts})
    last = [(env, t) for env, t in firsts if t == 56]  # its clip of 10 ends with the newest row
    assert last and set(last) <= set(draw(replay, 10, episode_start_fraction=1.0))
    half = draw(replay, 5, episode_start_fraction=0.5)
    share = sum(half.get(cell, 0) for cell in firsts) / sum(half.values())
    valid = 2 * sum({*range(t, t + 5)} <= set(alive) for t in alive)
    assert abs(share - (0.5 + 0.5 * len(firsts) / valid)) < 0.03


def test_rows_are_drawn_in_proportion_to_their_surprise(tmp_path):
    replay, alive = gapped(tmp_path)
    mass = {(env, t): max(float(row_at(env, t)["surprise"]), 0.0) for env in (0, 1) for t in alive}
    total = sum(mass.values())
    assert_drawn_like(draw(replay, 1, priority_fraction=1.0), {cell: m / total for cell, m in mass.items()})


def test_a_surprising_row_lies_anywhere_in_its_clip(tmp_path):
    replay, alive = gapped(tmp_path)
    expected: dict[tuple[int, int], float] = {}
    long = [t for t in alive if t >= 40]  # the 10 times before the gap are too few for a clip of 12
    mass = {(env, t): max(float(row_at(env, t)["surprise"]), 0.0) for env in (0, 1) for t in long}
    for (env, t), m in mass.items():
        begins = [s for s in range(t - 11, t + 1) if 40 <= s <= 54]
        for s in begins:
            expected[env, s] = expected.get((env, s), 0.0) + m / sum(mass.values()) / len(begins)
    assert_drawn_like(draw(replay, 12, priority_fraction=1.0), expected)


def test_rows_with_a_reward_are_drawn_evenly(tmp_path):
    """Where these have priority; a reward that is not finite is one too."""
    replay = Replay(tmp_path, SPEC, 2, 100, 10, priority="reward")
    rewards = {(0, 3): 1.0, (1, 17): -5.0, (0, 30): np.nan}
    for t in range(40):
        row = plain_row(2, first=t == 0)
        replay.add(
            replace(row, reward=np.array([rewards.get((env, t), 0.0) for env in (0, 1)], np.float32)),
            PAIR,
            np.full(2, 7.0, np.float32),
        )
    drawn = replay.sample(np.random.default_rng(0), 3000, 1, priority_fraction=1.0)["reward"][:, 0]
    for value in (1.0, -5.0):
        assert abs((drawn == value).mean() - 1 / 3) < 0.05
    assert abs(np.isnan(drawn).mean() - 1 / 3) < 0.05


def plain_row(num_envs: int, first: bool) -> Row:
    obs = {"image": np.zeros((num_envs, 3, 2, 1), np.uint8), "where": np.zeros((num_envs, 2), np.float32)}
    obs["clock"] = np.zeros(num_envs, np.int64)
    flag = np.zeros(num_envs, bool)
    return Row(obs, np.full(num_envs, first), np.zeros(num_envs, np.float32), flag, flag)


ACTION = np.array([[1, 0, 0, 0, 1]], np.float32)
PAIR = np.repeat(ACTION, 2, axis=0)


def test_without_episode_starts_or_surprise_the_draw_is_uniform(tmp_path):
    replay = Replay(tmp_path, SPEC, 1, 40, 10)
    for _ in range(15):
        replay.add(plain_row(1, first=False), ACTION, np.zeros(1, np.float32))
    plain = replay.sample(np.random.default_rng(0), 8, 3)
    for mode in MODES:
        assert same(replay.sample(np.random.default_rng(0), 8, 3, **mode), plain)


@pytest.mark.parametrize("box", [False, True])
def test_actions_keep_their_values(tmp_path, box):
    action_spec = ActionSpec((), (0.0,) * 3, (1.0,) * 3) if box else ActionSpec((3,))
    action = np.array([[0.1, -1.0, 0.7]], np.float32) if box else np.array([[0, 1, 0]], np.float32)
    replay = Replay(tmp_path, EnvSpec({"obs": ObsSpec("vector", (1,))}, action_spec), 1, 16, 4)
    flag, zero = np.zeros(1, bool), np.zeros(1, np.float32)
    for _ in range(6):
        replay.add(Row({"obs": zero[:, None]}, flag, zero, flag, flag), action, zero)
    clips = replay.sample(np.random.default_rng(0), 2, 6)
    assert clips["action"].dtype == np.float32 and (clips["action"] == action).all()


@pytest.mark.parametrize("save_at", [3, 20, 37, 95, 100, 163])
def test_restored_and_continued_it_equals_the_uninterrupted_one(tmp_path, save_at):
    """Across a wrap of the ring, with segments evicted after the checkpoint, every mode of drawing."""
    args = (SPEC, 3, 150, 10)  # 5 segments of 10 rows of 3 streams

    def go_on(replay: Replay) -> list[dict]:
        rng, clips = np.random.default_rng(4), []
        for begin in range(save_at, save_at + 40, 8):
            fill(replay, begin, begin + 8)
            clips += [replay.sample(rng, 6, 9, **mode) for mode in MODES]
        return clips

    replay = Replay(tmp_path, *args)
    fill(replay, 0, save_at)
    state = json.loads(json.dumps(replay.state()))
    replay.commit_eviction()
    assert len(list(tmp_path.iterdir())) == len(state["segments"]) <= 5
    expected = go_on(replay)
    replay.close()

    restored = Replay(tmp_path, *args)
    assert restored.restore(state) == []
    assert restored.state() == state and len(list(tmp_path.iterdir())) == len(state["segments"])
    for a, b in zip(go_on(restored), expected, strict=True):
        assert same(a, b)


def test_files_go_only_after_the_checkpoint_that_no_longer_needs_them(tmp_path):
    replay = Replay(tmp_path, SPEC, 1, 30, 10)
    fill(replay, 0, 30)
    early = replay.state()
    replay.commit_eviction()
    fill(replay, 30, 41)  # evicts segments 0 and 1, which the checkpoint needs
    assert len(list(tmp_path.iterdir())) == 5
    late = replay.state()
    fill(replay, 41, 51)  # evicts segment 2, which the next checkpoint needs
    replay.commit_eviction()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"segment_{seq:09d}.bin" for seq in (2, 3, 4, 5)]
    assert replay.restore(late) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"segment_{seq:09d}.bin" for seq in (2, 3, 4)]
    assert len(replay.restore(early)) == 2  # segments 0 and 1 are gone, segment 2 is still good
    assert len(replay) == 10


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        with open(path, "r+b") as file:
            byte = file.read(1)
            file.seek(0)
            file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
@pytest.mark.parametrize("seq", [0, 2, 4])  # the oldest, one in the middle, the one being written
def test_a_damaged_file_is_named_and_dropped(tmp_path, how, seq):
    replay = Replay(tmp_path, SPEC, 2, 200, 10)
    fill(replay, 0, 47)
    state = replay.state()
    replay.close()
    path = tmp_path / f"segment_{seq:09d}.bin"
    damage(path, how)

    replay = Replay(tmp_path, SPEC, 2, 200, 10)
    (warning,) = replay.restore(state)
    assert str(path) in warning and how in warning
    assert path.exists() == (how != "missing")  # kept until a checkpoint knows that it is lost
    lost = set(range(seq * 10, min(seq * 10 + 10, 47)))
    assert len(replay) == 2 * (47 - len(lost))

    # The stream goes on where it stopped; the rest of the lost episode is not joined to what came before.
    moved = 3 if seq == 4 else 0  # after a lost newest file, writing resumes with the next one
    for now in range(47, 60):
        fill(replay, now, now + 1)
    rng, seen = np.random.default_rng(0), set()
    for mode in MODES:
        _, times = check(replay.sample(rng, 300, 4, **mode), 300, 4)
        seen |= {int(t) for t in times}
    covered = {t + i for t in seen for i in range(4)}
    assert not covered & lost and covered == set(range(60)) - lost
    assert replay.state()["next"] == 6 + (moved > 0)
    replay.commit_eviction()
    assert not path.exists()


def test_rows_after_the_checkpoint_do_not_matter(tmp_path):
    replay = Replay(tmp_path, SPEC, 2, 200, 10)
    fill(replay, 0, 13)
    state = replay.state()
    fill(replay, 13, 35)
    replay.close()
    replay = Replay(tmp_path, SPEC, 2, 200, 10)
    assert replay.restore(state) == []
    assert len(replay) == 26
    assert sorted(p.name for p in tmp_path.iterdir()) == ["segment_000000000.bin", "segment_000000001.bin"]


def test_a_run_without_a_checkpoint_starts_afresh(tmp_path):
    replay = Replay(tmp_path, SPEC, 1, 100, 10)
    fill(replay, 0, 35)
    replay.close()
    (tmp_path / "notes.txt").write_text("mine")
    replay = Replay(tmp_path, SPEC, 1, 100, 10)
    fill(replay, 0, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "segment_000000000.bin"]
    assert len(replay) == 5


def test_disk_full_is_one_clear_error_and_the_replay_goes_on(cramped):
    folder = cramped.folder / "replay"
    replay = Replay(folder, SPEC, 2, 4000, 1000)
    fill(replay, 0, 2000)  # the ring is full: the next row needs a new file, and the oldest must wait for it
    size = (folder / "segment_000000000.bin").stat().st_size
    with cramped.room(size // 2), pytest.raises(DiskFull) as error:
        fill(replay, 2000, 2001)
    assert str(folder) in str(error.value) and error.value.needed == size and "\n" not in str(error.value)
    assert len(replay) == 4000 and len(list(folder.iterdir())) == 2
    state = replay.state()
    check(replay.sample(np.random.default_rng(0), 5, 2000), 5, 2000)
    fill(replay, 2000, 2010)
    check(replay.sample(np.random.default_rng(0), 5, 1010), 5, 1010)
    assert replay.restore(state) == [] and len(replay) == 4000


def test_what_does_not_fit_is_refused(tmp_path):
    replay = Replay(tmp_path, SPEC, 2, 100, 10)

    def refused(match: str, surprise=(0.0, 0.0), action=PAIR, **changes) -> None:
        row = plain_row(2, first=True)
        for key, value in changes.items():
            (row.obs if key in row.obs else row.__dict__)[key] = value
        with pytest.raises(ValueError, match=match):
            replay.add(row, action, np.array(surprise, np.float32))

    refused("surprise is not finite", surprise=(0.0, np.nan))
    refused("surprise has shape", surprise=(0.0,))
    refused("one-hot", action=np.full((2, 5), 0.5, np.float32))
    refused("action has shape", action=np.ones((2, 4), np.float32))
    refused("obs/image has shape", image=np.zeros((2, 1, 3, 2), np.uint8))
    refused("obs/image is float32", image=np.zeros((2, 3, 2, 1), np.float32))
    refused("reward is float64", reward=np.zeros(2))
    refused("a row holds", obs={"image": np.zeros((2, 3, 2, 1), np.uint8)})
    assert len(replay) == 0


def test_settings_that_cannot_work_are_refused_in_one_line(tmp_path):
    def refused(match: str, action) -> None:
        with pytest.raises(UserError, match=match) as error:
            action()
        assert "\n" not in str(error.value)

    refused("too small for 8 environments", lambda: Replay(tmp_path, SPEC, 8, 15))
    refused("set it to 200 or more", lambda: Replay(tmp_path, SPEC, 2, 199, 50))
    refused("segment_rows", lambda: Replay(tmp_path, SPEC, 1, 1_000_000, 10))
    state = Replay(tmp_path, SPEC, 2, 100, 10).state()
    refused("written with num_envs = 2, this run has 4", lambda: Replay(tmp_path, SPEC, 4, 200, 10).restore(state))
    other = EnvSpec({"image": ObsSpec("image", (4, 4, 1))}, SPEC.action)
    refused("written with fields", lambda: Replay(tmp_path, other, 2, 100, 10).restore(state))


@given(num_envs=st.integers(1, 64), per_env=st.integers(2, 2_000_000))
def test_the_chosen_segments_are_few_and_fit(num_envs, per_env):
    replay = Replay(Path("never-written"), SPEC, num_envs, num_envs * per_env)
    assert 2 <= replay.max_segments <= MAX_SEGMENTS
    assert 0.75 * per_env - 1 <= replay.max_segments * replay.segment_rows <= per_env
    assert replay.longest_clip >= min(per_env // 2, 1000)


def test_files_and_descriptors_stay_bounded(tmp_path):
    replay, counts = Replay(tmp_path, SPEC, 2, 80, 5), []
    for begin in range(0, 400, 40):
        fill(replay, begin, begin + 40)
        replay.state()
        replay.commit_eviction()
        counts.append((len(os.listdir("/proc/self/fd")), len(list(tmp_path.iterdir()))))
    assert set(counts) == {counts[0]} and counts[0][1] == 8


RESIDENT = """
import sys
import numpy as np
from longdream.agent.data.replay import Replay
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, Row

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

spec = EnvSpec({"image": ObsSpec("image", (64, 64, 3))}, ActionSpec((6,)))
replay, rng = Replay(sys.argv[1], spec, 8, 40_000), np.random.default_rng(0)
image, flag, zero = rng.integers(256, size=(8, 64, 64, 3), dtype=np.uint8), np.zeros(8, bool), np.zeros(8, np.float32)
row, action = Row({"image": image}, flag, zero, flag, flag), np.eye(6, dtype=np.float32)[[0] * 8]
for step in range(4000):
    replay.add(row, action, zero + 1)
    if step == 100:
        before = top = resident()
    if step > 100 and step % 20 == 0:
        replay.sample(rng, 16, 64, priority_fraction=0.5)
    if step > 100 and step % 10 == 0:
        top = max(top, resident())
state = replay.state()
top = max(top, resident())
assert replay.restore(state) == []
print(max(top, resident()) - before)
"""


def test_resident_memory_is_flat_while_the_disk_fills(tmp_path):
    script = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    growth = float(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir()) / 2**20
    assert on_disk > 375 and growth < 200, growth


def collect_and_save(folder: str) -> None:
    replay = Replay(Path(folder, "replay"), SPEC, 2, 400, 20)
    for step in range(0, 10_000_000, 7):
        fill(replay, step, step + 7)
        checkpoint.save(Path(folder, "checkpoints"), step, {"replay": replay.state()})
        replay.commit_eviction()


def test_a_kill_at_any_moment_is_survived_with_every_row(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longdream.agent.data.replay"])
    moments = random.Random(2)
    for trial in range(6):
        folder = tmp_path / str(trial)
        process = context.Process(target=collect_and_save, args=(str(folder),))
        process.start()
        while not ((folder / "checkpoints").is_dir() and checkpoint.latest(folder / "checkpoints")):
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()

        with warnings.catch_warnings(action="error"):
            tree, step = checkpoint.load(folder / "checkpoints")
        replay = Replay(folder / "replay", SPEC, 2, 400, 20)
        assert replay.restore(tree["replay"]) == []
        end = step + 7
        assert len(replay) == 2 * (end - max(0, -(-end // 20) - replay.max_segments) * 20)
        fill(replay, end, end + 30)
        for mode in MODES:
            check(replay.sample(np.random.default_rng(0), 50, 30, **mode), 50, 30)
        replay.close()
