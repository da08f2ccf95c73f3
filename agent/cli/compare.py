"""`longdream compare`, `longdream plot` and `longdream list`: what runs have recorded. Nothing of a run is executed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from longdream.envs.contract import UserError

# what brings torch and matplotlib is imported in the functions, so that --help is quick

FORMATS = (".pdf", ".png", ".svg")


def compare(runs: tuple[str, ...], metric: str | None = None) -> dict[str, Any]:
    """Compare groups of runs at equal steps and at equal wall-clock time.

    Folders whose names differ only in their seeds (NAME-s1, NAME-s2-1, NAME3) are a group; so are all that match one
    quoted pattern. For each group: the interquartile mean over its runs and its 95% interval (stratified bootstrap,
    10,000 resamples), and how probable it is that a run of it beats a run of another group (arXiv 2108.13264). A run
    may still be training.

    examples
      longdream compare runs/hybrid-s* runs/window-s*
      longdream compare 'runs/a*' 'runs/b*' --json
      longdream compare runs/hybrid-s* runs/ppo-s* --metric train/return

    Args:
        runs: folders of runs or baselines, or quoted patterns
        metric: a key of metrics.jsonl (default: the mean return of evaluations, the last one included)

    Raises:
        UserError: no such run, one of another version, different environments, or no such metric.
    """
    from longdream.agent.evaluation.curves import scores
    from longdream.agent.evaluation.record import groups

    if not runs:
        raise UserError("compare what? Give folders of runs: longdream compare runs/a* runs/b*")
    by_name = groups(runs)
    env = next(iter(by_name.values()))[0].env
    result = {"env": env, "metric": metric or "evaluate/return_mean", **scores(by_name, metric)}
    _print(result)
    return result


def plot(
    runs: tuple[str, ...],
    x: Literal["steps", "wall", "updates"] = "steps",
    metric: str | None = None,
    out: Path = Path("curves.pdf"),
) -> dict[str, Any]:
    """Plot learning curves: a line per group of runs, the interquartile mean of its seeds, in a band from the lowest to
    the highest of them. Groups are those of longdream compare.

    examples
      longdream plot runs/hybrid-s* runs/window-s* --out fig.pdf
      longdream plot runs/hybrid-s1 --metric model/total --x updates --out model.png

    Args:
        runs: folders of runs or baselines, or quoted patterns
        x: real steps, seconds of wall-clock time, or updates
        metric: a key of metrics.jsonl (default: the mean return of evaluations, the last one included)
        out: the figure, .pdf, .png or .svg

    Raises:
        UserError: no such run, one of another version, different environments, or no such metric.
    """
    if not runs:
        raise UserError("plot what? Give folders of runs: longdream plot runs/a* runs/b*")
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: figures are written as {', '.join(FORMATS)}")
    from longdream.agent.evaluation.curves import draw
    from longdream.agent.evaluation.record import groups

    by_name = groups(runs)
    env = next(iter(by_name.values()))[0].env
    draw(by_name, metric, x, env, out)
    print(f"figure  {out}")
    return {"figure": str(out), "env": env, "groups": {name: len(records) for name, records in by_name.items()}}


def list_runs(folders: tuple[Path, ...]) -> dict[str, Any]:
    """List the runs in folders (default: runs/): status, steps, last return, size, and time since the last change.

    examples
      longdream list
      longdream list runs/ /data/runs --json

    Args:
        folders: that contain runs

    Raises:
        UserError: there is no such folder.
    """
    from longdream.agent.evaluation.record import state

    rows = []
    for root in folders or (Path("runs"),):
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder")
        rows += [state(path) for path in sorted(root.iterdir()) if _is_run(path)]
    columns = ("run", "status", "steps", "return", "size", "changed", "")
    cells = [[_cell(row, column) for column in columns] for row in rows]
    _columns([list(columns), *cells] if rows else [["no runs here"]])
    return {"runs": rows}


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("config.yaml", "baseline.json"))


def _cell(row: dict[str, Any], column: str) -> str:
    from longdream.agent.evaluation.tables import number

    if column == "":
        return row.get("problem", row.get("env", ""))
    if column == "size":
        return f"{row['size'] / 1e6:,.1f} MB"
    if column == "changed":
        return f"{_duration(time.time() - row['written'])} ago"
    value = row.get(column)
    if value is None:
        return "–"
    return f"{value:,}" if column == "steps" else number(value) if column == "return" else str(value)


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _print(result: dict[str, Any]) -> None:
    from longdream.agent.evaluation.tables import number as of_return

    def number(value: float) -> str:
        return of_return(value) if "return" in result["metric"] else f"{value:.4g}"

    def interval(ends: list[float] | None) -> str:
        return f"[{number(ends[0])}, {number(ends[1])}]" if ends else "(one run: no interval)"

    when = {"at_steps": f"at {result['steps']:,.0f} steps", "at_wall": f"after {result['wall_s']:,.0f} s"}
    when["last"] = "at its end"
    print(f"{result['env']}   {result['metric']}, interquartile mean [95%]\n")
    rows = [["", *when.values(), "runs"]]
    for name, group in result["groups"].items():
        shown = [f"{number(group[key]['iqm'])} {interval(group[key]['ci95'])}" for key in when]
        rows.append([name, *shown, str(len(group["runs"]))])
    _columns(rows)
    if result["improvement"]:
        print("\nprobability that a run of the first beats one of the second\n")
        rows = [["", "", when["at_steps"], when["at_wall"]]]
        pairs: dict[tuple[str, str], list[str]] = {}
        for entry in result["improvement"]:
            shown = f"{entry['probability']:.2f} {interval(entry['ci95'])}"
            pairs.setdefault((entry["of"], entry["over"]), []).append(shown)
        _columns([*rows, *([*pair, *shown] for pair, shown in pairs.items())])
    print("\nper seed\n")
    rows = [["run", "seed", *when.values(), "steps", "seconds"]]
    for group in result["groups"].values():
        for run in group["runs"]:
            cost = [f"{run['steps']:,.0f}", f"{run['wall_s']:,.0f}"]
            rows.append([run["run"], str(run["seed"]), *(number(run[key]) for key in when), *cost])
    _columns(rows)


def _columns(rows: list[list[str]]) -> None:
    """Print a table of texts, left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
