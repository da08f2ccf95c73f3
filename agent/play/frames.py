"""Pictures on their way to a browser, and those that come from it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from longdream.agent.dream_env.spaces import picture
from longdream.agent.evaluation.probes import Reading
from longdream.envs.contract import EnvSpec, UserError
from longdream.envs.images import resize_area, rgb

LOSSLESS_SIDE = 128
"""Pictures up to this side are sent as they are, as lossless WebP; larger ones as JPEG."""
QUALITY = 92
MAX_SIDE = 256
"""Larger pictures are sent at half their size or less; a page shows them larger anyway."""
MAX_PIXELS = 16_000_000
"""Of a picture that somebody uploads."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def encode(obs: dict[str, np.ndarray], i: int = 0) -> bytes:
    """Row i of observations as WebP or JPEG: the first image at its own size, or bars for numbers."""
    shown = None
    for value in obs.values():
        if value.ndim == 4 and value.dtype == np.uint8:
            colours = rgb(value[i])
            step = -(-max(colours.shape[:2]) // MAX_SIDE)
            shown = np.ascontiguousarray(colours[::step, ::step])
            break
    if shown is None:
        shown = picture({key: value[i] for key, value in obs.items()})
    out = io.BytesIO()
    if max(shown.shape[:2]) <= LOSSLESS_SIDE:
        Image.fromarray(shown).save(out, "WEBP", lossless=True, method=0, quality=0)
    else:
        Image.fromarray(shown).save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    """A picture of our own, `(H, W, 3)` uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def observation(data: bytes, spec: EnvSpec) -> dict[str, np.ndarray]:
    """An uploaded picture as an observation `(1, H, W, C)`: cut to the shape of the agent's image and resized.

    Raises:
        UserError: V sees more than one image, or the picture cannot be read or is too large.
    """
    reason = cannot_be_uploaded(spec)
    if reason:
        raise UserError(reason)
    ((key, known),) = spec.obs.items()
    height, width, channels = known.shape
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"the picture has {image.width} x {image.height} pixels: send a smaller one")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGBA" if channels == 4 else "RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds for bytes that are no picture
        raise UserError(f"the picture cannot be read ({type(error).__name__}): send a PNG, JPEG or WebP") from None
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    tall, wide = pixels.shape[:2]
    if tall * width > wide * height:  # too tall: cut above and below
        cut = max(1, round(wide * height / width))
        pixels = pixels[(tall - cut) // 2 :][:cut]
    else:
        cut = max(1, round(tall * width / height))
        pixels = pixels[:, (wide - cut) // 2 :][:, :cut]
    return {key: resize_area(np.ascontiguousarray(pixels)[None], height, width)}


def cannot_be_uploaded(spec: EnvSpec) -> str:
    """Why a dream cannot begin with a picture; empty where it can."""
    if [known.kind for known in spec.obs.values()] != ["image"]:
        return f"this agent sees {', '.join(spec.obs)}: a dream can begin with a picture where it sees one image alone"
    channels = next(iter(spec.obs.values())).shape[-1]
    if channels not in (1, 3, 4):
        return f"this agent's image has {channels} channels: a picture has 1, 3 or 4"
    return ""


def maze(probes: dict[str, np.ndarray], read: Reading | None) -> dict[str, Any] | None:
    """The true map of Memory Maze for the page, from its probes, and what is read of it; None of another environment.

    walls: 0 for a free cell to 100 for a wall, in rows from the top of the map. Places are (x, y) in cells, y upwards.
    """
    if "maze_layout" not in probes:
        return None
    maps: dict[str, Any] = {"true": _drawn(probes["maze_layout"] == 0, probes["targets_pos"])}
    if read is not None:
        maps["read"] = _drawn(read.walls, read.places)
    return maps | {
        "agent": [round(float(v), 3) for v in probes["agent_pos"]],
        "heading": [round(float(v), 3) for v in probes["agent_dir"]],
        "prompted": int(probes["target_index"]),
        "colour": [round(255 * float(v)) for v in probes["target_color"]],
    }


def _drawn(walls: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Walls `(S, S)` from 0 to 1, row 0 at y = 0, and places of targets `(K, 2)`, for the page."""
    return {
        "walls": (100 * walls[::-1]).round().astype(int).tolist(),
        "targets": targets.astype(float).round(3).tolist(),
    }
