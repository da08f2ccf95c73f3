import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longdream.agent.run.checkpoint import FILES, CheckpointError, DiskFull, latest, load, save
from longdream.envs.contract import UserError


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert [(type(k), k) for k in a] == [(type(k), k) for k in b], where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8)), where
    elif isinstance(a, np.ndarray | np.generic):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), where
    elif isinstance(a, float):
        assert math.copysign(1, a) == math.copysign(1, b) and (a == b or (math.isnan(a) and math.isnan(b))), where
    else:
        assert a == b, where


def small_tree(step: int) -> dict:
    return {
        "weights": {"model": {"w": torch.full((50, 40), float(step))}},
        "moments": np.full(300, step),
        "step": step,
    }


def test_round_trip_is_exact(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {
        "weights": {
            "a": {"w": torch.randn(3, 5), "tied": shared},
            "a.w": torch.ones(2, dtype=torch.bfloat16),
            "b": [shared],
        },
        "floats": [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.1, 5e-324, 1e308],
        "ints": [2**53 + 1, -(2**127), True, 0],
        "texts": ["", "λ\n\ud800", None],
        "shapes": {"tuple": (1, (2.0, []), ()), "list": [1, [2.0, ()], []], "empty": {}},
        "keys": {0: "int", "0": "str", (1, "x"): "tuple", None: "none", True: "bool", 1.5: "float"},
        "$": {"$": "tensor"},
        "tensors": [
            torch.tensor(3.5, dtype=torch.float64),
            torch.empty(0, 4, dtype=torch.int64),
            torch.empty(0, 4, dtype=torch.int64),
            torch.arange(12).reshape(3, 4).T[1:],
            torch.tensor([math.nan, -0.0]),
            torch.tensor([True, False]),
        ],
        "arrays": {
            dtype: np.arange(-3, 3).astype(dtype)
            for dtype in ("bool", "uint8", "int8", "uint16", "int64", "uint64", "float16", "float32", "float64")
        },
        "odd arrays": [np.array(2.5), np.zeros((0, 3), np.uint8), np.arange(12).reshape(3, 4)[:, ::2], np.float32(0.1)],
    }
    assert save(tmp_path, 12345, tree) == tmp_path / "step_000000012345" == latest(tmp_path)
    loaded, step = load(tmp_path)
    assert step == 12345
    assert_same(loaded, tree)
    assert loaded["weights"]["a"]["tied"] is loaded["weights"]["b"][0]
    assert loaded["tensors"][1] is not loaded["tensors"][2]  # empty ones have no address to tell them apart by
    loaded["arrays"]["uint8"][0] = 1  # the reader's own, writable


dtypes = hnp.scalar_dtypes().filter(lambda dtype: dtype.kind in "biuf" and dtype.isnative and dtype.itemsize <= 8)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), arrays)
keys = st.one_of(st.text(max_size=4), st.integers(), st.just("$"))
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(tree=st.dictionaries(keys, trees, max_size=4))
def test_any_tree_comes_back(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("any")
    try:
        save(root, 1, tree)
        assert_same(load(root)[0], tree)
    finally:
        shutil.rmtree(root)


def test_learning_and_random_state_continue_bit_for_bit(tmp_path):
    def build():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2), np.random.default_rng(5)

    def learn(model, optimizer, generator, updates):
        losses = []
        for _ in range(updates):
            x = torch.randn(16, 4) + torch.from_numpy(generator.normal(size=(16, 4)).astype(np.float32))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer, generator = build()
    learn(model, optimizer, generator, 5)
    tree = {
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": generator.bit_generator.state,
    }
    save(tmp_path, 5, tree)
    expected = learn(model, optimizer, generator, 5)

    tree, _ = load(tmp_path)
    model, optimizer, generator = build()
    model.load_state_dict(tree["weights"])
    optimizer.load_state_dict(tree["optimizer"])
    torch.set_rng_state(tree["torch"])
    generator.bit_generator.state = tree["numpy"]
    assert learn(model, optimizer, generator, 5) == expected


@pytest.mark.parametrize("bad", [object(), b"bytes", {1, 2}, np.array(["text"]), np.array([object()])])
def test_anything_else_is_refused_by_name_and_leaves_no_trace(tmp_path, bad):
    with pytest.raises(TypeError, match=r"part\.1"):
        save(tmp_path, 1, {"part": [0, bad]})
    assert list(tmp_path.iterdir()) == []


def test_the_newest_remain(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, small_tree(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000000002", "step_000000000003"]
    save(tmp_path, 4, small_tree(4), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000000004"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 7, small_tree(7))
    for value in ("second", "third"):
        save(tmp_path, 7, {"value": value}, keep=1)
        assert load(tmp_path) == ({"value": value}, 7)
        assert len(list(tmp_path.iterdir())) == 1


def test_going_back_drops_the_future_that_was_given_up(tmp_path):
    for step in (100, 200):
        save(tmp_path, step, small_tree(step))
    flip(tmp_path / "step_000000000200" / "state.json", 0)
    save(tmp_path, 150, small_tree(150))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000000100", "step_000000000150"]


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def refuse(folder: Path, name: str) -> None:
    """The damaged checkpoint is refused with the file's name, and its predecessor takes its place."""
    with pytest.raises(CheckpointError, match=name) as error:
        load(folder)
    assert "\n" not in str(error.value) and isinstance(error.value, UserError)
    with pytest.warns(RuntimeWarning, match=name):
        tree, step = load(folder.parent)
    assert step == 1
    assert_same(tree, small_tree(1))


@pytest.mark.parametrize("name", FILES)
def test_an_altered_byte_is_found_wherever_it_is(tmp_path, name):
    save(tmp_path, 1, small_tree(1))
    folder = save(tmp_path, 2, small_tree(2))
    size = (folder / name).stat().st_size
    for position in {0, size - 1, *random.Random(0).sample(range(size), 10)}:
        flip(folder / name, position)
        refuse(folder, name)
        flip(folder / name, position)
    assert load(tmp_path)[1] == 2


def test_an_altered_byte_in_the_manifest_is_found(tmp_path):
    folder = save(tmp_path, 2, small_tree(2))
    for position in range((folder / "manifest.json").stat().st_size):
        for mask in (1, 0x80):
            flip(folder / "manifest.json", position, mask)
            with pytest.raises(CheckpointError):
                load(folder)
            flip(folder / "manifest.json", position, mask)
    assert load(folder)[1] == 2


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_truncated_or_missing_file_is_found(tmp_path, name):
    save(tmp_path, 1, small_tree(1))
    folder = save(tmp_path, 2, small_tree(2))
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    refuse(folder, name)
    (folder / name).unlink()
    refuse(folder, name)


def test_nothing_intact_or_nothing_at_all_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "step_000000000009")
    flip(save(tmp_path, 1, small_tree(1)) / "state.json", 3)
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match=r"no intact checkpoint.*state\.json"):
        load(tmp_path)


def test_a_newer_format_is_refused_even_with_an_older_one_beside_it(tmp_path):
    save(tmp_path, 1, small_tree(1))
    folder = save(tmp_path, 2, small_tree(2))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    for path in (folder, tmp_path):
        with pytest.raises(CheckpointError, match=r"format 99.*update"):
            load(path)


def test_disk_full_leaves_the_old_checkpoint_and_no_litter(cramped):
    root = cramped.folder / "checkpoints"
    save(root, 1, small_tree(1))
    with cramped.room(100_000), pytest.raises(DiskFull) as error:
        save(root, 2, {"weights": {"w": torch.zeros(1_000_000)}})
    assert str(root) in str(error.value) and error.value.needed > 4_000_000 and "\n" not in str(error.value)
    assert [p.name for p in root.iterdir()] == ["step_000000000001"]
    assert_same(load(root)[0], small_tree(1))
    save(root, 2, small_tree(2))
    assert load(root)[1] == 2


def keep_saving(root: str) -> None:
    for step in range(1, 1_000_000):
        save(Path(root), step, small_tree(step))


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longdream.agent.run.checkpoint"])
    moments, interrupted = random.Random(1), 0
    for trial in range(15):
        root = tmp_path / str(trial)
        process = context.Process(target=keep_saving, args=(str(root),))
        process.start()
        while not (root.is_dir() and latest(root)):
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.06))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        interrupted += any(root.glob(".tmp-*"))

        with warnings.catch_warnings(action="error"):
            tree, step = load(root)
        assert_same(tree, small_tree(step))
        save(root, step + 1, small_tree(step + 1))
        assert sorted(p.name for p in root.iterdir()) == [f"step_{s:012d}" for s in (step, step + 1)][-2:]
    assert interrupted > 0  # some of the kills did hit the middle of a save
