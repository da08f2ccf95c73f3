"""`longdream train X --seeds 1,2,3`: a run per seed, some at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longdream.agent.cli.main import folder_of, prepare
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.run import trust
from longdream.agent.run.signals import Interrupted, Signals
from longdream.envs.contract import UserError

MOST = 1_000
"""Seeds, at most."""


def train_seeds(
    words: list[str],
    settings: dict[str, Any],
    name: str | None,
    resume: str | None,
    seeds: str | None,
    jobs: str | None,
) -> dict[str, Any]:
    """Train a run per seed; their summaries, and the mean return with its interquartile mean and interval.

    Args:
        words, settings, name: as of one run; NAME becomes NAME-sSEED. seeds: "1,2,3". jobs: processes at a time.

    Raises:
        UserError: seeds that cannot be read or are given twice, folders that are in use, or settings of no run. No run
            has begun then.
        Interrupted: a signal came. Every run has saved itself.
    """
    if seeds is None:
        raise UserError("--jobs goes with --seeds 1,2,3: a single run is one process")
    numbers = _numbers("--seeds", seeds)
    at_once = _numbers("--jobs", "1" if jobs is None else jobs)[0]
    if resume is not None:
        raise UserError("--seeds starts new runs: resume each one by itself, with --resume RUN")
    if "seed" in settings:
        raise UserError("--seed and --seeds: give one of them")
    if at_once < 1 or len(set(numbers)) < len(numbers) or len(numbers) > MOST:
        raise UserError(f"--seeds {seeds} --jobs {at_once}: give different seeds, at most {MOST}, and at least one job")
    runs: list[tuple[Config, Path]] = []
    in_use = []
    for seed in numbers:
        try:
            own = name and f"{name}-s{seed}"
            config, label = prepare(words[0] if words else None, settings | {"seed": seed}, own, None)
            runs.append((config, folder_of(config, label, own)))
        except UserError as error:
            if " is in use: " not in str(error):
                raise
            in_use.append(str(error).partition(" is in use: ")[0])
    if in_use:
        raise UserError(f"{', '.join(in_use)} exist: leave these seeds out, or give another --name")
    return _together(train_all(runs, at_once))


def _numbers(flag: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.strip("[]()").split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"{flag} {text!r}: give whole numbers, such as {'1,2,3' if flag == '--seeds' else '2'}")
    return [int(part) for part in parts]


def train_all(runs: list[tuple[Config, Path]], jobs: int) -> list[dict[str, Any]]:
    """Train runs in their folders, or go on with those that are there, `jobs` at a time; the summary of each, or its
    folder and error.

    Raises:
        Interrupted: a signal came. Every run has saved itself.
    """
    environ = dict(os.environ)
    if jobs > 1:  # every process would take all cores
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    summaries: dict[Path, dict[str, Any]] = {}
    waiting = list(runs)
    children: dict[Path, Child] = {}
    with TemporaryDirectory() as scratch, Signals() as signals:
        try:
            while waiting or children:
                while waiting and len(children) < jobs:
                    config, folder = waiting.pop(0)
                    words = ["--resume", str(folder)]
                    if not folder.exists():
                        file = Path(scratch) / f"{folder.name}.yaml"
                        file.write_text(options.dump(config), encoding="utf-8")
                        words = [str(file), "--name", folder.name]
                    children[folder] = Child(words, folder, environ)
                for folder in [folder for folder, child in children.items() if child.process.poll() is not None]:
                    summaries[folder] = children.pop(folder).summary()
                signals.check()
                time.sleep(0.1)
        except Interrupted as stop:
            for child in children.values():
                child.process.terminate()
            for child in children.values():
                child.summary()
                stop.add_note(f"go on with: longdream train --resume {child.folder}")
            raise
    return [summaries[folder] for _, folder in runs]


class Child:
    """A run in a process of its own, whose lines are shown with the folder's name in front."""

    def __init__(self, words: list[str], folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder
        trusted = ["--trust"] if trust.consented() else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "longdream", "train", *words, "--json", *trusted],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )
        self.output: list[str] = []
        self.threads = [threading.Thread(target=reader, daemon=True) for reader in (self._show, self._keep)]
        for thread in self.threads:
            thread.start()

    def _show(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(f"[{self.folder.name}] {line.rstrip()}", file=sys.stderr, flush=True)

    def _keep(self) -> None:
        assert self.process.stdout is not None
        self.output += self.process.stdout

    def summary(self) -> dict[str, Any]:
        """The run's summary, or {"run", "error"}, once the process has ended."""
        code = self.process.wait()
        for thread in self.threads:
            thread.join()
        try:
            result = json.loads(self.output[-1])
        except (IndexError, ValueError):
            result = {"error": f"ended with code {code}"}
        return {"run": str(self.folder)} | result


def _together(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    from longdream.agent.evaluation.curves import summary_of
    from longdream.agent.evaluation.tables import number

    done = [summary for summary in summaries if "error" not in summary]
    result: dict[str, Any] = {"runs": summaries, "ok": len(done) == len(summaries)}
    returns = [summary["return_mean"] for summary in done if "return_mean" in summary]
    if returns:
        result["return"] = summary_of(returns)
    for summary in summaries:
        what = summary.get("error") or (number(summary["return_mean"]) if "return_mean" in summary else "done")
        print(f"  {summary['run']}  {what}")
    if returns:
        ends = result["return"]["ci95"]
        over = f"  95% interval {number(ends[0])} to {number(ends[1])}" if ends else ""
        print(f"  interquartile mean of {len(returns)}  {number(result['return']['iqm'])}{over}")
    return result
