"""What several measurements share."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from pathlib import Path
from typing import Literal

import torch

from agent import options
from agent.config import Config

Device = Literal["auto", "cpu", "cuda"]
MB = 1 << 20


def config_of(preset: str, device: Device | None) -> Config:
    """The configuration of a preset or .yaml file, on that device; its number of threads is set."""
    config = options.load(preset)
    config = dataclasses.replace(config, device=device or config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    return config


def resident_bytes() -> int:
    """Resident memory of this process (its peak, where the system tells no more)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
