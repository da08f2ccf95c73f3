"""Runs that a benchmark needs. Each is trained once and kept in a folder."""

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
    """The summary of the run `out`/runs/`name`, made by `longdream COMMAND --name NAME`, whose output goes to
    `out`/`name`.log.

    A finished run is not run again. An interrupted one is resumed, or started again if it cannot be resumed.

    Raises:
        UserError: the command failed; the message names the log file.
    """
    folder = out / "runs" / name
    log = out / f"{name}.log"
    if not (folder / "summary.json").exists():
        arguments = [*command, "--name", name]
        if (folder / "config.yaml").exists():
            arguments = ["train", "--resume", f"runs/{name}"]
        elif folder.exists():
            folder.rename(next(p for i in range(1, 1000) if not (p := folder.with_name(f"{name}.cut-{i}")).exists()))
        root = str(Path(longdream.__file__).resolve().parents[1])  # for the case that longdream is not installed
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        with open(log, "a") as file:
            line = [sys.executable, "-m", "longdream", *arguments]
            code = subprocess.run(line, cwd=out, env=environment, stdout=file, stderr=file).returncode
        if code != 0:
            last = log.read_text().strip().rpartition("\n")[2]
            raise UserError(f"training {name} ended with code {code} ({last}): see {log}, fix it and run this again")
    return json.loads((folder / "summary.json").read_text())


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings by name as arguments of a command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def table(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its header."""
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])
