"""An agent to hand on: a folder with its settings, a card, and the weights that acting and dreaming need, in one file.

    config.yaml           the settings of the run that it comes from
    README.md             the card: what it was trained on, and what it returned
    weights.safetensors   weights, in 32, 16 or 8 bits; its header says of what run, step and environment they are

Such a folder opens as a run does. What only training needs is left out: optimizers, replay, and the parts of the model
that are marked `training_only`.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longdream.agent.run import files
from longdream.agent.run.checkpoint import CheckpointError
from longdream.envs.contract import EnvSpec

WEIGHTS = "weights.safetensors"
FORMAT = 1
Precision = Literal["float32", "bfloat16", "int8"]
STEP = 0.07
"""Of an 8-bit weight, in root mean squares of its row. Rounding then changes a row by 2% of its size (STEP over the
square root of 12), and 127 steps are almost nine root mean squares: few weights lie beyond."""
SMALL = 4096
"""Tensors of fewer elements, and vectors, keep their 32 bits: norms, biases, rates."""
MOST_BYTES = 2 << 30
"""Size of a file of weights, at most."""


def pack(weights: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The tensors of a file, for weights by their dotted names."""
    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        small = weight.dim() < 2 or weight.numel() < SMALL
        if small or precision == "float32" or not weight.is_floating_point():
            packed[name] = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        elif precision == "bfloat16":
            packed[name] = weight.detach().cpu().to(torch.bfloat16).contiguous()
        else:
            codes, scale = quantize(weight.detach().cpu().float().contiguous())
            packed[f"{name}:codes"] = _deflated(codes)
            packed[f"{name}:scale"] = scale
            packed[f"{name}:shape"] = torch.tensor(weight.shape)
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `pack` was given, in 32 bits and as exact as it kept them.

    Raises:
        ValueError: the tensors are not those of a file that `pack` made.
    """
    weights: dict[str, Tensor] = {}
    for key, value in packed.items():
        name, _, part = key.partition(":")
        if not part:
            weights[name] = value.float() if value.is_floating_point() else value
        elif part == "codes":
            shape = [int(n) for n in packed[f"{name}:shape"]]
            codes = _inflated(value, shape)
            weights[name] = dequantize(codes, packed[f"{name}:scale"])
    return weights


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `(rows, ...)` as int8 codes of its shape and a scale `(rows,)` in 16 bits: weight = code * scale."""
    rows = weight.flatten(1)
    scale = (STEP * rows.square().mean(1).sqrt()).clamp(min=1e-12).to(torch.bfloat16)
    codes = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.view_as(weight), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize`, in 32 bits."""
    return (codes.flatten(1).float() * scale.float()[:, None]).view(codes.shape)


def _deflated(codes: Tensor) -> Tensor:
    """The bytes of codes, which are roughly normally distributed, in a Huffman code: about six bits each."""
    packer = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(codes.numpy().tobytes()) + packer.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _inflated(data: Tensor, shape: list[int]) -> Tensor:
    size = int(torch.tensor(shape).prod())
    if data.dtype != torch.uint8 or min(shape) < 1 or not 0 < size <= 8 * data.numel():  # a byte is a bit, at least
        raise ValueError("8-bit weights are not of the shape that is given for them")
    try:
        content = zlib.decompressobj().decompress(data.numpy().tobytes(), size)
    except zlib.error as error:
        raise ValueError(f"8-bit weights cannot be unpacked ({error})") from None
    if len(content) != size:
        raise ValueError("8-bit weights are fewer than their shape says")
    return torch.frombuffer(bytearray(content), dtype=torch.int8).view(shape)


def save(
    path: Path, modules: dict[str, nn.Module], spec: EnvSpec, step: int, precision: Precision, origin: dict[str, str]
) -> int:
    """Write the weights of modules by their names; the size of the file in bytes.

    Args:
        origin: lines of the run's environment.txt, such as the commit, which stay with the weights.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        left_out = _training_only(module)
        state = module.state_dict()
        tensors |= {f"{name}.{key}": value for key, value in state.items() if not key.startswith(left_out)}
    header = {"format": str(FORMAT), "step": str(step), "precision": precision, "spec": json.dumps(spec.to_json())}
    blob = safetensors.torch.save(pack(tensors, precision), header | {f"origin.{k}": v for k, v in origin.items()})
    path.write_bytes(blob)
    return len(blob)


def load(path: Path) -> tuple[dict[str, Any], int]:
    """The weights and the spec as a checkpoint has them, and the step.

    Raises:
        CheckpointError: the file is missing, or damaged, or of a later version of this program.
    """
    try:
        with files.opened(path) as (file, size):
            if size > MOST_BYTES:
                raise CheckpointError(f"{path} has {size:,} bytes, at most {MOST_BYTES:,} are read")
            blob = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    try:
        header = header_of(blob)
        if int(header["format"]) > FORMAT:
            raise CheckpointError(f"{path} has format {header['format']}, this program reads {FORMAT}: update it")
        spec = json.loads(header["spec"])
        EnvSpec.from_json(spec)
        weights: dict[str, dict[str, Tensor]] = {}
        for name, tensor in unpack(safetensors.torch.load(blob)).items():
            module, _, key = name.partition(".")
            weights.setdefault(module, {})[key] = tensor
        return {"spec": spec, "weights": weights}, int(header["step"])
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged ({reason}): get it again, or export it again") from None


def header_of(blob: bytes) -> dict[str, str]:
    """What was written beside the tensors: safetensors keeps it in the JSON at the start of the file.

    Raises:
        ValueError, LookupError, TypeError: it is no such file.
    """
    length = int.from_bytes(blob[:8], "little")
    if length > len(blob) - 8:
        raise ValueError("it is no safetensors file, or is cut off")
    return json.loads(blob[8 : 8 + length])["__metadata__"]


def _training_only(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters that acting and dreaming do without."""
    return tuple(
        f"{path}.{part}." if path else f"{part}."
        for path, child in module.named_modules()
        for part in getattr(child, "training_only", ())
    )
