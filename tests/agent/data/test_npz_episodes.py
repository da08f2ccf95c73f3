"""Episodes on disk: what is written is what was seen, and what is damaged is named."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from longdream.agent.data import npz_episodes as offline
from longdream.envs.contract import UserError


def rows(n: int = 5, size: int = 9, targets: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for t in range(n):
        probes = {
            "maze_layout": rng.integers(2, size=(size, size)).astype(np.uint8),
            "agent_pos": rng.normal(size=2),
            "agent_dir": rng.normal(size=2),
            "targets_pos": rng.normal(size=(targets, 2)),
            "targets_vec": rng.normal(size=(targets, 2)),
            "target_index": np.int64(t % targets),
            "target_color": rng.random(3),
        }
        image = rng.integers(256, size=(64, 64, 3)).astype(np.uint8)
        made.append(offline.row(image, t % 6 if t else None, float(t == 2), probes))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    offline.write(tmp_path / "episode.npz", rows())
    return tmp_path / "episode.npz"


def test_what_is_written_is_read(path: Path) -> None:
    episode, wanted = offline.read(path), rows()
    assert list(episode) == list(offline.LAYOUT)
    for key in offline.LAYOUT:
        np.testing.assert_array_equal(episode[key], [row[key] for row in wanted])
    assert episode["image"].shape == (5, 64, 64, 3) and episode["image"].dtype == np.uint8
    np.testing.assert_array_equal(episode["action"][0], np.zeros(6))
    np.testing.assert_array_equal(episode["action"][1:].argmax(1), [1, 2, 3, 4])
    np.testing.assert_array_equal(episode["reward"], [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(episode["target_pos"][4], episode["targets_pos"][4, 1])
    np.testing.assert_array_equal(episode["target_vec"][4], episode["targets_vec"][4, 1])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_types_and_more_entries_are_read_too(path: Path) -> None:
    episode = dict(np.load(path))
    episode |= {"reset": np.zeros(5, bool), "action": episode["action"].astype(bool)}
    episode["agent_pos"] = episode["agent_pos"].astype(np.float64)
    np.savez(path, **episode)
    episode = offline.read(path)
    assert "reset" not in episode and episode["action"].dtype == bool and episode["agent_pos"].dtype == np.float64


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("image", np.zeros((5, 32, 64, 3), np.uint8), r"'image' has shape \(5, 32, 64, 3\), not \(5, 64, 64, 3\)"),
        ("image", np.zeros((5, 64, 64, 3), np.float32), "'image' has type float32"),
        ("reward", np.zeros(4), r"'reward' has shape \(4,\), not \(5\)"),
        ("maze_layout", np.zeros((5, 9, 8), np.uint8), r"'maze_layout' has shape \(5, 9, 8\), not \(5, 9, 9\)"),
        ("targets_vec", np.zeros((5, 4, 2)), r"'targets_vec' has shape \(5, 4, 2\), not \(5, 3, 2\)"),
        ("agent_pos", np.full((5, 2), np.nan), "'agent_pos' is not finite in row 0"),
        ("action", np.ones((5, 6)), "'action' is no one-hot in row 1"),
        ("target_color", np.zeros((5, 3), "U1"), "'target_color' has type"),
    ],
)
def test_an_entry_that_cannot_be_is_named(path: Path, key: str, value: np.ndarray, problem: str) -> None:
    np.savez(path, **dict(np.load(path)) | {key: value})
    with pytest.raises(UserError, match=rf"episode\.npz: {problem}"):
        offline.read(path)


def test_a_damaged_file_is_named(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    with pytest.raises(UserError, match="there is no such file"):
        offline.read(tmp_path / "none.npz")
    for content in (b"", b"not an archive", whole[: len(whole) // 2], whole[-200:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"episode\.npz is damaged"):
            offline.read(path)
    broken = bytearray(whole)
    broken[5000:5100] = bytes(100)  # inside the compressed pictures
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"episode\.npz is damaged: 'image' cannot be read"):
        offline.read(path)


def test_missing_entries_and_other_archives_are_named(path: Path) -> None:
    episode = dict(np.load(path))
    del episode["agent_dir"]
    np.savez(path, **episode)
    with pytest.raises(UserError, match="has no agent_dir: it is no episode"):
        offline.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "hello")
    with pytest.raises(UserError, match="has no image, action"):
        offline.read(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="holds one array"):
        offline.read(path)


def test_nothing_is_unpickled(path: Path) -> None:
    np.savez(path, **dict(np.load(path)) | {"reward": np.array([print] * 5, object)})
    with pytest.raises(UserError, match="'reward' cannot be read"):
        offline.read(path)


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        offline.write(tmp_path / "nowhere" / "episode.npz", rows(2))


def test_an_entry_that_is_no_array_is_damaged(tmp_path: Path, mazes: Path) -> None:
    path = next(mazes.iterdir())
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["reward.npy"] = b"no array"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="'reward' is no array: get it again"):
        offline.read(tmp_path / "a.npz")
