"""`longdream bench attention`: implementations of M's attention over frames, against the slow masked reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longdream.agent.bench.common import device_of, median_ms
from longdream.agent.bench.model.scan import relative
from longdream.agent.config.schema import Device
from longdream.envs.contract import UserError
from longdream.worldmodel.kernels.attention import (
    QKV,
    AttentionMask,
    Cache,
    RotatedQKV,
    attend,
    attend_causal,
    attend_flex,
    attend_kernels,
    attend_reference,
    attention_mask,
    flex_attention_mask,
    kernels,
    precision,
    rotate_qkv,
)

ON_CUDA = {"batch": 16, "frames": 256, "tokens": 16, "heads": 8, "head": 64}
ELSEWHERE = {"batch": 2, "frames": 48, "tokens": 4, "heads": 2, "head": 16}
FLEX_LEAST = 16
"""Channels per head that FlexAttention needs at least."""


def measure(
    batch: int | None = None,
    frames: int | None = None,
    tokens: int | None = None,
    heads: int | None = None,
    head: int | None = None,
    window: int = 10,
    chunk: int = 5,
    checked: int = 40,
    repeats: int = 10,
    device: Device | None = None,
) -> dict[str, Any]:
    """Attention over the frames of a clip: dense rectangles through SDPA; on CUDA also FlexAttention and our kernels.

    Three patterns: a sliding window of frames (local), a window in chunks (chunks), all frames so far (causal). Errors
    are those of values and gradients against the masked softmax in float64, over fewer frames and at most two clips.
    Times are medians of whole calls. On CUDA, float32 is computed in bfloat16, as in training. `faster` is the best
    setting of worldmodel.attention for each pattern.

    Args:
        batch: number of clips (default: 16 on CUDA, else 2)
        frames: frames per clip (default: 256 on CUDA, else 48)
        tokens: tokens per frame (default: 16 on CUDA, else 4)
        heads: attention heads (default: 8 on CUDA, else 2)
        head: channels per head (default: 64 on CUDA, else 16)
        window: frames that a frame attends to, in local and chunks
        chunk: frames per chunk, in chunks
        checked: frames over which errors are measured
        repeats: timed calls
        device: where to compute (default: CUDA where there is one)

    Returns:
        rows: of each pattern and path, forward_ms (with gradients enabled), forward_backward_ms, error_value and
        error_grad (the largest error, relative to the largest exact value). faster: by pattern, the path with the least
        forward_backward_ms. skipped: why flex is missing, or null (triton is measured on CUDA).
    """
    where = device_of(device)
    sizes = dict(ON_CUDA if where.type == "cuda" else ELSEWHERE)
    given = {"batch": batch, "frames": frames, "tokens": tokens, "heads": heads, "head": head}
    sizes |= {name: value for name, value in given.items() if value is not None}
    for name, value in (sizes | {"chunk": chunk, "checked": checked, "repeats": repeats}).items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if window < chunk:
        raise UserError(f"--window {window}: must be at least --chunk {chunk}, which sees itself")
    skipped = None
    if where.type != "cuda":
        skipped = "FlexAttention has no backward pass on the CPU"
    elif sizes["head"] < FLEX_LEAST:
        skipped = f"FlexAttention needs heads of {FLEX_LEAST} channels"
    torch.manual_seed(0)
    few = sizes | {"batch": min(2, sizes["batch"]), "frames": min(checked, sizes["frames"])}
    patterns = {"local": (window - 1, 1), "chunks": (window - chunk, chunk), "causal": (None, 1)}
    shape = " x ".join(str(sizes[name]) for name in ("batch", "frames", "tokens", "heads", "head"))
    print(f"attention over {shape}, window {window}, chunks of {chunk}, on {where}", flush=True)
    fits = kernels is not None and kernels.fit(torch.empty(sizes["head"], device=where), torch.bfloat16)
    rows = []
    faster = {}
    for pattern, (reach, chunk_frames) in patterns.items():
        paths = ("sdpa", *([] if skipped else ["flex"]), *(["triton"] if fits else []))
        measured = [_row(pattern, path, reach, chunk_frames, few, sizes, where, repeats) for path in paths]
        faster[pattern] = min(measured, key=lambda row: row["forward_backward_ms"])["path"]
        rows += measured
    if skipped:
        print(f"  flex: skipped, {skipped}")
    return {**sizes, "window": window, "chunk": chunk, "device": str(where), "rows": rows, "faster": faster} | {
        "skipped": skipped
    }


def _row(
    pattern: str,
    path: str,
    reach: int | None,
    chunk_frames: int,
    few: dict,
    sizes: dict,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    run = path_of(path, reach, chunk_frames)
    held = reach or 0
    value, grad = errors(run, *inputs(device, held, **few), chunk_frames, reach)
    clean, first, cache = inputs(device, held, **sizes)

    def forward_backward() -> None:
        y = run(clean, first, cache)
        torch.autograd.grad(y, [*clean], y.detach())

    # with gradients, as in training: without them it would be compiled again
    forward_ms = median_ms(lambda: run(clean, first, cache), device, repeats)
    both_ms = median_ms(forward_backward, device, repeats)
    print(  # printed row by row, since compilation takes minutes
        f"  {pattern:7} {path:6} {forward_ms:9.3f} ms forward {both_ms:9.3f} ms with backward   "
        f"errors {value:.1e} {grad:.1e}",
        flush=True,
    )
    return {
        "pattern": pattern,
        "path": path,
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "error_value": value,
        "error_grad": grad,
    }


def path_of(path: str, reach: int | None, chunk_frames: int) -> Callable[[QKV, Tensor, Cache], Tensor]:
    """An implementation of a pattern: a function of QKV, first and cache that returns y. reach: None for all frames."""

    masks: dict[torch.Size, AttentionMask] = {}  # computed once: in training, all layers share them

    def run(clean: QKV, first: Tensor, cache: Cache) -> Tensor:
        frames = first.shape[1] if reach is None else reach
        if path == "flex":
            if first.shape not in masks:
                masks[first.shape] = flex_attention_mask(first, cache, frames, False, chunk_frames)
            return attend_flex(clean, cache, masks[first.shape])[0]
        if path == "triton":
            mask = attention_mask(first, cache)
            rotated = RotatedQKV(*(v.to(precision(v)).contiguous() for v in rotate_qkv(clean, cache, mask.rope)))
            return attend_kernels(rotated, mask.segment, frames, None, chunk_frames)[0].to(clean.v.dtype)
        if reach is None:
            return attend_causal(clean, first, cache, first.shape[1])[0]
        return attend(clean, first, cache, None, chunk_frames=chunk_frames)[0]

    return run


def inputs(
    device: torch.device, reach: int, batch: int, frames: int, tokens: int, heads: int, head: int
) -> tuple[QKV, Tensor, Cache]:
    """QKV that require gradients, first (no frame begins an episode), and a cache of which half is valid."""
    clean = QKV(*(torch.randn(batch, frames, tokens, heads, head, device=device).requires_grad_() for _ in range(3)))
    room = torch.randn(batch, reach, tokens, heads, head, device=device)
    age = torch.full((batch,), reach // 2, device=device)
    return clean, torch.zeros(batch, frames, dtype=torch.bool, device=device), Cache(room, room, age)


def errors(
    run: Callable[[QKV, Tensor, Cache], Tensor],
    clean: QKV,
    first: Tensor,
    cache: Cache,
    chunk_frames: int,
    reach: int | None,
) -> tuple[float, float]:
    """Largest relative errors of values and gradients against the reference in float64."""
    exact = QKV(*(v.detach().double().requires_grad_() for v in clean))
    held = Cache(cache.k.double(), cache.v.double(), cache.age)
    y = run(clean, first, cache)
    exact_y = attend_reference(exact, first, held, None, chunk_frames, first.shape[1] if reach is None else reach)
    weight = torch.randn_like(y)
    grads = torch.autograd.grad(y, [*clean], weight)
    exact_grads = torch.autograd.grad(exact_y, [*exact], weight.double())
    return relative(y, exact_y), max(relative(a, b) for a, b in zip(grads, exact_grads, strict=True))
