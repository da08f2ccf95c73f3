"""Runs that a measurement needs, each trained once, in a folder that keeps them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import longdream
from longdream.envs.contract import UserError


def finished(out: Path, name: str, command: Sequence[str]) -> dict[str, Any]:
    """The summary of the run `out`/runs/`name`, after `longdream COMMAND --name NAME`, printing to `out`/`name`.log.

    One that has finished is not run again, and one that was cut short goes on, or begins anew if it cannot.

    Raises:
        UserError: the command failed; the message says where to find what it printed.
    """
    folder, log = out / "runs" / name, out / f"{name}.log"
    if not (folder / "summary.json").exists():
        what = [*command, "--name", name]
        if (folder / "config.yaml").exists():
            what = ["train", "--resume", f"runs/{name}"]
        elif folder.exists():
            folder.rename(next(p for i in range(1, 1000) if not (p := folder.with_name(f"{name}.cut-{i}")).exists()))
        root = str(Path(longdream.__file__).resolve().parents[1])  # where it is not installed
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        with open(log, "a") as file:
            line = [sys.executable, "-m", "longdream", *what]
            code = subprocess.run(line, cwd=out, env=environment, stdout=file, stderr=file).returncode
        if code != 0:
            last = log.read_text().strip().rpartition("\n")[2]
            raise UserError(f"training {name} ended with code {code} ({last}): see {log}, mend it and run this again")
    return json.loads((folder / "summary.json").read_text())


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings by name as words of a command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def table(cells: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first line is its head."""
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])
