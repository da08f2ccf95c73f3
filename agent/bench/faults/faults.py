"""`longdream bench faults`: what longdream survives, counted: situations, kills and inputs that were tampered with."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from longdream.envs.contract import UserError


def measure(
    kills: int = 100,
    inputs: int = 10_000,
    situations: str = "",
    workers: int | None = None,
    seed: int = 0,
    out: Path = Path("runs/faults"),
) -> dict[str, Any]:
    """Go through the faults of docs/faults.md, for real, and count what is survived and what is lost.

    Situations: every command is a process of its own with a bound of time; environments that fail, signals, damaged and
    hostile runs, mistakes. Kills: a small training is ended by SIGKILL at random moments and resumed until it is done;
    its metrics must be those of a training that was never killed. Inputs: configurations, flags, recordings, runs,
    checkpoints and the answers of remote environments are tampered with; each must be read or refused in one line, in
    time, with nothing unpickled, started or written outside of its folder.

    examples
      longdream bench faults
      longdream bench faults --kills 3 --inputs 200 --situations signal
      longdream bench faults --kills 0 --inputs 10000 --situations none --seed 1 --json

    Args:
        kills: moments at which a training is killed
        inputs: inputs that are tampered with; half of them and more are configurations, flags and recordings
        situations: only those whose name contains this (default: all; "none" for none)
        workers: processes side by side (default: one per processor)
        seed: random seed of moments and inputs
        out: folder in which it all happens; what an earlier bench left there is deleted

    Returns:
        tried, survived; lost: rows, runs, checkpoints; situations, kills, inputs: the counts of each; failures: what
        was not survived, in words; ok: nothing was lost and all was survived.
    """
    if min(kills, inputs) < 0 or (workers is not None and workers < 1):
        raise UserError(f"--kills {kills} --inputs {inputs} --workers {workers}: too small")
    from longdream.agent.bench.faults import inputs as tampered
    from longdream.agent.bench.faults import kills as killing
    from longdream.agent.bench.faults import situations as real

    count = workers or os.cpu_count() or 1
    out = out.absolute()
    mark = out / ".faults"
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise UserError(f"--out {out} holds something else, and what is there would be deleted: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    ended = {} if situations == "none" else real.survive(situations, count, out / "situations", say)
    if not ended and situations != "none":
        raise UserError(f"--situations {situations!r}: there is none of that name")
    failures = [f"{name}: {why}" for name, why in ended.items() if why]
    say(f"{len(ended)} situations, {len(failures)} not survived")
    killed: dict[str, int] = {"tried": 0, "survived": 0, "training": 0, "finished": 0}
    lost = killing.Lost()
    if kills:
        killed, lost = killing.kill_and_resume(kills, seed, count, out / "kills", say)
    failures += lost.why
    read: dict[str, Any] = {"tried": 0, "kinds": {}, "failures": []}
    if inputs:
        read = tampered.read(inputs, seed, count, out / "inputs", say)
    failures += [f"input {each['number']} ({each['kind']}): {each['why']}" for each in read["failures"]]
    good = read["tried"] - len(read["failures"])
    survived = sum(not why for why in ended.values()) + killed["survived"] + good
    tried = len(ended) + killed["tried"] + read["tried"]
    counts = {"rows": lost.rows, "runs": lost.runs, "checkpoints": lost.checkpoints}
    result = {
        "tried": tried,
        "survived": survived,
        "lost": counts,
        "situations": {"tried": len(ended), "survived": sum(not why for why in ended.values())},
        "kills": killed,
        "inputs": {"tried": read["tried"], "survived": good, "kinds": read["kinds"]},
        "failures": failures,
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        "ok": tried == survived and not any(counts.values()),
    }
    for name in ("situations", "kills", "inputs"):
        print(f"{name:12} tried {result[name]['tried']:6,}  survived {result[name]['survived']:6,}")
    if kills:
        print(f"  {killed['training']} kills came while it trained, {killed['finished']} runs were finished")
    for kind, each in read["kinds"].items():
        print(f"  {kind:10} " + "  ".join(f"{end} {number:5,}" for end, number in each.items()))
    print(f"{'tried':12} {tried:,}\n{'survived':12} {survived:,}")
    print(f"{'lost':12} " + ", ".join(f"{name} {number}" for name, number in counts.items()))
    for failure in failures[:20]:
        print(f"failed: {' '.join(failure.split())[:300]}")
    return result
