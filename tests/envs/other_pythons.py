"""Which Pythons this machine has."""

import shutil
import subprocess
from pathlib import Path


def interpreters(version: str) -> list[str]:
    """Those of this version, with pip: on the path, or where pyenv keeps them."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    code = "import pip, sys; print(*sys.version_info[:2], sep='.')"
    found = []
    for candidate in filter(None, candidates):
        told = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if told.stdout.strip() == version:
            found.append(str(candidate))
    return found
