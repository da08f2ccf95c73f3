"""Which device computes and in which precision, copies from it to the host, and randomness of one's own on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from longdream.envs.contract import UserError


def resolve_device(name: str) -> str:
    """`auto` to cuda where there is one, else cpu.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device cuda: torch finds no CUDA device here; use --device auto or --device cpu")
    if name == "auto":
        return "cuda" if available else "cpu"
    return name


def set_precision(precision: str, device: torch.device) -> None:
    """Let matrix products in float32 on CUDA be those of a run's `precision`."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Within, matrix products on CUDA are in bfloat16 if that is the run's `precision`."""
    return torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16" and device.type == "cuda")


def free_bytes(device: torch.device) -> int:
    """Memory of the device that can be had; without limit on the CPU of a system that does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return sys.maxsize
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), sys.maxsize)


class HostCopy:
    """A tensor on its way to the host. Reading it waits for that copy and for nothing that was launched later."""

    def __init__(self, value: torch.Tensor):
        self._value = value.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if value.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def done(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._copied is None or self._copied.query()

    def read(self) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._value


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from `seed`, on the CPU and on this device. Afterwards its generators continue as if nothing
    had been drawn.

    Only these generators are seeded: torch.manual_seed looks for all devices that there may be, which is too slow to
    do at every step of an environment.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
