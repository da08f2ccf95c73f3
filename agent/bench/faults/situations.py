"""The list of faults of docs/faults.md as situations: each a real command, in processes of its own, within a bound."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from longdream.agent.bench.faults import environment
from longdream.agent.bench.faults.processes import BOUND_S, Ended, begin, end, run
from longdream.agent.run import checkpoint

Situation = Callable[[Path], None]
SHORT = ("--evaluate.every", "0", "--evaluate.final_episodes", "2", "--learn.steps", "100")
TRUSTED = "--trust"


class Failed(Exception):
    """A situation ended otherwise than docs/faults.md says."""


def survive(only: str, workers: int, folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Go through all situations whose name contains `only`. Returns what was wrong by name; "" where nothing was."""
    shutil.rmtree(folder, ignore_errors=True)
    base = folder / "base"
    base.mkdir(parents=True)
    chosen = {name: each for name, each in situations(base).items() if only in name}
    if any(base in getattr(each, "args", ()) for each in chosen.values()):
        made = _faulty("none", base, "--name", "run", "--evaluate.save_seconds", "0")
        _expect(made.code == 0, made, "the run to be damaged was not trained")

    def go_through(number: int, name: str) -> str:
        place = folder / f"situation-{number}"
        place.mkdir()
        try:
            chosen[name](place)
        except Failed as failed:
            say(f"not survived: {name}: {failed}")
            return str(failed)
        say(name)
        shutil.rmtree(place, ignore_errors=True)
        return ""

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(go_through, range(len(chosen)), chosen))
    return dict(zip(chosen, results, strict=True))


def situations(base: Path) -> dict[str, Situation]:
    """All of them by name; `base` has a finished run of `environment.Faulty`, in runs/run."""
    listed: dict[str, Situation] = {}
    for workers, faults in FAILURES.items():
        for fault, says in faults.items():
            listed[f"an environment fails ({workers}): {fault}"] = partial(_fails, fault, says, workers)
    for name, (workers, fault, flags) in GOING_ON.items():
        listed[f"a run goes on: {name}"] = partial(_goes_on, fault, workers, flags)
    for workers, fault, code in ENDED_AT_ONCE:
        listed[f"an environment cannot be made ({workers}): {fault}"] = partial(_cannot_be_made, fault, workers, code)
    for fault in ("os._exit", "raise", "hang"):
        listed[f"a remote environment fails: {fault}"] = partial(_remote, fault)
    listed["episodes do not end"] = _endless
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        listed[f"a signal: {number.name}"] = partial(_signal, number)
    listed["nobody reads the console"] = _console_gone
    listed["the disk is full"] = _disk_full
    listed["two processes, one run"] = _two_processes
    listed["the last line of --json"] = _json
    for file, ways in DAMAGE.items():
        for how in ways:
            listed[f"a file of the checkpoint: {file} is {how}"] = partial(_damaged_checkpoint, base, file, how)
    for name, (change, says, code) in CHANGES.items():
        listed[f"a run is changed: {name}"] = partial(_changed, base, change, says, code)
    for command in ("evaluate", "dream", "train --resume"):
        listed[f"a stranger's run: {command}"] = partial(_stranger, base, command)
    for words in MISTAKES:
        listed[f"a mistake: longdream {words[:60]}"] = partial(_mistake, words)
    return listed


def _expect(true: bool, ended: Ended, what: str) -> None:
    if ended.code is None:
        raise Failed(f"it hangs; the last lines: {ended.err[-300:]}")
    if not true:
        raise Failed(f"{what} (exit code {ended.code}): {ended.err[-600:]}")


def _one_line(ended: Ended, code: int, says: str = "") -> None:
    """Expect one message and no traceback."""
    _expect(ended.code == code, ended, f"expected exit code {code}")
    _expect("Traceback" not in ended.err, ended, "a traceback")
    _expect(bool(ended.message) and says in ended.err, ended, f"expected a message with {says!r}")


# -- environments ------------------------------------------------------------------------------------------------------

SYNC = {
    "raise": "raised in step: ZeroDivisionError",
    "exit": "raised in step: SystemExit",
    "interrupt": "raised in step: KeyboardInterrupt",
    "os._exit": "raised in step: SystemExit: os._exit(3)",
    "another shape": "of shape (4,)",
    "another type": "the observation 'obs'",
    "not finite": "not finite",
    "reward is a list": "returned the reward [1.0, 2.0]",
    "reward is None": "returned the reward None",
    "flag is text": "returned terminated = 'no'",
}
ASYNC = SYNC | {"os._exit": "died in step", "hang": "gave no answer to step within 4 s"}
FAILURES = {"sync": SYNC, "async": ASYNC, "beside": ASYNC}
"""By way of running copies: what goes wrong, and what the message says."""
RESUMED = ("raise", "os._exit", "hang", "another shape")
"""After which a run is resumed here as well."""
GOING_ON = {
    "its environment changes folder, torch and numbers": ("sync", "changes settings", ()),
    "its environment does not close": ("async", "hang in close", ("--env.timeout_s", "3")),
    "its environment beside it does not close": ("beside", "hang in close", ("--env.timeout_s", "3")),
    "a reward that is not finite": ("sync", "reward is not finite", ()),
    "TensorBoard cannot write": ("sync", "blocks tensorboard", ("--log.to", "tensorboard")),
    "episodes end by their limit alone": ("sync", "endless", ("--env.kwargs.max_episode_steps", "9")),
}
ENDED_AT_ONCE = (
    ("sync", "exit in init", 2),
    ("async", "exit in init", 1),
    ("async", "hang in init", 1),
    ("beside", "exit in init", 1),
    ("beside", "hang in init", 1),
)


def _faulty(fault: str, place: Path, *flags: str, mark: bool = False) -> Ended:
    """Train on the environment that fails."""
    kwargs: dict[str, Any] = {"fault": fault, "at": 30 if fault != "blocks tensorboard" else 1}
    kwargs |= {"mark": str(place / "mark")} if mark else {}
    env = ("--env", environment.ID, "--env.kwargs", json.dumps(kwargs), "--env.copies", "2")
    return run(["train", "tiny", *env, *SHORT, *flags], place)


def _finished(place: Path, ended: Ended) -> Path:
    """The run, which is whole."""
    runs = sorted((place / "runs").iterdir())
    _expect(ended.code == 0 and len(runs) == 1 and (runs[0] / "summary.json").exists(), ended, "no whole run")
    _expect("Traceback" not in ended.err, ended, "a traceback")
    return runs[0]


def _fails(fault: str, says: str, workers: str, place: Path) -> None:
    ended = _faulty(fault, place, "--env.workers", workers, "--env.timeout_s", "4", "--name", "run", mark=True)
    _expect(ended.code == 1, ended, "expected exit code 1")
    _expect("environment worker" in ended.err and says in ended.err, ended, f"expected a message with {says!r}")
    _expect("go on with: longdream train --resume runs/run" in ended.err, ended, "no word on how to go on")
    _expect("trainer.py" not in ended.err, ended, "a traceback of longdream")
    _expect(checkpoint.latest(place / "runs" / "run" / "checkpoints") is not None, ended, "nothing was saved")
    if fault in RESUMED:
        _finished(place, run(["train", "--resume", "runs/run"], place))


def _goes_on(fault: str, workers: str, flags: Iterable[str], place: Path) -> None:
    _finished(place, _faulty(fault, place, "--env.workers", workers, *flags, mark=True))


def _cannot_be_made(fault: str, workers: str, code: int, place: Path) -> None:
    _one_line(_faulty(fault, place, "--env.workers", workers, "--env.timeout_s", "4"), code, "Faulty-v0")
    if (place / "runs").exists():
        raise Failed("a folder was made")


def _remote(fault: str, place: Path) -> None:
    shutil.copyfile(environment.__file__, place / "far.py")
    kwargs = {"timeout_s": 3, "kwargs": {"fault": fault, "mark": str(place / "mark"), "at": 12}}
    env = f"remote:{sys.executable}:far:Faulty-v0"
    words = ["train", "tiny", "--env", env, "--env.kwargs", json.dumps(kwargs), "--env.copies", "2", *SHORT]
    folder = _finished(place, run(words, place))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if max(line.get("count/faults", 0) for line in lines) < 1:
        raise Failed("the fault was not counted")


def _endless(place: Path) -> None:
    kwargs = json.dumps({"fault": "endless"})
    words = ["evaluate", "random", "--env", environment.ID, "--env.kwargs", kwargs, "--episodes", "1"]
    _one_line(run(words, place), 1, "max_episode_steps")


# -- processes ---------------------------------------------------------------------------------------------------------


def _until_a_step(process: Any) -> None:
    """Wait until a training says that it has begun."""
    while "step " not in (line := process.stderr.readline()):
        if not line:
            raise Failed(f"it ended before its first step (exit code {process.wait()})")


def _signal(number: signal.Signals, place: Path) -> None:
    process = begin(["train", "tiny", "--name", "run"], place)
    _until_a_step(process)
    process.send_signal(number)
    ended = end(process)
    _one_line(ended, 128 + number, "go on with: longdream train --resume runs/run")
    _finished(place, run(["train", "--resume", "runs/run"], place))


def _console_gone(place: Path) -> None:
    process = begin(["train", "tiny", "--name", "run"], place)
    _until_a_step(process)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    code = process.wait(BOUND_S)
    if code != 0 or not (place / "runs" / "run" / "summary.json").exists():
        raise Failed(f"exit code {code}")


def _disk_full(place: Path) -> None:
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    ended = run(["train", "tiny", "--name", "run"], place, preexec_fn=limit)
    _one_line(ended, 1, "bytes are needed in")
    _finished(place, run(["train", "--resume", "runs/run"], place))


def _two_processes(place: Path) -> None:
    process = begin(["train", "tiny", "--name", "run", "--steps", "1000000", "--evaluate.every", "0"], place)
    _until_a_step(process)
    _one_line(run(["train", "--resume", "runs/run"], place), 2, "is being trained by another process")
    _one_line(run(["train", "tiny", "--name", "run"], place), 2, "is in use")
    process.send_signal(signal.SIGTERM)
    _one_line(end(process), 128 + signal.SIGTERM, "go on with")


def _json(place: Path) -> None:
    ended = _faulty("prints", place, "--json")
    _expect(ended.code == 0, ended, "expected exit code 0")
    lines = ended.out.splitlines()
    if len(lines) != 1 or "return_mean" not in json.loads(lines[0]):
        raise Failed(f"stdout has {len(lines)} lines: {ended.out[-300:]}")


# -- files -------------------------------------------------------------------------------------------------------------


DAMAGE = {
    "manifest.json": ("altered", "lost", "a link to itself"),
    "state.json": ("cut short", "a FIFO"),
    "state.safetensors": ("altered", "a folder"),
    "weights.safetensors": ("cut short", "lost"),
}


def _copied(base: Path, place: Path) -> Path:
    """The finished run, in `place`, trusted as it is."""
    return Path(shutil.copytree(base / "runs" / "run", place / "runs" / "run", symlinks=True))


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif how == "a folder":
        path.mkdir()
    elif how == "a FIFO":
        os.mkfifo(path)
    elif how == "a link to itself":
        path.symlink_to(path.name)


def _damaged_checkpoint(base: Path, file: str, how: str, place: Path) -> None:
    newest = checkpoint.latest(_copied(base, place) / "checkpoints")
    assert newest is not None
    _damage(newest / file, how)
    ended = run(["evaluate", "runs/run", "--episodes", "1", TRUSTED], place)
    _expect(ended.code == 0 and "Traceback" not in ended.err, ended, "the checkpoint before was not used")
    _expect(file in ended.err and "falling back" in ended.err, ended, "no warning that names the file")


def _lose_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def _lose_all_but_config(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("*/manifest.json"):
        path.write_text("{}")


def _alter_replay(folder: Path) -> None:
    (folder / "summary.json").unlink()
    _damage(sorted((folder / "replay").iterdir())[0], "altered")


def _cut_metrics(folder: Path) -> None:
    (folder / "summary.json").unlink()
    _damage(folder / "metrics.jsonl", "cut short")


def _alter_metrics(folder: Path) -> None:
    (folder / "summary.json").unlink()
    _damage(folder / "metrics.jsonl", "altered")


def _write_config(change: Callable[[str], str], folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(change(path.read_text()))


def _show_something_else(folder: Path) -> None:
    (folder / "summary.json").unlink()
    _write_config(lambda text: text.replace("fault: none", "fault: none\n    size: 4"), folder)


def _bomb(text: str) -> str:
    return "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 28))


def _link(name: str, folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    path = folder / name
    shutil.move(path, outside)
    path.symlink_to(outside.absolute())


CHANGES: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "its checkpoints are lost": (_lose_checkpoints, "holds no checkpoint, and this run has saved some", 2),
    "no checkpoint is whole": (_lose_all_but_config, "no intact checkpoint", 2),
    "a replay file is altered": (_alter_replay, "warning", 0),
    "its metrics are cut short": (_cut_metrics, "the metrics between are lost", 0),
    "its metrics are altered": (_alter_metrics, "is altered", 0),
    "its configuration is edited": (
        partial(_write_config, lambda text: text.replace("horizon: 3", "horizon: 4")),
        "has changed since the checkpoint: controller.horizon = 4, was 3",
        0,
    ),
    "its configuration is no YAML": (partial(_write_config, lambda text: "a: [" + text), "is no YAML file", 2),
    "its configuration is a bomb": (partial(_write_config, _bomb), "values", 2),
    "its configuration is deep": (partial(_write_config, lambda text: "env: " + "[" * 5000), "deep", 2),
    "its configuration is part of itself": (
        partial(_write_config, lambda text: "env: &e {kwargs: *e}"),
        "is part of itself",
        2,
    ),
    "its environment shows something else": (
        _show_something_else,
        "does not fit this agent",
        2,
    ),
    "its metrics lie elsewhere": (partial(_link, "metrics.jsonl"), "is a link", 2),
    "its replay lies elsewhere": (partial(_link, "replay"), "is a link", 2),
}
"""What happens to a finished run, what its --resume then says, and the exit code."""


def _changed(base: Path, change: Callable[[Path], None], says: str, code: int, place: Path) -> None:
    folder = _copied(base, place)
    change(folder)
    before = _contents(place)
    ended = run(["train", "--resume", "runs/run", TRUSTED], place)
    _expect(ended.code == code and says in ended.err, ended, f"expected exit code {code} and {says!r}")
    _expect("Traceback" not in ended.err, ended, "a traceback")
    if code and _contents(place) != before:
        raise Failed("something was changed")


def _contents(place: Path) -> dict[str, bytes]:
    """Every file of the run, and of what lies outside of it; not the lock."""
    folders = [place / name for name in ("runs", "outside") if (place / name).exists()]
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {str(path): path.read_bytes() for path in paths if path.is_file() and path.name != ".lock"}


def _stranger(base: Path, command: str, place: Path) -> None:
    folder = _copied(base, place)
    kwargs = json.dumps({"python": sys.executable, "env": "os:system", "kwargs": {"command": "touch PWNED"}})
    text = (folder / "config.yaml").read_text()
    head, _, rest = text.partition("env:\n")
    rest = rest.partition("  copies:")[2]
    (folder / "config.yaml").write_text(f"{head}env:\n  id: longdream/Remote-v0\n  kwargs: {kwargs}\n  copies:{rest}")
    _one_line(run([*command.split(), "runs/run"], place), 2, "would run code that is neither built in")
    if (place / "PWNED").exists():
        raise Failed("it ran a command")


MISTAKES = (
    "trian",
    "train",
    "train tinny",
    "train tiny --learn.stps 3",
    "train tiny --seed -1",
    "train tiny --seed 1e400",
    "train tiny --env longdream/Recal-v0",
    "train tiny --env nowhere:Id-v0",
    "train tiny --worldmodel.num_heads 3",
    "train tiny --name " + "x" * 260,
    "train tiny --name a/b",
    "train --resume runs/nothing",
    "train video-tiny --data nowhere",
    "evaluate nowhere",
    "dream nowhere",
    "check-env Nothing-v0",
    "baseline --env CartPole-v1 --algo nobody:Knows",
    "collect --episodes 0",
    "bench nothing",
    "bench faults --kills -1",
)
"""Commands that end in one line and make no folder."""


def _mistake(words: str, place: Path) -> None:
    _one_line(run(words.split(), place), 2)
    if (place / "runs").exists():
        raise Failed("a folder was made")
