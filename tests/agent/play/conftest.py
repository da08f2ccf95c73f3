"""Sources of play: small runs and environments; a server that runs as the command does."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longdream.agent.cli.play import find_run
from longdream.agent.play.source import Source, open_source


@pytest.fixture(scope="session")
def source_of(dream_runs: Callable[[str], Path]) -> Callable[[str], Source]:
    """The source of a run of `dream_runs`, or of an environment."""

    def make(name: str) -> Source:
        what = str(dream_runs(name)) if name in ("images", "vectors", "box", "mixed") else name
        return open_source(what, find_run(what), {}, "cpu")

    return make


class Served:
    """`longdream play` or `watch` in a process of its own. address: of its page. said: its lines on stderr so far."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.said: list[str] = []
        self.address = ""
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append(line.strip())
            if line.startswith("open http"):
                self.address = line.split()[1]
                break
        threading.Thread(target=lambda: self.said.extend(process.stderr or ()), daemon=True).start()


@pytest.fixture(scope="session")
def served() -> Callable:
    """Serve as a context: `with served("play", run, "--port", "0") as server`."""

    @contextmanager
    def serve(*arguments: str, cwd: Path | None = None) -> Iterator[Served]:
        command = [sys.executable, "-m", "longdream", *map(str, arguments), "--no-open"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=cwd, env=os.environ)
        try:
            yield Served(process)
        finally:
            process.terminate()
            process.wait(20)

    return serve
