"""A process that reads inputs that were tampered with: `python -m longdream.agent.bench.faults.worker ...`.

Each input is drawn from (seed, number) alone. On the standard output of old, a line says which input begins and one how
it ended, so that the process which started this one sees where it hangs or dies.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from longdream.agent.bench.faults import kinds
from longdream.agent.bench.faults.watch import Watch
from longdream.agent.cli import output
from longdream.agent.data.video.reader import Damaged

MEMORY = 12 << 30
"""Bytes of address space: a configuration may ask for more, which is to end in one line."""
PLACES = ("place", "outside", "config", "tmp")
"""Folders of a worker: where its inputs lie, what nothing may write to, and what trust and temporary files need."""


def main(base: Path, home: Path, seed: int, numbers: range) -> None:
    """Read the inputs of these numbers in `home`, made from what lies in `base`."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # matplotlib looks for fonts when it is first imported, unless it finds its list of them where the user has it
    for module in ("longdream.agent.train.trainer", "longdream.agent.evaluation.pictures"):
        importlib.import_module(module)
    for name in PLACES:
        (home / name).mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CONFIG_HOME"] = os.environ["MPLCONFIGDIR"] = str(home / "config")
    tempfile.tempdir = str(home / "tmp")
    (home / "outside" / "notes.txt").write_text("nothing of a run")
    os.chdir(home / "place")
    # a module that a configuration may name: it is not to be imported
    Path("evil.py").write_text(f"open({str(home / 'outside' / 'PWNED')!r}, 'w').write('evil')\n")
    box = kinds.Box(base)
    watch = Watch([home / "place", home / "config", home / "tmp"], str(home / "place" / "peer"))
    warnings.simplefilter("ignore")
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        kind = kinds.ORDER[number % len(kinds.ORDER)]
        print(json.dumps({"number": number, "kind": kind}), file=out)
        result = _read(box, kind, rng, watch, home)
        print(json.dumps({"number": number, "kind": kind, **result}), file=out)


def _read(box: kinds.Box, kind: str, rng: random.Random, watch: Watch, home: Path) -> dict[str, str]:
    """How an input ended: "accepted", "refused" or "failed", and why."""
    shutil.rmtree(kinds.FOLDER, ignore_errors=True)
    make, _ = kinds.KINDS[kind]
    use = make(box, rng)
    ended = "accepted"
    why = ""
    with watch.on() as seen:
        try:
            use()
        except (kinds.Refused, Damaged) as error:
            ended, why = "refused", str(error)
        except kinds.Failure as error:
            ended, why = "failed", str(error)
        except Exception as error:
            explained = output.explain(error)
            ended = "refused" if explained is not None else "failed"
            why = explained[1] if explained is not None else traceback.format_exc()[-1500:]
    outside = sorted(path.name for path in (home / "outside").iterdir())
    if outside != ["notes.txt"] or (home / "outside" / "notes.txt").read_text() != "nothing of a run":
        seen.append(f"changed what lies outside: {outside}")
    if seen:
        return {"ended": "failed", "why": "; ".join(sorted(set(seen)))[:1500]}
    return {"ended": ended, "why": why}


if __name__ == "__main__":
    faulthandler.enable()
    first, last, step = map(int, sys.argv[4:7])
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), range(first, last, step))
