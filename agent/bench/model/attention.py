"""`longdream bench attention`: ways to compute M's attention over frames, beside the slow masked reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longdream.agent.bench.common import Device, device_of, median_ms
from longdream.agent.bench.model.scan import relative
from longdream.envs.contract import UserError
from longdream.worldmodel.kernels.attention import (
    Cache,
    Heads,
    Sight,
    Turned,
    attend,
    attend_far,
    attend_flex,
    attend_kernels,
    attend_reference,
    flex_sight_of,
    kernels,
    precision,
    sight_of,
    turned,
)

ON_CUDA = {"batch": 16, "frames": 256, "tokens": 16, "heads": 8, "head": 64}
ELSEWHERE = {"batch": 2, "frames": 48, "tokens": 4, "heads": 2, "head": 16}
FLEX_LEAST = 16  # channels per head


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
    """Attention over the frames of a clip: dense rectangles through SDPA; on CUDA FlexAttention and own kernels too.

    Three patterns: frame after frame with a window (local), in chunks with a window (chunks), all frames so far
    (causal). Errors are those of values and gradients against the masked softmax in float64, over fewer frames and at
    most two clips; times are medians of whole calls. On CUDA float32 goes through bfloat16, as in training. `faster`
    says what worldmodel.attention should be for each pattern.

    Args:
        batch: clips (default: 16 on CUDA, else 2)
        frames: of each (default: 256 on CUDA, else 48)
        tokens: per frame (default: 16 on CUDA, else 4)
        heads: of the attention (default: 8 on CUDA, else 2)
        head: channels per head (default: 64 on CUDA, else 16)
        window: frames that are seen, in local and chunks
        chunk: frames per chunk, in chunks
        checked: frames over which errors are measured
        repeats: timed calls
        device: where to compute (default: CUDA where there is one)

    Returns:
        rows: of each pattern and path, forward_ms (with what a backward pass needs), forward_backward_ms, error_value
        and error_grad (the largest, as a share of the largest exact value). faster: by pattern, the path that takes
        less time forward and backward. skipped: why flex is missing, or null (triton is where it is CUDA).
    """
    where = device_of(device)
    sizes = dict(ON_CUDA if where.type == "cuda" else ELSEWHERE)
    told = {"batch": batch, "frames": frames, "tokens": tokens, "heads": heads, "head": head}
    sizes |= {name: value for name, value in told.items() if value is not None}
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
    rows, faster = [], {}
    for pattern, (reach, together) in patterns.items():
        paths = ("sdpa", *([] if skipped else ["flex"]), *(["triton"] if fits else []))
        found = [_row(pattern, path, reach, together, few, sizes, where, repeats) for path in paths]
        faster[pattern] = min(found, key=lambda row: row["forward_backward_ms"])["path"]
        rows += found
    if skipped:
        print(f"  flex: skipped, {skipped}")
    return {**sizes, "window": window, "chunk": chunk, "device": str(where), "rows": rows, "faster": faster} | {
        "skipped": skipped
    }


def _row(
    pattern: str, path: str, reach: int | None, chunk: int, few: dict, sizes: dict, device: torch.device, repeats: int
) -> dict[str, Any]:
    run, held = path_of(path, reach, chunk), reach or 0
    value, grad = errors(run, *inputs(device, held, **few), chunk, reach)
    clean, first, cache = inputs(device, held, **sizes)

    def forward_backward() -> None:
        y = run(clean, first, cache)
        torch.autograd.grad(y, [*clean], y.detach())

    # as in training: without gradients it would be compiled once more
    forward_ms = median_ms(lambda: run(clean, first, cache), device, repeats)
    both_ms = median_ms(forward_backward, device, repeats)
    times, wrong = f"{forward_ms:9.3f} ms forward {both_ms:9.3f} ms with backward", f"errors {value:.1e} {grad:.1e}"
    print(f"  {pattern:7} {path:6} {times}   {wrong}", flush=True)  # as it comes: what is compiled takes minutes
    return {
        "pattern": pattern,
        "path": path,
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "error_value": value,
        "error_grad": grad,
    }


def path_of(path: str, reach: int | None, chunk: int) -> Callable[[Heads, Tensor, Cache], Tensor]:
    """A way to compute a pattern: clean heads, first and cache to y. reach: None for all frames."""

    sights: dict[torch.Size, Sight] = {}  # made once for all layers in training, and here for all calls

    def run(clean: Heads, first: Tensor, cache: Cache) -> Tensor:
        far = first.shape[1] if reach is None else reach
        if path == "flex":
            if first.shape not in sights:
                sights[first.shape] = flex_sight_of(first, cache, far, False, chunk)
            return attend_flex(clean, cache, sights[first.shape])[0]
        if path == "triton":
            segment, phases = sight_of(first, cache)[:2]
            heads = Turned(*(v.to(precision(v)).contiguous() for v in turned(clean, cache, phases)))
            return attend_kernels(heads, segment, far, None, chunk)[0].to(clean.v.dtype)
        if reach is None:
            return attend_far(clean, first, cache, first.shape[1])[0]
        return attend(clean, first, cache, None, chunk=chunk)[0]

    return run


def inputs(
    device: torch.device, reach: int, batch: int, frames: int, tokens: int, heads: int, head: int
) -> tuple[Heads, Tensor, Cache]:
    """Heads that want gradients, frames that begin an episode, none, and a cache of which half is valid."""
    clean = Heads(*(torch.randn(batch, frames, tokens, heads, head, device=device).requires_grad_() for _ in range(3)))
    room = torch.randn(batch, reach, tokens, heads, head, device=device)
    age = torch.full((batch,), reach // 2, device=device)
    return clean, torch.zeros(batch, frames, dtype=torch.bool, device=device), Cache(room, room, age)


def errors(
    run: Callable[[Heads, Tensor, Cache], Tensor],
    clean: Heads,
    first: Tensor,
    cache: Cache,
    chunk: int,
    reach: int | None,
) -> tuple[float, float]:
    """Largest relative errors of values and gradients against the reference in float64."""
    exact = Heads(*(v.detach().double().requires_grad_() for v in clean))
    held = Cache(cache.k.double(), cache.v.double(), cache.age)
    y = run(clean, first, cache)
    wanted = attend_reference(exact, first, held, None, chunk, first.shape[1] if reach is None else reach)
    weight = torch.randn_like(y)
    got = torch.autograd.grad(y, [*clean], weight)
    grads = torch.autograd.grad(wanted, [*exact], weight.double())
    return relative(y, wanted), max(relative(a, b) for a, b in zip(got, grads, strict=True))
