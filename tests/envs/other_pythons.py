"""The Python interpreters of this machine."""

import shutil
import subprocess
from pathlib import Path


def interpreters(version: str) -> list[str]:
    """Interpreters of this version with pip, on the path or installed by pyenv."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    code = "import pip, sys; print(*sys.version_info[:2], sep='.')"
    paths = []
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            paths.append(str(candidate))
    return paths
