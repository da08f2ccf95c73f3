"""The console: printing where nobody reads it any more, and JSON that ends standard output whatever else prints."""

import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longdream.agent.cli import main as cli
from longdream.agent.cli.output import Lasting

TRAIN = [sys.executable, "-m", "longdream", "train", "tiny", "--name", "r", "--seed", "1"]
SHORT = ["--steps", "80", "--evaluate.final_episodes", "2", "--evaluate.every", "0"]
LOUD = """
import atexit, os, subprocess, threading
import gymnasium as gym, numpy as np


class Loud(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        atexit.register(print, "bye from Python")
        atexit.register(os.write, 1, b"bye from below Python\\n")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        os.write(1, b"a library prints\\n")
        subprocess.run(["echo", "a child prints"])
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        print("the environment prints")
        return np.zeros(3, np.float32), 0.0, self.t >= 6, False, {}


gym.register("Loud-v0", entry_point=Loud)
"""


class Broken:
    encoding = "utf-8"

    def __init__(self, error: Exception):
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def fileno(self) -> int:
        raise OSError


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.EBADF])
def test_a_stream_that_nobody_reads_is_silent(number: int) -> None:
    stream = Lasting(Broken(OSError(number, "gone")))
    assert stream.write("text") == 4
    stream.flush()
    assert stream.gone


def test_another_error_of_a_stream_is_not_hidden() -> None:
    with pytest.raises(OSError, match="odd"):
        Lasting(Broken(OSError(errno.ENOTSUP, "odd"))).write("text")


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_json_is_the_last_line_whoever_prints(tmp_path: Path, workers: str) -> None:
    (tmp_path / "loud.py").write_text(LOUD)
    flags = ["--env", "loud:Loud-v0", "--env.workers", workers, "--env.copies", "2", *SHORT, "--json"]
    done = subprocess.run([*TRAIN, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # nothing else is in it, either
    assert json.loads(line)["env"] == "loud:Loud-v0"
    for text in ("a library prints", "a child prints", "the environment prints"):
        assert text in done.stderr


def test_an_error_is_json_too(tmp_path: Path) -> None:
    done = subprocess.run([*TRAIN, "--no", "1", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown flag --no" in json.loads(done.stdout)["error"]


def test_a_run_outlives_its_reader(tmp_path: Path) -> None:
    command = f"{' '.join([*TRAIN, *SHORT])} 2>&1 | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "0", done.stdout
    assert (tmp_path / "runs/r/summary.json").exists()


def test_a_run_outlives_streams_that_were_closed(tmp_path: Path) -> None:
    command = f"{' '.join([*TRAIN, *SHORT])} 0<&- 1>&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path).returncode == 0
    lines = (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line) for line in lines)  # no other file got the number of stdout


def test_a_terminal_that_is_closed_ends_the_run_with_everything_saved(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    long = [*TRAIN, "--steps", "100000", "--evaluate.save_seconds", "1000"]

    def adopt() -> None:
        import fcntl
        import termios

        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests run under nohup
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(long, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, preexec_fn=adopt)
    os.close(slave)
    metrics = tmp_path / "runs/r/metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        if select.select([master], [], [], 0.1)[0]:
            os.read(master, 1 << 16)  # as a terminal does: once it holds a few lines that nobody reads, writing waits
    os.close(master)
    assert process.wait() == 128 + signal.SIGHUP
    assert list((tmp_path / "runs/r/checkpoints").glob("step_*"))


def test_under_nohup_a_run_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NOHUP]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.split() == ["None", "1", "1"]


NOHUP = """
import signal
from longdream.agent.run.signals import Signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Signals() as signals:
    signal.raise_signal(signal.SIGHUP)
    print(signals.number)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with Signals() as signals:
    for _ in range(2):  # the shell and the terminal send one each
        signal.raise_signal(signal.SIGHUP)
        print(signals.number)
"""


def test_names_that_the_console_cannot_show(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "LC_ALL": "C"}
    environment |= {"PYTHONCOERCECLOCALE": "0"}
    command: list[Any] = [*TRAIN, *SHORT]
    command[command.index("r")] = "größe-日本".encode()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (folder,) = (tmp_path / "runs").iterdir()
    again = [*TRAIN[:4], "--resume", str(folder), "--steps", "96"]
    environment |= {"PYTHONIOENCODING": "latin-1:strict"}
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), 2, "runs/x cannot be used (Read-only file system)"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 9),
            2,
            "xxxxxxxxx cannot be used (File name too long)",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "disk full: runs/x cannot be written"),
    ],
)
def test_errors_of_places_are_one_line(
    error: OSError, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "command", fail)
    assert cli.main([]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
