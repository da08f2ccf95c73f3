"""Disks that run full, for real."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Cramped:
    """A folder in which, inside `with cramped.room(bytes)`, a file larger than that cannot be written."""

    def __init__(self, folder: Path, full: bool):
        self.folder, self.full = folder, full

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        if self.full:
            disk = os.statvfs(self.folder)
            filler = self.folder / "filler"
            filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - size)))
            try:
                yield
            finally:
                filler.unlink()
        else:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["full disk", "file size limit"])
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cramped]:
    folder = tmp_path / "cramped"
    folder.mkdir()
    if request.param == "file size limit":
        yield Cramped(folder, full=False)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield Cramped(folder, full=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
