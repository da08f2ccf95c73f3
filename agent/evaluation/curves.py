"""Learning curves of groups of runs in one figure, and what groups of runs score at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from longdream.agent.evaluation.record import Curve, Record
from longdream.agent.evaluation.statistics import interquartile_mean, interval, probability_of_improvement

Axis = Literal["steps", "wall", "updates"]
LABELS = {"steps": "real steps", "wall": "wall-clock time (s)", "updates": "updates"}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
"""Colours that people with any colour vision tell apart (Okabe and Ito 2008)."""
DASHES = ("-", "--", "-.", ":")
"""And lines that print in grey."""
GRID = 200
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}


def scores(groups: dict[str, list[Record]], metric: str | None) -> dict[str, Any]:
    """What each run and group scores at equal cost, as JSON values.

    At equal steps: the last value at or before the step that every run has reached. At equal wall-clock time: the same
    for the seconds that every run took. last: each run's last value, whatever it cost.

    Raises:
        UserError: a run has no such metric.
    """
    curves = {name: [record.curve(metric) for record in records] for name, records in groups.items()}
    every = [curve for group in curves.values() for curve in group]
    limits = {axis: min(float(getattr(curve, axis)[-1]) for curve in every) for axis in ("steps", "wall")}
    result: dict[str, Any] = {"steps": limits["steps"], "wall_s": limits["wall"], "groups": {}, "improvement": []}
    values: dict[str, dict[str, np.ndarray]] = {}
    for name, group in curves.items():
        at = {f"at_{axis}": np.array([curve.at(axis, limit) for curve in group]) for axis, limit in limits.items()}
        values[name] = at | {"last": np.array([curve.value[-1] for curve in group])}
        runs = [
            {"run": str(record.folder), "seed": record.seed}
            | {key: float(column[i]) for key, column in values[name].items()}
            | {"steps": float(curve.steps[-1]), "wall_s": float(curve.wall[-1])}
            for i, (record, curve) in enumerate(zip(groups[name], group, strict=True))
        ]
        result["groups"][name] = {"runs": runs} | {key: summary_of(column) for key, column in values[name].items()}
    for one, other in permutations(values, 2):
        for key in ("at_steps", "at_wall"):
            pair = (values[one][key], values[other][key])
            chance = float(probability_of_improvement(*pair))
            ends = interval(probability_of_improvement, *pair) if min(map(len, pair)) > 1 else None
            result["improvement"].append(
                {"of": one, "over": other, "at": key, "probability": chance, "ci95": ends and list(ends)}
            )
    return result


def summary_of(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Interquartile mean with its interval, which one run does not have, and mean."""
    column = np.asarray(values, np.float64)
    ends = list(interval(interquartile_mean, column)) if len(column) > 1 else None
    return {"iqm": float(interquartile_mean(column)), "ci95": ends, "mean": float(column.mean())}


def draw(groups: dict[str, list[Record]], metric: str | None, axis: Axis, title: str, out: Path) -> None:
    """Draw a line per group, the interquartile mean of its runs, in a band from the lowest to the highest of them, as
    far as all runs of the group go.

    Raises:
        UserError: a run has no such metric.
    """
    curves = {name: [record.curve(metric) for record in records] for name, records in groups.items()}
    with rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for i, (name, group) in enumerate(curves.items()):
            x, lines = _on_a_grid(group, axis)
            colour = COLOURS[i % len(COLOURS)]
            seeds = f"{len(group)} seeds" if len(group) > 1 else "1 seed"
            dash = DASHES[(i // len(COLOURS) + i) % len(DASHES)]
            axes.plot(x, interquartile_mean(lines.T), dash, color=colour, label=f"{name} ({seeds})")
            if len(group) > 1:
                axes.fill_between(x, lines.min(0), lines.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel(LABELS[axis])
        axes.set_ylabel((metric or "return of evaluations").replace("_", " "))
        axes.set_title(title, fontsize=9, loc="left")
        axes.legend()
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=200)


def _on_a_grid(group: list[Curve], axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """x `(GRID,)`, from the first point that all curves have to the last, and their values there, `(n, GRID)`."""
    columns = [(getattr(curve, axis), curve.value) for curve in group]
    first = max(float(at[0]) for at, _ in columns)
    last = max(first, min(float(at[-1]) for at, _ in columns))
    x = np.linspace(first, last, GRID)
    return x, np.stack([np.interp(x, at, value) for at, value in columns])
