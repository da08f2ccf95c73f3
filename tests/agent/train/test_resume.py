"""A run that is stopped in any way goes on as if it had not been: the same metrics, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run_folder
from longdream.agent.run.signals import Interrupted
from longdream.agent.train import trainer
from longdream.agent.train.trainer import OnlineTrainer

KILLS = int(os.environ.get("LONGDREAM_KILLS", "2"))  # each costs the start of a process
OFTEN = ["--evaluate.save_seconds", "0"]  # a checkpoint at every turn: about half of the time goes into writing them


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "longdream", *arguments]


def start(folder: Path, *arguments: str, **kwargs: Any) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), cwd=folder, stderr=subprocess.PIPE, text=True, **kwargs)


def writing(folder: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(folder.glob("checkpoints/.tmp-*"))


def caught_writing(process: subprocess.Popen, folder: Path) -> bool:
    """Stop the process; whether it stands still in the middle of a write. Otherwise it goes on."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if not writing(folder):
        process.send_signal(signal.SIGCONT)
    return writing(folder)


def reached(folder: Path) -> int:
    """The step of the newest checkpoint, -1 without one."""
    newest = checkpoint.latest(folder / "checkpoints")
    return int(newest.name.split("_")[1].partition(".")[0]) if newest else -1


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics, without what the clock on the wall says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def summary(folder: Path) -> dict[str, Any]:
    """What the run came to, without the time that it took."""
    values = json.loads((folder / "summary.json").read_text())
    assert values.pop("wall_s") > 0
    return values


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of preset tiny from its first step to its last."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    OnlineTrainer.train(options.load("tiny"), folder, console=False)
    lines = record(folder)
    assert any("controller/actor" in line for line in lines) and any("evaluate/return_mean" in line for line in lines)
    return folder


@pytest.fixture
def copy(uninterrupted: Path, tmp_path: Path) -> Path:
    """The same run in a folder of the test's own."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "runs" / "copy"))


@pytest.mark.timeout(240 + 60 * KILLS)
def test_killed_at_random_moments(uninterrupted: Path, tmp_path: Path) -> None:
    moments, kills, in_a_write = random.Random(KILLS), 0, 0
    folder = tmp_path / "runs" / "killed"
    process = start(tmp_path, "train", "tiny", "--name", "killed", *OFTEN)
    while True:
        if kills < KILLS:
            while reached(folder) < 230 * kills // KILLS or (
                kills % 2 and not (writing(folder) and caught_writing(process, folder))
            ):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1) * (kills % 2 == 0))
            process.kill()
        process.communicate(timeout=250)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        in_a_write += writing(folder)
        process = start(tmp_path, "train", "--resume", str(folder))
    print(f"{kills} kills, {in_a_write} of them while a checkpoint was written")
    assert kills == KILLS, "the run was over before it was killed often enough"
    assert in_a_write >= 1
    assert record(folder) == record(uninterrupted)
    assert summary(folder) == summary(uninterrupted)


def test_a_signal_saves_first(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "stopped"
    begin, go_on = ["train", "tiny", "--name", "stopped"], ["train", "--resume", "runs/stopped"]
    for arguments, number in ((begin, signal.SIGINT), (go_on, signal.SIGTERM)):
        process = start(tmp_path, *arguments)
        assert process.stderr is not None
        while "step " not in (line := process.stderr.readline()):
            assert line
        process.send_signal(number)
        err = process.stderr.read()
        assert process.wait(timeout=250) == 128 + number
        assert f"stopped by {number.name}; go on with: longdream train --resume runs/stopped" in err
        assert "Traceback" not in err
    assert not (folder / "summary.json").exists()
    OnlineTrainer.train(run_folder.open_run(folder).config, folder, resume=True, console=False)
    assert record(folder) == record(uninterrupted)
    assert summary(folder) == summary(uninterrupted)


def test_ctrl_c_on_a_terminal_does_not_end_the_workers_first(tmp_path: Path) -> None:
    flags = ["--env", "CartPole-v1", "--env.kwargs", "{}", "--env.workers", "async", "--env.copies", "2"]
    process = start(tmp_path, "train", "tiny", "--name", "async", *flags, start_new_session=True)
    assert process.stderr is not None
    while "step " not in process.stderr.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    err = process.stderr.read()
    assert process.wait(timeout=250) == 130, err
    assert err.count("stopped by SIGINT") == 1 and "Traceback" not in err
    tree, _ = run_folder.open_run(tmp_path / "runs" / "async").saved
    assert tree["collector"] is not None and tree["count"]["lost_worlds"] == 0


@pytest.mark.parametrize("env", ["longdream/Recall-v0", "CartPole-v1", "Pendulum-v1"])
def test_stopped_in_an_evaluation(env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which leaves training as it was. Environments that cannot be saved are run again up to where they were."""
    settings = {"learn.steps": 132, "evaluate.final_episodes": 1, "evaluate.episodes": 1, "env.id": env}
    settings["log.to"] = ("tensorboard",) if env == "longdream/Recall-v0" else ()
    kwargs = {"corridor": 3, "size": 16} if env == "longdream/Recall-v0" else {}
    config = options.update(options.load("tiny"), settings | {"env.kwargs": kwargs})
    OnlineTrainer.train(config, tmp_path / "whole", console=False)
    real, calls = trainer.play, []

    def play(*args: Any) -> Any:
        calls.append(1)
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer, "play", play)
        OnlineTrainer.train(config, tmp_path / "stopped", console=False)
    assert len(calls) == 1
    OnlineTrainer.train(config, tmp_path / "stopped", resume=True, console=False)
    assert record(tmp_path / "stopped") == record(tmp_path / "whole")


def test_killed_before_the_first_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "early"
    shutil.copytree(
        uninterrupted, folder, ignore=shutil.ignore_patterns("checkpoints", "summary.json", run_folder.SAVED)
    )
    assert list(folder.glob("replay/segment_*"))
    OnlineTrainer.train(run_folder.open_run(folder).config, folder, resume=True, console=False)
    assert record(folder) == record(uninterrupted)


def test_a_finished_run_is_not_run_again(copy: Path) -> None:
    before = summary(copy)
    stamp = (copy / "summary.json").stat().st_mtime_ns
    again = OnlineTrainer.train(run_folder.open_run(copy).config, copy, resume=True, console=False)
    assert {key: value for key, value in again.items() if key != "wall_s"} == before
    assert (copy / "summary.json").stat().st_mtime_ns == stamp


def test_a_run_can_be_made_longer(copy: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parents[1])
    before = summary(copy)
    assert cli.main(["train", "--resume", "runs/copy", "--steps", "280"]) == 0
    after = summary(copy)
    assert after["env_steps"] >= 280 and after["updates"] > before["updates"]
    assert run_folder.open_run(copy).config.learn.steps == 280
    assert [line for line in record(copy) if line["step"] < 240] == [
        line for line in record(uninterrupted) if line["step"] < 240
    ]


def test_two_processes_do_not_train_in_one_folder(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_folder.lock(copy):
        assert cli.main(["train", "--resume", str(copy), "--steps", "500"]) == 2
    assert "is being trained by another process" in capsys.readouterr().err


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halfway") / "run"
    config = options.update(options.load("tiny"), {"learn.steps": 120, "evaluate.final_episodes": 1})
    OnlineTrainer.train(config, folder, console=False)
    OnlineTrainer.train(options.update(config, {"learn.steps": 140}), folder, resume=True, console=False)
    run_folder.write_config(folder, options.update(config, {"learn.steps": 160}))
    assert len(list((folder / "checkpoints").iterdir())) == 2
    return folder


@pytest.fixture
def halfway(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints that has not come to its end."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / "halfway"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(halfway: Path, capfd: pytest.CaptureFixture[str]) -> None:
    older, newer = sorted((halfway / "checkpoints").iterdir())
    flip(newer / "weights.safetensors")
    assert cli.main(["train", "--resume", str(halfway)]) == 0
    err = capfd.readouterr().err
    assert f"{newer / 'weights.safetensors'} is damaged (checksum differs)" in err
    assert f"from step {int(older.name.split('_')[1])} on" in err
    assert summary(halfway)["env_steps"] >= 160


def test_no_intact_checkpoint_is_refused(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (halfway / "checkpoints").iterdir():
        (path / "state.safetensors").write_bytes(b"")
    before = sorted((halfway / "checkpoints").rglob("*"))
    assert cli.main(["train", "--resume", str(halfway)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longdream: ")]
    assert len(lines) == 1 and "no intact checkpoint" in lines[0] and "state.safetensors" in lines[0]
    assert sorted((halfway / "checkpoints").rglob("*")) == before


def test_a_damaged_replay_file_is_dropped_and_named(halfway: Path, capfd: pytest.CaptureFixture[str]) -> None:
    segment = min((halfway / "replay").iterdir())
    flip(segment, 0.1)
    assert cli.main(["train", "--resume", str(halfway)]) == 0
    err = capfd.readouterr().err
    assert f"warning: replay file {segment} is altered (checksum differs)" in err
    assert summary(halfway)["env_steps"] >= 160


def test_weights_of_another_agent_are_refused(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder.write_config(halfway, options.update(run_folder.open_run(halfway).config, {"worldmodel.width": 32}))
    assert cli.main(["train", "--resume", str(halfway)]) == 2
    assert "is not of the agent that its config.yaml describes" in capsys.readouterr().err
