"""`longdream export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from longdream.envs.contract import UserError


def export(
    run_folder: Path, out: Path | None = None, precision: Literal["float32", "bfloat16", "int8"] = "bfloat16"
) -> dict[str, Any]:
    """Write an agent to hand on into a folder: its settings, a card, and its weights in one file.

    The folder opens as a run does: evaluate, dream and train --init take it. Optimizers and replay stay behind, so it
    cannot be resumed.

    examples
      longdream export runs/quickstart-s0-1
      longdream export runs/memory-maze-9x9-s0-1 --out agents/maze --precision int8
      longdream evaluate agents/maze --episodes 100

    Args:
        run_folder: of the run.
        out: a new folder (default: exports/NAME).
        precision: of the weights. int8 takes six bits each and rounds them to 2% of their row's size; evaluate what
            comes of it.

    Raises:
        UserError: no run, or the folder exists already.
    """
    # imported here, so that --help is quick
    from longdream.agent.run import export as exported
    from longdream.agent.run.folder import load_agent, summary, write_config

    agent, run = load_agent(run_folder, "cpu")
    config = run.config
    out = out or Path("exports", run.folder.resolve().name)
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{out} exists already: name a new folder with --out") from None
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror})") from None
    _, step = run.saved
    origin = _origin(run.folder / "environment.txt")
    size = exported.save(out / exported.WEIGHTS, agent.modules(), run.spec, step, precision, origin)
    write_config(out, dataclasses.replace(config, device="auto"))
    results = summary(run.folder) or {}
    (out / "README.md").write_text(_card(config, step, precision, size, origin, results))
    print(f"{out}: {size:,} bytes of weights in {precision}\nnext: longdream evaluate {out}")
    return {"folder": str(out), "bytes": size, "precision": precision, "step": step}


def _origin(path: Path) -> dict[str, str]:
    """What a run's environment.txt says of the program and the machine."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(": ") for line in lines)
    return {key: value for key, _, value in pairs if key in ("commit", "torch", "cuda", "longdream")}


def _card(config: Any, step: int, precision: str, size: int, origin: dict[str, str], results: dict[str, Any]) -> str:
    """The card of an agent, in Markdown."""
    returned = "not evaluated when it was exported"
    if "return_mean" in results:
        low, high = results["return_ci95"]
        returned = (
            f"{results['return_mean']:.2f} (95% interval {low:.2f} to {high:.2f}) over {results['episodes']} episodes "
            f"of {results['env']}, actions {results.get('policy', 'greedy')}, in the precision of training"
        )
    lines = {
        "environment": f"`{config.env.id}`, {step:,} real steps",
        "return": returned,
        "objective, mixer": f"{config.forcing.objective}, {config.worldmodel.mixer}",
        "weights": f"{precision}, {size:,} bytes",
        **{key: f"`{value}`" for key, value in origin.items()},
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in lines.items())
    return (
        f"# An agent for {config.env.id}\n\n| | |\n|---|---|\n{rows}\n\n"
        f"The data are the agent's own steps in that environment, begun from nothing. "
        f"`longdream evaluate FOLDER` plays it, `longdream train --init FOLDER` trains it further.\n"
    )
