"""Functions that several benchmarks share."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longdream.agent.config import options
from longdream.agent.config.schema import Config, Device
from longdream.agent.core.device import resolve_device

MB = 1 << 20


def config_of(preset: str, device: Device | None, settings: dict[str, Any] | None = None) -> Config:
    """The configuration of a preset or .yaml file with these settings, on that device. Also sets torch's threads."""
    config = options.update(options.load(preset), settings or {})
    config = dataclasses.replace(config, device=device or config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    return config


def process_age() -> float:
    """Seconds since this process was started, to a hundredth; 0 on systems other than Linux."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # in ticks since the boot
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except FileNotFoundError:
        return 0.0
    return uptime - started / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """Resident memory of this process; its peak on systems that report only that."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_of(device: Device | None) -> torch.device:
    """The device (default: the one that training would use), with training's precision of matrix products."""
    resolved = torch.device(resolve_device(device or "auto"))
    if resolved.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return resolved


def median_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call in milliseconds, over `repeats` calls after three warm-up calls."""
    times = []
    for i in range(-3, repeats):
        began = now(device)
        function()
        if i >= 0:
            times.append(1e3 * (now(device) - began))
    return sorted(times)[len(times) // 2]


def now(device: torch.device) -> float:
    """Time in seconds; on CUDA after all launched work has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
