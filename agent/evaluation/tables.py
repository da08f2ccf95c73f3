"""Tables of results, printed at the end of a command."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longdream.agent.evaluation.diagnosis import Finding

Rows = list[tuple[str, str, str]]
"""Label, value and remark of each line of a table."""

COLOURS = {"green": "green", "yellow": "yellow", "red": "bold red", "unknown": "bright_black"}
REFERENCES = {
    "random": ("known: random", "uniform random actions, docs/memory-maze.md"),
    "human": ("known: human", "people, by Pasukonis et al. 2022"),
    "oracle": ("known: oracle", "the most that can be had, by Pasukonis et al. 2022"),
}
"""Label and remark of each known mean return of an environment."""


def summary_table(summary: dict[str, Any]) -> None:
    """Print the content of a summary.json: a table if stdout is a terminal, otherwise plain lines.

    Missing keys are left out. The keys chance, optimum, and the paths run, video and picture may be added.
    """
    if "recordings" in summary:
        show_table(f"{summary['data']} ({summary['layout']})", _video_rows(summary))
    else:
        show_table(summary["env"], _agent_rows(summary))


def show_table(title: str, rows: Rows) -> None:
    """Print (label, value, remark) line by line; on a terminal the first line is highlighted."""
    console = Console(highlight=False)
    if not console.is_terminal or os.environ.get("TERM") == "dumb":
        print(title)
        first = max(len(row[0]) for row in rows)
        second = max(len(row[1]) for row in rows if "/" not in row[1])
        for label, value, remark in rows:
            print(f"  {label:{first}}  {value:{second}}  {remark}".rstrip())
        return
    table = Table(title=f"[bold]{title}[/]", title_justify="left", show_header=False, border_style="bright_black")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", style="bold")
    table.add_column(style="bright_black")
    for i, (label, value, remark) in enumerate(rows):
        table.add_row(label, f"[green]{value}[/]" if i == 0 else value, remark)
    console.print(table)


def _agent_rows(summary: dict[str, Any]) -> Rows:
    low, high = map(number, summary["return_ci95"])
    over = f"95% interval {low} to {high}, {summary['episodes']} real episodes, {summary.get('policy', 'greedy')}"
    rows = [("return", number(summary["return_mean"]), over)]
    for key, label, remark in (
        ("optimum", "  optimum", "the most that can be had"),
        ("chance", "  chance", "the most that can be had without memory"),
        ("random_mean", "  random actions", ""),
        ("without_memory_mean", "  without long memory", "the same agent, M's scan states erased at every step"),
    ):
        if summary.get(key) is not None:
            rows.append((label, number(summary[key]), remark))
    for steps, erased in summary.get("erased", {}).items():
        low, high = map(number, erased["return_ci95"])
        label = f"  memory erased every {steps}"
        rows.append((label, number(erased["return_mean"]), f"95% interval {low} to {high}, M's scan states alone"))
    for key, value in summary.get("references", {}).items():
        rows.append((f"  {REFERENCES[key][0]}", number(value), REFERENCES[key][1]))
    rows.append(("real steps", f"{summary['env_steps']:,}", ""))
    if summary.get("dream_steps"):
        rows.append(("dreamt steps", f"{summary['dream_steps']:,}", "C learned from these"))
    if "wall_s" in summary:
        minutes, seconds = divmod(round(summary["wall_s"]), 60)
        duration = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
        rows.append(("time", duration, f"{summary['updates']:,} updates" if "updates" in summary else ""))
    for key, label, remark in (
        ("run", "run", "metrics.jsonl, summary.json, checkpoints/, tensorboard/"),
        ("video", "video", "dream beside reality"),
        ("picture", "picture", "the same at one glance"),
    ):
        if summary.get(key):
            rows.append((label, str(summary[key]), remark))
    return rows


def _video_rows(summary: dict[str, Any]) -> Rows:
    rows: Rows = []
    for way, label, remark in (
        ("open_loop", "open loop", "PSNR in dB of held-out frames after the context: M on its own"),
        ("one_step", "one step", "M, shown all true frames before"),
        ("still", "still", "the last frame of the context, to compare with"),
        ("reconstruction", "reconstruction", "V alone, there and back"),
    ):
        if f"psnr_{way}" in summary:
            rows.append((label, f"{summary[f'psnr_{way}']:.2f}", remark))
    rows.append(("frames", f"{summary['frames']:,}", f"{summary['updates']:,} updates, {summary['wall_s']:,.0f} s"))
    rows.append(("recordings", str(summary["recordings"]), f"and {summary['held_out']} held out"))
    if summary["damaged"]:
        rows.append(("damaged", str(summary["damaged"]), "files left out"))
    for key in ("run", "video", "picture"):
        if summary.get(key):
            rows.append((key, summary[key], ""))
    return rows


def findings_table(title: str, findings: dict[str, Finding]) -> None:
    """Print findings, each with its light and, unless that is green, what to try."""
    console = Console(highlight=False)
    plain = not console.is_terminal or os.environ.get("TERM") == "dumb"
    console.print(title, markup=False)
    for name, finding in findings.items():
        light = finding.light if plain else f"[{COLOURS[finding.light]}]{finding.light}[/]"
        gap = " " * (8 - len(finding.light))
        console.print(f"  {name:9}{light}{gap}{escape(finding.says)}", soft_wrap=True)
        if finding.advice:
            console.print(f"{'':19}try: {escape(finding.advice)}", soft_wrap=True)


def number(value: float) -> str:
    """A return, with two decimals; without decimals from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{round(float(value), 2) + 0.0:.2f}"  # + 0.0: no -0.00
