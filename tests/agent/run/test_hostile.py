"""Run folders that are damaged or made by a stranger: one line each, and nothing outside of them is touched."""

import copy
import hashlib
import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run_folder
from longdream.agent.run.checkpoint import CheckpointError
from longdream.agent.run.logger import Logger
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints."""
    short = {"learn.steps": 88, "evaluate.final_episodes": 2, "evaluate.every": 0, "evaluate.save_seconds": 0.0}
    short["log.to"] = ("tensorboard",)
    folder = tmp_path_factory.mktemp("trained") / "run"
    OnlineTrainer.train(options.update(options.load("tiny"), short), folder, console=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the working directory, to be changed."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, "run"))


def newest(run: Path) -> Path:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    return path


def resume(run: Path, *flags: str) -> int:
    return cli.main(["train", "--resume", str(run), "--log.to", "[]", *flags])  # pictures would take half of the time


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that there is."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longdream: ")
    return line


# -- links out of the folder ------------------------------------------------------------------------------------------


def outside_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("not of the run\n")


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", ".lock", "summary.json", "replay/segment_000000000.bin", "controller.zip", "notes"]
)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_file_outside_is_touched(
    run: Path, name: str, link: Callable[[Any, Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    outside = Path("outside") / "file"
    outside_file(outside)
    (run / name).unlink(missing_ok=True)
    link(outside.resolve(), run / name)
    done = resume(run, "--steps", "96")
    if link is os.symlink or name.startswith(("metrics", ".lock", "replay")):
        assert done == 2 and name in refusal(capsys)
    assert outside.read_text() == "not of the run\n"


@pytest.mark.parametrize("name", ["replay", "tensorboard", "checkpoints", "videos", "checkpoints/step_000000000999"])
def test_no_folder_outside_is_touched(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    outside = Path("outside")
    outside_file(outside / "segment_000000009.bin")
    outside_file(outside / "file")
    before = {path: path.read_bytes() for path in outside.rglob("*")}
    shutil.rmtree(run / name, ignore_errors=True)
    os.symlink(outside.resolve(), run / name)
    done = resume(run, "--steps", "96")
    if "/" in name:  # a damaged checkpoint: the one before it is used, and the name is removed with time
        assert done == 0 and "falling back" in capsys.readouterr().err
    else:
        assert done == 2 and f"{name} is a link to" in refusal(capsys)
    assert {path: path.read_bytes() for path in outside.rglob("*")} == before


def test_a_dream_is_not_written_through_a_link(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside_file(Path("outside/dream.mp4"))
    shutil.rmtree(run / "videos")  # pictures of the evaluation
    os.symlink(Path("outside").resolve(), run / "videos")
    assert cli.main(["dream", str(run)]) == 2
    assert "videos is a link to" in refusal(capsys)
    assert Path("outside/dream.mp4").read_text() == "not of the run\n"


def test_temporary_names_are_no_way_out(run: Path) -> None:
    outside_file(Path("outside/file"))
    os.symlink(Path("outside/file").resolve(), run / ".config.yaml.tmp")
    run_folder.write_config(run, run_folder.open_run(run).config)
    assert Path("outside/file").read_text() == "not of the run\n" and not (run / "config.yaml").is_symlink()


@pytest.mark.parametrize("name", [".tmp-7", "step_000000000007", "step_000000000999.1"])
@pytest.mark.parametrize("kind", ["link", "loop", "file", "fifo"])
def test_names_of_checkpoints_that_are_none_are_cleared_away(run: Path, name: str, kind: str) -> None:
    outside_file(Path("outside/file"))
    path = run / "checkpoints" / name
    if kind == "link":
        path.symlink_to(Path("outside").resolve())
    else:
        {"loop": a_loop, "file": outside_file, "fifo": a_fifo}[kind](path)
    assert resume(run, "--steps", "104", "--evaluate.save_seconds", "0") == 0
    assert not os.path.lexists(path)
    assert Path("outside/file").read_text() == "not of the run\n"


def test_a_run_may_be_reached_through_a_link(run: Path) -> None:
    os.symlink(run.resolve(), "other-name")
    assert resume(Path("other-name"), "--steps", "96") == 0


# -- files of another kind --------------------------------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(before)


def a_large_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


ODD = [a_folder, a_fifo, a_loop, a_device, a_socket, a_large_file]


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
def test_an_odd_file_in_a_checkpoint_leads_to_the_one_before(run: Path, name: str, odd: Callable) -> None:
    path = newest(run) / name
    path.unlink()
    odd(path)
    step = int(newest(run).name.split("_")[1].split(".")[0])
    with pytest.warns(RuntimeWarning, match=f"{name} is damaged .* falling back"):
        tree, before = run_folder.open_run(run).saved
    assert before <= step and tree["spec"]


@pytest.mark.parametrize("odd", [a_folder, a_fifo, a_loop, a_device, a_socket], ids=lambda odd: odd.__name__)
@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", ".lock", "config.yaml", "replay", "tensorboard"])
def test_an_odd_file_at_the_top_is_named(
    run: Path, name: str, odd: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    if (run / name).is_dir():
        shutil.rmtree(run / name)
        if odd is a_folder:
            odd = outside_file  # what is odd for it
    else:
        (run / name).unlink()
    odd(run / name)
    assert resume(run, "--steps", "96") == 2
    assert name in refusal(capsys)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_gigabytes_are_not_read(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    a_large_file(run / name)
    done = resume(run)
    assert done == (2 if name == "config.yaml" else 0)  # a summary is made again
    assert done == 0 or "config.yaml cannot be read" in refusal(capsys)


# -- files without sense, but with the right checksums ----------------------------------------------------------------


def sign(folder: Path, **changes: Any) -> None:
    """Make the checksums of a checkpoint those of its files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in checkpoint.FILES:
        blob = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    manifest |= changes
    manifest["sha256"] = checkpoint.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 5000,
        "7",
        '{"$": "tensor"}',
        '{"$": "dict", "v": [[[], 1]]}',
        '{"spec": {}}',
        "\x00",
    ],
)
def test_a_senseless_state_leads_to_the_checkpoint_before(run: Path, text: str) -> None:
    (newest(run) / "state.json").write_text(text)
    sign(newest(run))
    with pytest.warns(RuntimeWarning, match="make no sense"):
        assert run_folder.open_run(run).saved[0]["spec"]


@pytest.mark.parametrize("blob", [b"", b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_senseless_tensors_lead_to_the_checkpoint_before(run: Path, blob: bytes) -> None:
    (newest(run) / "weights.safetensors").write_bytes(blob)
    sign(newest(run))
    with pytest.warns(RuntimeWarning, match="make no sense"):
        assert run_folder.open_run(run).saved[0]["spec"]


@pytest.mark.parametrize(
    "changes",
    [{"step": "many"}, {"step": -1}, {"step": True}, {"step": 7}, {"files": {}}, {"files": 7}, {"files": None}],
    ids=str,
)
def test_a_senseless_manifest_leads_to_the_checkpoint_before(run: Path, changes: dict) -> None:
    sign(newest(run), **changes)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert run_folder.open_run(run).saved[0]["spec"]


TREES: dict[str, Callable[[dict], object]] = {
    "no progress": lambda tree: tree.pop("progress"),
    "progress of words": lambda tree: tree.update(progress="far"),
    "no logger": lambda tree: tree.pop("logger"),
    "a negative length": lambda tree: tree["logger"].update(bytes=-1),
    "counts of words": lambda tree: tree["count"].update(lost_worlds="many"),
    "averages": lambda tree: tree.update(averages=[]),
    "no random state": lambda tree: tree["random"].pop("torch"),
}


@pytest.mark.parametrize("change", TREES, ids=str)
def test_a_tree_without_sense_leads_to_the_checkpoint_before(
    run: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, step = checkpoint.load(newest(run))
    tree = copy.deepcopy(tree)
    TREES[change](tree)
    checkpoint.save(run / "checkpoints", step, tree)
    assert resume(run, "--steps", "96") == 0
    assert "falling back to the checkpoint before it" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["replay", "collector", "collected", "weights", "optimizers", "counters"])
@pytest.mark.parametrize("value", [7, "words", {"a": [1]}, [1, 2, 3]], ids=str)
def test_what_cannot_be_put_back_is_one_line(
    run: Path, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, step = checkpoint.load(newest(run))
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", step, tree | {key: value})
    assert resume(run, "--steps", "96") in (0, 1, 2)  # 0: of no use here; 1: there is too little memory
    err = capsys.readouterr().err
    assert "Traceback" not in err and "bug" not in err


SENSELESS: dict[str, Callable[[dict], object]] = {
    "moments of another shape": lambda tree: tree["optimizers"]["model"]["state"][0].update(exp_avg=torch.zeros(1)),
    "a carry of another shape": lambda tree: tree["collector"]["carry"].update(feat=torch.zeros(1, 1)),
    "returns of words": lambda tree: tree["collector"]["running"].update({"return": "far"}),
    "steps of words": lambda tree: tree["collector"].update(counters=["far", 1]),
    "a row of one copy": lambda tree: tree["collector"]["world"]["row"].update(reward=np.zeros(1, np.float32)),
    "no cue": lambda tree: tree["collector"]["world"]["copies"].pop("cue"),
}


@pytest.mark.parametrize("change", SENSELESS, ids=str)
def test_a_state_that_no_training_has_is_refused(run: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree, step = checkpoint.load(newest(run))
    tree = copy.deepcopy(tree)
    SENSELESS[change](tree)
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", step, tree)
    assert resume(run, "--steps", "96") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "checkpoint" in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["evaluate {} --episodes 1", "train --resume {} --steps 96"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hidden: 16", "hidden: 9007199254740992"),
        ("hidden: 16", f"hidden: {10**30}"),
        ("width: 16", "width: 4294967296"),
    ],
)
def test_an_agent_that_no_memory_holds(
    run: Path, command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))
    assert cli.main(command.format(run).split()) in (1, 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("longdream: ")


def test_a_record_of_a_terabyte_is_not_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    a_large_file(run / "metrics.jsonl")
    tree, step = checkpoint.load(newest(run))
    tree["logger"]["bytes"] = 1 << 40
    checkpoint.save(run / "checkpoints", step, tree)
    assert resume(run, "--steps", "96") in (1, 2)
    assert "metrics.jsonl cannot be used (it is empty for most" in capsys.readouterr().err


# -- what is lost or altered ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "renamed", "emptied"])
def test_a_run_whose_checkpoints_are_lost_is_not_begun_anew(
    run: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").unlink()
    if how == "renamed":
        (run / "checkpoints").rename(run / "checkpoint")
    else:
        shutil.rmtree(run / "checkpoints")
    if how == "emptied":
        (run / "checkpoints").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert resume(run, "--steps", "96") == 2
    line = refusal(capsys)
    assert "holds no checkpoint" in line and "metrics.jsonl (" in line and "replay/ (" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    (run / run_folder.SAVED).unlink()
    assert resume(run, "--steps", "96") == 0


def test_an_altered_record_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((run / "metrics.jsonl").read_bytes())
    data[len(data) // 3] ^= 1
    (run / "metrics.jsonl").write_bytes(data)
    assert resume(run, "--steps", "96") == 0
    assert "metrics.jsonl is altered" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train --resume {} --steps 96", "evaluate {} --episodes 1"])
def test_an_altered_configuration_is_told(run: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("gamma: 0.997", "gamma: 0.987"))
    assert cli.main(command.format(run).split()) == 0
    assert "has changed since the checkpoint: controller.gamma = 0.987, was 0.997" in capsys.readouterr().err


def test_what_is_as_it_was_is_not_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resume(run, "--steps", "96", "--evaluate.final_episodes", "3", "--log.to", "") == 0
    assert "warning" not in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_folder.open_run(run).saved[1] >= 96


# -- views, and places that cannot be written -------------------------------------------------------------------------


def test_a_run_goes_on_without_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("in its place")
    with Logger(tmp_path, every=0) as logger:
        for step in range(3):
            logger.write(step, {"x": 1.0})
        logger.state()
    err = capsys.readouterr().err
    assert err.count("TensorBoard cannot be written") == 1 and "Traceback" not in err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # pytest's hook is not ours
def test_a_full_disk_under_tensorboard_alone(cramped, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tensorboard").symlink_to(cramped.folder)
    (tmp_path / "metrics.jsonl").write_text("")
    with cramped.room(16_000), Logger(tmp_path, every=1e9) as logger:
        for step in range(40):
            logger.write(step, {f"metric-{i}": float(i) for i in range(12)})
            if step % 10 == 0:
                logger.state()
    err = capsys.readouterr().err
    assert "Traceback" not in err and "TensorBoard cannot be written" in err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "tiny", "--name", "x" * 260],
        ["train", "tiny", "--name", "a\nb"],
        ["train", "tiny", "--seed", "-1"],
        ["train", "x" * 300 + ".yaml"],
        ["train", "--resume", "x" * 300],
        ["train", "tiny", "--world", "x" * 300],
        ["evaluate", "x" * 300],
        ["dream", "x" * 300],
        ["baseline", "--env", "CartPole-v1", "--steps", "64", "--name", "x" * 260],
        ["baseline", "--env", "CartPole-v1", "--steps", "64", "--seed", "-1"],
        ["evaluate", "random", "--seed", "-1"],
        ["collect", "--env", "longdream/MemoryMaze-9x9-v0", "--out", "o", "--seed", "-1"],
        ["bench", "act", "--seed", "-1"],
        ["collect", "--env", "longdream/MemoryMaze-9x9-v0", "--out", "x" * 300],
        ["demo", "--name", "x" * 260],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_names_and_places_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("longdream: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", ["train tiny", "train tiny --name r", "baseline --env CartPole-v1 --steps 64", "demo"]
)
def test_a_file_where_the_runs_are_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    assert cli.main(command.split()) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "runs" in err.splitlines()[-1]


def test_a_dangling_link_is_a_name_in_use(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "r")
    with pytest.raises(UserError, match="is in use"):
        run_folder.unused("r", "tiny", 0, tmp_path)


def test_an_older_checkpoint_has_no_copy_of_the_configuration(run: Path) -> None:
    tree, step = checkpoint.load(newest(run))
    del tree["config"]
    checkpoint.save(run / "checkpoints", step, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_folder.open_run(run).saved[1] == step


def test_a_config_of_other_types_is_refused(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for value in (None, [], {"a": 1}, "x" * 5000, 2**70, float("nan")):
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"seed": value}))
        with pytest.raises(UserError) as refused:
            run_folder.open_run(run)
        assert not isinstance(refused.value, CheckpointError) and len(str(refused.value)) < 600
