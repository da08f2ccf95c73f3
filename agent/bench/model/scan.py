"""`longdream bench scan`: the state-space scan, against the exact recurrence and the memory bandwidth."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from longdream.agent.bench.common import MB, device_of, median_ms
from longdream.agent.config.schema import Device
from longdream.envs.contract import UserError
from longdream.worldmodel.kernels.scan import ScanInputs, kernels, scan, scan_chunked, scan_reference

ON_CUDA = {"batch": 16, "frames": 4096, "heads": 8, "head": 64, "state_size": 64}
ELSEWHERE = {"batch": 2, "frames": 256, "heads": 2, "head": 16, "state_size": 16}


def measure(
    batch: int | None = None,
    frames: int | None = None,
    tokens: int = 1,
    heads: int | None = None,
    head: int | None = None,
    state_size: int | None = None,
    chunk: int = 64,
    checked: int = 300,
    repeats: int = 20,
    dtype: Literal["float32", "bfloat16"] = "float32",
    compiled: bool | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """The chunked scan: its errors, its time, and the time that its memory traffic takes at least.

    Errors are those of values, final states and gradients, against the recurrence token by token in float64, over fewer
    frames and at most two sequences. Decays are those of M's initialisation. Times are medians of whole calls. Training
    on CUDA uses our own kernels; the implementation in torch is measured for comparison.

    Args:
        batch: number of sequences (default: 16 on CUDA, else 2)
        frames: frames per sequence (default: 4096 on CUDA, else 256)
        tokens: tokens per frame
        heads: heads of the scan (default: 8 on CUDA, else 2)
        head: channels per head (default: 64 on CUDA, else 16)
        state_size: state size per channel (default: 64 on CUDA, else 16)
        chunk: frames per chunk
        checked: frames over which errors are measured
        repeats: timed calls
        dtype: of x, b and c; in bfloat16 the implementation in torch runs under autocast. Decays and states are float32
        compiled: whether torch.compile is applied to the implementation in torch (default: on CUDA)
        device: where to compute (default: CUDA where there is one)

    Returns:
        error_value, error_grad: the largest error, relative to the largest exact value of that tensor. forward_ms,
        forward_backward_ms. The same with the prefix torch_, of the implementation in torch; null if training uses it.
        bytes_floor_ms, bytes_floor_forward_backward_ms: time to read every input once and to write every output once,
        forward and for both passes, at the measured copy_gb_per_s. fla_forward_ms: of flash-linear-attention's chunked
        form, null if it is not installed; its error_value is fla_error_value.
    """
    where = device_of(device)
    sizes = dict(ON_CUDA if where.type == "cuda" else ELSEWHERE)
    given = {"batch": batch, "frames": frames, "heads": heads, "head": head, "state_size": state_size}
    sizes |= {name: value for name, value in given.items() if value is not None}
    for name, value in (sizes | {"tokens": tokens, "chunk": chunk, "checked": checked, "repeats": repeats}).items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    torch.manual_seed(0)
    compiled = where.type == "cuda" if compiled is None else compiled
    kind = {"dtype": getattr(torch, dtype)}
    few = sizes | {"batch": min(2, sizes["batch"]), "frames": min(checked, sizes["frames"])}
    stream, first, state = inputs(where, tokens, **sizes, **kind)
    ours = kernels is not None and kernels.fit(stream.x, stream.b, stream.c)

    def measured(function: Callable[..., Any], compiled: bool) -> dict[str, float]:
        """Errors and times of one implementation of the scan."""
        run = torch.compile(function, dynamic=False) if compiled else function

        def forward_backward() -> None:
            y = run(stream, first, state, chunk).y
            torch.autograd.grad(y, [*stream, state], y.detach())

        with torch.autocast(where.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            value, grad = errors(run, *inputs(where, tokens, **few, **kind), chunk)
            with torch.no_grad():
                forward_ms = median_ms(lambda: run(stream, first, state, chunk), where, repeats)
            both_ms = median_ms(forward_backward, where, repeats)
        return {"error_value": value, "error_grad": grad, "forward_ms": forward_ms, "forward_backward_ms": both_ms}

    in_training = measured(scan, compiled and not ours)  # Triton compiles the kernels by itself
    print("  ".join(f"{name} {value:.3g}" for name, value in in_training.items()), file=sys.stderr)
    in_torch = measured(scan_chunked, compiled) if ours else dict.fromkeys(in_training)
    with torch.no_grad():
        bandwidth = copy_bandwidth(where, repeats)
    read = sum(v.nbytes for v in (*stream, state))
    written = stream.x.nbytes + state.nbytes
    result = {
        **sizes,
        "tokens": tokens,
        "chunk": chunk,
        "dtype": dtype,
        "device": str(where),
        "kernels": ours,
        **in_training,
        **{f"torch_{name}": value for name, value in in_torch.items()},
        "bytes_floor_ms": 1e3 * (read + written) / bandwidth,
        # the backward pass reads inputs and the gradient of y, and writes a gradient for every input
        "bytes_floor_forward_backward_ms": 1e3 * (read + written + read + stream.x.nbytes + read) / bandwidth,
        "copy_gb_per_s": bandwidth / 1e9,
        **fla(where, tokens, sizes | kind, few | kind, repeats),
    }
    shape = " x ".join(str(sizes[name]) for name in ("batch", "frames", "heads", "head"))
    how = "by kernels" if ours else "in torch"
    print(f"scan of {shape}, {tokens} tokens a frame, state {sizes['state_size']}, {dtype}, {how}, on {where}")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"  {name:32} {value:.3g}")
    if result["fla_forward_ms"] is None:
        print("  flash-linear-attention is not installed here: no comparison with it")
    return result


def inputs(
    device: torch.device,
    tokens: int,
    batch: int,
    frames: int,
    heads: int,
    head: int,
    state_size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[ScanInputs, Tensor, Tensor]:
    """Inputs that require gradients, with time constants from 4 to 1000 frames; first (no frame begins an episode); a
    state that requires gradients."""
    lead = (batch, frames, tokens)
    x = torch.randn(*lead, heads, head, device=device)
    b = torch.randn(*lead, state_size, device=device)
    c = torch.randn(*lead, state_size, device=device)
    rate = 1 / torch.logspace(math.log10(4), math.log10(1000), heads, device=device) / tokens
    a = -rate * (0.5 + torch.rand(*lead, heads, device=device))
    state = torch.randn(batch, heads, state_size, head, device=device).requires_grad_()
    x = x.to(dtype)
    b = (b * state_size**-0.5).to(dtype)
    c = c.to(dtype)
    stream = ScanInputs(*(v.requires_grad_() for v in (x, b, c, a)))
    return stream, torch.zeros(batch, frames, dtype=torch.bool, device=device), state


def errors(
    run: Callable[..., Any], stream: ScanInputs, first: Tensor, state: Tensor, chunk: int
) -> tuple[float, float]:
    """Largest relative errors of values and gradients against the recurrence in float64."""
    exact = (
        ScanInputs(*(v.detach().double().requires_grad_() for v in stream)),
        state.detach().double().requires_grad_(),
    )
    out = run(stream, first, state, chunk)
    y, states, _ = scan_reference(exact[0], first, exact[1])
    value = max(relative(out.y, y), relative(out.state, states[-1]))
    cotangents = [torch.randn_like(v) for v in (out.y, out.state)]
    grads = torch.autograd.grad((out.y, out.state), [*stream, state], cotangents)
    exact_grads = torch.autograd.grad((y, states[-1]), [*exact[0], exact[1]], [v.double() for v in cotangents])
    return value, max(relative(a, b) for a, b in zip(grads, exact_grads, strict=True))


def relative(value: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest exact value."""
    exact = exact.detach()
    return float((value.detach().double() - exact).abs().amax() / exact.abs().amax())


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second that a copy reads and writes together."""
    source = torch.empty((512 if device.type == "cuda" else 64) * MB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median_ms(lambda: target.copy_(source), device, repeats))


def fla(device: torch.device, tokens: int, sizes: dict, few: dict, repeats: int) -> dict[str, float | None]:
    """Forward time and error of the same scan in flash-linear-attention (Yang and Zhang 2024, MIT licence): its chunked
    gated linear attention with one decay per head. None without CUDA, or if it is not installed."""
    package = "fla"
    if device.type != "cuda" or find_spec(package) is None:
        return {"fla_forward_ms": None, "fla_error_value": None}
    kernel = import_module(f"{package}.ops.simple_gla").chunk_simple_gla

    def call(stream: ScanInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        heads = stream.a.shape[-1]
        flat = ScanInputs(*(v.flatten(1, 2) for v in stream))
        q = flat.c[:, :, None].expand(-1, -1, heads, -1).contiguous()
        k = flat.b[:, :, None].expand(-1, -1, heads, -1).contiguous()
        return kernel(q, k, flat.x, g=flat.a, scale=1.0, initial_state=state, output_final_state=True)

    with torch.no_grad():
        stream, first, state = inputs(device, tokens, **few)
        exact = scan_reference(ScanInputs(*(v.double() for v in stream)), first, state.double())[0].flatten(1, 2)
        error = relative(call(stream, state)[0], exact)
        stream, _, state = inputs(device, tokens, **sizes)
        return {"fla_forward_ms": median_ms(lambda: call(stream, state), device, repeats), "fla_error_value": error}
