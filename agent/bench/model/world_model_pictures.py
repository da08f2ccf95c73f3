"""Pictures of `longdream bench world-model`: PSNR and SSIM over time, and strips of generated frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLUMNS = 12
"""Frames of a strip, evenly spaced over the generated ones."""


def draw_curves(rows: list[dict[str, Any]], task: str, context: int, path: Path) -> Path:
    """Plot PSNR and SSIM over the frames after the context, one line per mixer: the mean over seeds and the range."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, unit in zip(axes, ("psnr", "ssim"), ("PSNR in dB", "SSIM"), strict=True):
        for mixer in dict.fromkeys(row["mixer"] for row in rows):
            curves = np.array([row[f"{name}_curve"] for row in rows if row["mixer"] == mixer and row["task"] == task])
            frames = np.arange(1, curves.shape[1] + 1)
            (line,) = axis.plot(frames, curves.mean(0), label=mixer, linewidth=1.5)
            axis.fill_between(frames, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="frames after the context", ylabel=unit)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))  # beside the curves, not on them
    figure.suptitle(f"{task}, after {context} frames")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def draw_strip(frames: dict[str, np.ndarray], title: str, path: Path) -> Path:
    """Draw true frames, and below them those that each mixer generated.

    Args:
        frames: by mixer `(2, n, H, W, 3)`, true and generated frames.
    """
    names = ["truth", *frames]
    shown = [next(iter(frames.values()))[0], *(made for _, made in frames.values())]
    columns = np.linspace(0, len(shown[0]) - 1, min(COLUMNS, len(shown[0]))).round().astype(int)
    figure = Figure(figsize=(len(columns), 1.05 * len(names) + 0.4), layout="constrained")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for name, images, line in zip(names, shown, axes, strict=True):
        for column, axis in zip(columns, line, strict=True):
            axis.imshow(images[column], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if name == "truth":
                axis.set_title(f"+{column + 1}", fontsize=8)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return path
