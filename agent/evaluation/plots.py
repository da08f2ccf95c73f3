"""Plots of dream and reality: frames side by side, as a video and as one picture, and line plots of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from longdream.agent.evaluation.comparison import Comparison
from longdream.envs.contract import UserError
from longdream.envs.images import rgb

Picture = np.ndarray
"""`(height, width, 3)` uint8."""
Colour = tuple[int, int, int]

BACKGROUND = (13, 17, 23)
PANEL = (48, 54, 61)
MUTED = (139, 148, 158)
TEXT = (230, 237, 243)
CONTEXT = (56, 139, 253)
"""Colour of frames that M received."""
IMAGINED = (240, 136, 62)
"""Colour of frames that M dreamt."""
MARGIN = 16
BORDER = 4
ENTRIES = 12
"""Maximum number of vector entries that are plotted."""
PALETTE_FRAMES = 16
"""Maximum number of a film's frames from which the palette of its GIF is found."""


def film(comparison: Comparison, title: str) -> Iterator[Picture]:
    """The comparison as frames of a video, one per row: panels side by side for images, otherwise growing plots."""
    if comparison.keys(image=True):
        yield from _panels(comparison, title)
    else:
        yield from _unfolding(comparison, title)


def sheet(comparison: Comparison, title: str, columns: int = 16) -> Picture:
    """The comparison as one picture: images in rows of up to `columns` frames, above plots of everything else."""
    blocks = [_contact(comparison, title, key, columns) for key in comparison.keys(image=True)]
    if comparison.keys(image=False):
        blocks.append(_plots(comparison, title)[0])
    return stack(blocks)


def stack(blocks: list[Picture]) -> Picture:
    """Pictures stacked vertically, padded on the right with the background colour."""
    width = max(block.shape[1] for block in blocks)
    padded = [_blank(len(block), width) for block in blocks]
    for canvas, block in zip(padded, blocks, strict=True):
        canvas[:, : block.shape[1]] = block
    return np.concatenate(padded)


def beside(pictures: Sequence[Picture], captions: Sequence[str], colours: Sequence[Colour], side: int = 192) -> Picture:
    """Pictures `(H, W, 3)` in one row, each in a frame of its colour above its caption; width and height are even.

    side: the pictures are enlarged by a whole factor, or subsampled, to about this many pixels."""
    sized = [_sized(picture, side) for picture in pictures]
    tall = max(len(picture) for picture in sized)
    width = MARGIN + sum(picture.shape[1] + 2 * BORDER + MARGIN for picture in sized)
    height = MARGIN + tall + 2 * BORDER + 34
    canvas = _blank(height + height % 2, width + width % 2)  # yuv420p halves the colour planes
    x = MARGIN
    for picture, caption, colour in zip(sized, captions, colours, strict=True):
        h, w = picture.shape[:2]
        canvas[MARGIN : MARGIN + h + 2 * BORDER, x : x + w + 2 * BORDER] = colour
        canvas[MARGIN + BORDER : MARGIN + BORDER + h, x + BORDER : x + BORDER + w] = picture
        _write(canvas, caption, x, MARGIN + tall + 2 * BORDER + 6, 12, colour if colour != PANEL else MUTED)
        x += w + 2 * BORDER + MARGIN
    return canvas


def bars(lines: list[tuple[str, np.ndarray, Colour]], width: int = 640, height: int = 80) -> Picture:
    """Numbers `(T,)` that are not negative as bars over time, one row for each with its name and its largest value."""
    canvas = _blank(len(lines) * (height + 30) + 10, width)
    for i, (name, values, colour) in enumerate(lines):
        top = 10 + i * (height + 30)
        largest = float(values.max(initial=0))
        _write(canvas, name, MARGIN, top, 12, MUTED)
        _write(canvas, _two(largest), width - MARGIN, top, 12, MUTED, right=True)
        edges = np.linspace(MARGIN, width - MARGIN, len(values) + 1).round().astype(int)
        tall = (height * values / (largest or 1.0)).round().astype(int)
        canvas[top + 22 + height : top + 23 + height, MARGIN : width - MARGIN] = PANEL
        for left, right, bar in zip(edges, edges[1:], tall, strict=False):
            gap = int(right - left > 3)
            canvas[top + 22 + height - bar : top + 22 + height, left : right - gap] = colour
    return canvas


def _panels(comparison: Comparison, title: str) -> Iterator[Picture]:
    keys = comparison.keys(image=True)
    names = ("reality", "reality through V", "dream", "difference")
    rows = [[[_sized(v, 192) for v in views] for views in _views(comparison, key)] for key in keys]
    sizes = [row[0][0].shape[:2] for row in rows]
    cell = max(width for _, width in sizes) + 2 * BORDER + MARGIN
    width = MARGIN + 4 * cell
    height = 44 + sum(tall + 2 * BORDER + 34 for tall, _ in sizes) + 50
    psnr = comparison.error(keys[0])
    for t in range(len(comparison)):
        canvas = _blank(height + height % 2, width + width % 2)  # yuv420p halves the colour planes
        imagined = t >= comparison.context
        colour = IMAGINED if imagined else CONTEXT
        _write(canvas, title, MARGIN, 10, 13, TEXT)
        _write(canvas, f"step {t}", width - MARGIN, 10, 13, TEXT, right=True)
        top = 44
        for key, row, (tall, wide) in zip(keys, rows, sizes, strict=True):
            for i, (name, views) in enumerate(zip(names, row, strict=True)):
                x = MARGIN + i * cell
                frame = colour if name == "dream" else PANEL
                canvas[top : top + tall + 2 * BORDER, x : x + wide + 2 * BORDER] = frame
                canvas[top + BORDER : top + BORDER + tall, x + BORDER : x + BORDER + wide] = views[t]
                caption = name if len(keys) == 1 else f"{name} ({key})"
                _write(canvas, caption, x, top + tall + 2 * BORDER + 5, 12, colour if name == "dream" else MUTED)
            top += tall + 2 * BORDER + 34
        _timeline(canvas, comparison, t, top)
        phase = "dreaming under the same actions" if imagined else "context: M is shown real frames"
        _write(canvas, phase, MARGIN, top + 18, 12, colour)
        text = f"PSNR {psnr[t]:.0f} dB"
        if comparison.rewarded:
            text = f"reward expected {_two(comparison.expected[t])}, real {_two(comparison.reward[t])}     {text}"
        _write(canvas, text, width - MARGIN, top + 18, 12, MUTED, right=True)
        yield canvas


def _views(comparison: Comparison, key: str) -> tuple[Picture, ...]:
    """Frames of one image key, each `(T, H, W, 3)`: reality, V's reconstruction, dream, and |dream - reality|."""
    real = rgb(comparison.real[key])
    kept = rgb(comparison.kept[key])
    dreamt = rgb(comparison.dreamt[key])
    gap = np.abs(real.astype(np.int16) - dreamt).mean(-1) / 255
    heat = (colormaps["inferno"](np.sqrt(gap))[..., :3] * 255).astype(np.uint8)  # the root makes small ones visible
    return real, kept, dreamt, heat


def _contact(comparison: Comparison, title: str, key: str, columns: int) -> Picture:
    names = ("reality", "through V", "dream", "difference")
    chosen = _chosen(len(comparison), comparison.context, columns)
    views = [_sized(view[chosen], 96) for view in _views(comparison, key)]
    tall, wide = views[0].shape[1:3]
    left = MARGIN + 124
    top = 76
    edge = 3
    cell_x = wide + 10
    cell_y = tall + 10
    rewards = [("expected reward", comparison.expected, 2), ("real reward", comparison.reward, 24)]
    rewards = rewards if comparison.rewarded else []
    canvas = _blank(top + 4 * cell_y + (54 if rewards else 10), left + len(chosen) * cell_x - 10 + MARGIN)
    _write(canvas, title if len(comparison.keys(image=True)) == 1 else f"{title} ({key})", MARGIN, 12, 14, TEXT)
    for i, name in enumerate(names):
        _write(canvas, name, MARGIN, top + i * cell_y + tall // 2 - 10, 12, IMAGINED if name == "dream" else MUTED)
    below = top + 4 * cell_y
    for name, _, y in rewards:
        _write(canvas, name, MARGIN, below + y, 12, IMAGINED if y == 2 else MUTED)
    for j, t in enumerate(chosen):
        x = left + j * cell_x
        colour = IMAGINED if t >= comparison.context else CONTEXT
        _write(canvas, str(t), x, top - 26, 12, colour)
        for i, view in enumerate(views):
            y = top + i * cell_y
            if names[i] == "dream":
                canvas[y - edge : y + tall + edge, x - edge : x + wide + edge] = colour
            canvas[y : y + tall, x : x + wide] = view[j]
        for _, values, y in rewards:
            _write(canvas, _two(values[t]), x, below + y, 12, TEXT)
    x = canvas.shape[1] - MARGIN
    for text, colour in (("dreamt by M alone", IMAGINED), ("shown to M", CONTEXT)):
        x -= _write(canvas, text, x, 12, 12, MUTED, right=True) + 8
        canvas[16:26, x - 10 : x] = colour
        x -= 28
    return canvas


def _chosen(total: int, context: int, columns: int) -> np.ndarray:
    """Up to `columns` of `total` rows: all of them, or the context's first and last and evenly spaced dreamt ones."""
    if total <= columns:
        return np.arange(total)
    dreamt = np.linspace(context, total - 1, columns - 2).round().astype(int)
    return np.unique([0, context - 1, *dreamt])


def _two(value: Any) -> str:
    return f"{round(float(value), 2) + 0.0:.2f}"  # + 0.0: no -0.00


def _timeline(canvas: Picture, comparison: Comparison, t: int, y: int) -> None:
    width = canvas.shape[1] - 2 * MARGIN
    total = len(comparison)

    def column(row: int) -> int:
        return MARGIN + round(width * row / total)

    for first, last, colour in ((0, comparison.context, CONTEXT), (comparison.context, total, IMAGINED)):
        now = min(max(t + 1, first), last)
        canvas[y : y + 6, column(first) : column(last)] = (np.array(colour) * 0.3).astype(np.uint8)
        canvas[y : y + 6, column(first) : column(now)] = colour


def _plots(comparison: Comparison, title: str) -> tuple[Picture, list[tuple[slice, slice, np.ndarray]]]:
    """Plots of all numbers, errors, rewards and ends over time. For each plot also the pixels that it covers (rows,
    columns), and the pixel column of each time step."""
    lines = []
    for key in comparison.keys(image=False):
        real = comparison.real[key].reshape(len(comparison), -1).T
        dreamt = comparison.dreamt[key].reshape(len(comparison), -1).T
        names = [key] if len(real) == 1 else [f"{key}[{i}]" for i in range(len(real))]
        lines += zip(names, real, dreamt, strict=True)
    left_out = len(lines) - ENTRIES
    apart = []
    for key in comparison.keys(image=False):
        unit = {"discrete": "1 where wrong", "categories": "share wrong"}.get(comparison.spec.obs[key].kind, "rms")
        apart.append(
            (f"{key}: difference, {unit} (white: V alone)", comparison.error(key, "kept"), comparison.error(key))
        )
    lines = [
        *lines[:ENTRIES],
        *apart,
        ("reward (dream: expected)", comparison.reward, comparison.expected),
        ("goes on (dream: probability)", comparison.alive, comparison.going_on),
    ]
    rows = ceil(len(lines) / 2)
    time = np.arange(len(comparison))
    context = comparison.context
    background = hex_of(BACKGROUND)
    muted = hex_of(MUTED)
    text = hex_of(TEXT)
    figure = Figure(figsize=(9.6, 0.6 + 1.7 * rows), dpi=100, facecolor=background)
    canvas = FigureCanvasAgg(figure)
    if left_out > 0:
        title += f"  (the first {ENTRIES} of {ENTRIES + left_out} entries)"
    figure.text(0.02, 1 - 0.3 / figure.get_figheight(), title, color=text, fontsize=11, va="center")
    grid = figure.subplots(rows, 2, squeeze=False, sharex=True).ravel()
    figure.subplots_adjust(0.07, 0.42 / figure.get_figheight(), 0.98, 1 - 0.8 / figure.get_figheight(), 0.15, 0.5)
    for axes in grid[len(lines) :]:
        axes.remove()
    for axes, (name, real, dreamt) in zip(grid, lines, strict=False):
        axes.set_facecolor(background)
        axes.set_title(name, color=muted, fontsize=9, loc="left", pad=3)
        axes.tick_params(colors=muted, labelsize=8, labelbottom=True)
        axes.spines[:].set_color(hex_of(PANEL))
        axes.axvspan(0, context - 1, color=hex_of(CONTEXT), alpha=0.35, lw=0, label="shown to M")
        axes.plot(time, real, color=text, lw=1.2, label="reality")
        axes.plot(time[context - 1 :], dreamt[context - 1 :], color=hex_of(IMAGINED), lw=1.4, label="dream")
        axes.margins(x=0)
    legend = grid[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8, borderpad=0)
    for label in legend.get_texts():
        label.set_color(muted)
    canvas.draw()
    picture = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    places = []
    for axes in grid[: len(lines)]:
        box = axes.bbox
        steps = axes.transData.transform(np.stack([time, time], 1))[:, 0].round().astype(int)
        y = slice(len(picture) - int(box.y1), len(picture) - int(box.y0))
        places.append((y, slice(int(box.x0), int(box.x1) + 1), steps))
    return picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2], places


def _unfolding(comparison: Comparison, title: str) -> Iterator[Picture]:
    picture, places = _plots(comparison, title)
    for t in range(len(comparison)):
        canvas = picture.copy()
        for rows, columns, steps in places:
            ahead = canvas[rows, steps[t] + 1 : columns.stop]
            ahead[:] = (ahead * 0.25 + np.array(BACKGROUND) * 0.75).astype(np.uint8)
            colour = IMAGINED if t >= comparison.context else CONTEXT
            canvas[rows, max(steps[t] - 1, columns.start) : steps[t] + 1] = colour
        yield canvas


def hex_of(colour: Colour) -> str:
    """The colour as matplotlib and the web write it."""
    return f"#{bytes(colour).hex()}"


def _blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def _sized(images: np.ndarray, side: int) -> np.ndarray:
    """Images `(..., H, W, 3)` enlarged or subsampled by an integer factor, so that the longer side is near `side`."""
    longer_side = max(images.shape[-3:-1])
    if longer_side > side:
        stride = ceil(longer_side / side)
        return images[..., ::stride, ::stride, :]
    return images.repeat(side // longer_side, -3).repeat(side // longer_side, -2)


def _write(canvas: Picture, text: str, x: int, y: int, size: int, colour: Colour, right: bool = False) -> int:
    """Draw text with its top left (or right) corner at x, y, cut off at the border. Returns its width in pixels."""
    ink = _ink(text, size)
    x -= ink.shape[1] if right else 0
    place = canvas[y : y + len(ink), max(x, 0) : x + ink.shape[1]]
    ink = ink[: place.shape[0], : place.shape[1], None]
    place[:] = (place * (1 - ink) + np.array(colour) * ink).astype(np.uint8)
    return ink.shape[1]


@lru_cache(maxsize=4096)
def _ink(text: str, size: int) -> np.ndarray:
    """The coverage of the text's pixels, `(height, width)` in 0..1, in the font that matplotlib contains."""
    height = round(size * 1.7)
    width = (len(text) + 1) * size
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="black")
    canvas = FigureCanvasAgg(figure)
    figure.text(0, 0.3, text, color="white", fontsize=size * 0.72, va="baseline", parse_math=False)
    canvas.draw()
    ink = np.asarray(canvas.buffer_rgba())[..., 0] / 255.0
    return ink[:, : int(np.flatnonzero(ink.any(0)).max(initial=0)) + 1]


# -- writing ----------------------------------------------------------------------------------------------------------


def film_path(path: Path) -> Path:
    """`path`, or the same as a .gif where PyAV, which writes mp4 files, is not installed."""
    return path if find_spec("av") else path.with_suffix(".gif")


def save_film(path: Path, frames: Iterable[Picture], fps: float) -> int:
    """Write frames as H.264 in yuv420p, which every player supports, or as a GIF. Returns the number of frames.

    All frames have the same, even size.

    Raises:
        UserError: the name ends in neither .mp4 nor .gif, or PyAV is needed and not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        pictures = list(frames)
        path.write_bytes(gif(pictures, fps))
        return len(pictures)
    if path.suffix != ".mp4":
        raise UserError(f"{path}: videos are written as .mp4 or .gif")
    if not find_spec("av"):
        raise UserError(f"writing {path} needs PyAV: pip install 'longdream[video]', or name a .gif")
    count = 0
    with iio.imopen(path, "w", plugin="pyav") as file:
        file.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
        for frame in frames:
            file.write_frame(frame)
            count += 1
    return count


def gif(frames: Sequence[Picture], fps: float) -> bytes:
    """Frames of one size as a GIF that repeats.

    They share one palette, found from a part of their pixels: a palette for each frame takes ten times as long.
    """
    some = np.stack(frames[:: ceil(len(frames) / PALETTE_FRAMES)])[:, ::2, ::2]
    palette = Image.fromarray(some.reshape(-1, *some.shape[2:])).quantize(256, Image.Quantize.MEDIANCUT)
    first, *rest = (Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    file = BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    return file.getvalue()


def save_picture(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, picture)
