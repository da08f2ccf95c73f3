"""V, C and a step of M as programs that run without this package: ONNX, or torch.export."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longdream.agent.core.agent import Agent
from longdream.agent.library.functions import Run, load
from longdream.envs.contract import UserError
from longdream.worldmodel.dynamics import State

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
STREAMS = 2
"""Streams of the example that is traced. The programs take any number n."""


@dataclass
class Program:
    """A program before it is written. inputs: an example of each, by name. outputs: their names."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]


class _Encoder(nn.Module):
    """V: observations to latents."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.keys = list(agent.spec.obs)
        self.encoder = agent.model.encoder

    def forward(self, *obs: Tensor) -> Tensor:
        return self.encoder(dict(zip(self.keys, obs, strict=True)))


class _Decoder(_Encoder):
    """V: latents, and features where V learns through M, to observations."""

    def forward(self, *latents: Tensor) -> tuple[Tensor, ...]:
        obs = self.encoder.decode(*latents)
        return tuple(obs[key] for key in self.keys)


class _Controller(nn.Module):
    """C: features to greedy actions."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.controller: Any = agent.controller

    def forward(self, *features: Tensor) -> Tensor:
        return self.controller.act(*features, True).clamp(-1, 1)


class _Step(nn.Module):
    """M takes in a frame."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.model = agent.model
        state = agent.model.dynamics.initial(1)
        self.mixers = len(state.mixers)
        self.caches = len(state.k)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        latents, action, first, *state = inputs
        feat, after = self.model.commit(self.state(state), latents, action, first)
        return feat, *tensors_of(after).values()

    def state(self, tensors: Sequence[Tensor]) -> State:
        """The inverse of `tensors_of`."""
        mixers = tensors[: self.mixers]
        k = tensors[self.mixers : self.mixers + self.caches]
        v = tensors[self.mixers + self.caches : -2]
        return State(tuple(mixers), tuple(k), tuple(v), tensors[-2], tensors[-1])


class _Dream(_Step):
    """M imagines a frame."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features, action, *state = inputs
        reward, cont = self.model.reward_continue.expect(features, action)
        latents, feat, after = self.model.advance(features, self.state(state), action, 1.0, self.model.steps)
        return latents, feat, reward, cont, *tensors_of(after).values()


def tensors_of(state: State) -> dict[str, Tensor]:
    """M's state tensor by tensor, as the programs take and return it."""
    named = {f"{kind}_{i}": t for kind in ("mixers", "k", "v") for i, t in enumerate(getattr(state, kind))}
    return named | {"last": state.last, "age": state.age}


def export_parts(run: Run, folder: str | Path, format: Literal["onnx", "torch"] = "onnx") -> dict[str, Path]:
    """Write V, C and a step of M as programs that compute on the CPU for any number n of streams:

    * encoder: observations `(n, *shape)` as they are stored, to latents `(n, N, D)`; decoder: back;
    * controller: features `(n, F)` to greedy actions `(n, A)`, encoded as `longdream.envs.contract.ActionSpec` says;
    * step, M takes in a frame: latents, the action before it, whether it begins an episode `(n,)` bool, and M's state,
      to features and the state after it. All of the state is zeros before the first frame;
    * dream, M imagines a frame: features, the action taken there and M's state, to the next latents and features, the
      expected reward and the probability of going on `(n,)`, and the state after it.

    `parts.json` names the inputs and outputs of each in order, with their shapes, and describes the environment.

    Args:
        run: the folder of a run, or an agent. folder: where the files go; it is made if need be.
        format: "onnx" writes NAME.onnx and needs `pip install 'longdream[onnx]'`. "torch" writes NAME.pt2 for
            `torch.export.load`.

    Returns:
        the file of each part.

    Raises:
        UserError: there is no such run, the extra is missing, M's state grows (mixer causal), or a part that is not
            built in cannot be traced.

    >>> import longdream as ld
    >>> sorted(ld.export_parts("runs/demo", "parts", format="torch"))
    ['controller', 'decoder', 'dream', 'encoder', 'step']
    """
    if format not in SUFFIX:
        raise UserError(f"format = {format!r}: use one of {', '.join(SUFFIX)}")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(f"{' and '.join(missing)} missing: pip install 'longdream[onnx]', or give format='torch'")
    trained = load(run, "cpu")
    if trained.actor.model.dynamics.grows:
        raise UserError(
            "worldmodel.mixer = causal: M's state grows with the frames seen, and no fixed program takes it"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    about: dict[str, Any] = {}
    for name, part in parts_of(trained.actor).items():
        written[name] = folder / f"{name}{SUFFIX[format]}"
        try:
            _write(part, written[name], format)
        except Exception as error:  # whatever tracing a part of the user's own leads to
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the {name} of {trained.folder} cannot be exported as {format}: {reason}") from error
        inputs = {key: ["n", *value.shape[1:]] for key, value in part.inputs.items()}
        about[name] = {"inputs": inputs, "outputs": part.outputs}
    about["spec"] = trained.spec.to_json()
    (folder / "parts.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return written


@torch.no_grad()
def parts_of(agent: Agent) -> dict[str, Program]:
    """The programs of an agent, by name."""
    spec = agent.spec
    model = agent.model
    obs = {
        key: torch.zeros(STREAMS, *known.shape, dtype=getattr(torch, known.dtype.name))
        for key, known in spec.obs.items()
    }
    latents = {"latents": model.encoder(obs)}
    features = {"features": torch.zeros(STREAMS, model.feature_size)}
    action = {"action": torch.zeros(STREAMS, spec.action.size)}
    first = {"first": torch.zeros(STREAMS, dtype=torch.bool)}
    # clones: where two inputs are one tensor, as in an empty state, torch.export takes them for one input
    state = {name: value.clone() for name, value in tensors_of(model.dynamics.initial(STREAMS)).items()}
    decoded = latents | (features if model.trains_encoder else {})
    dreamt = ["latents", "features", "reward", "going_on", *state]
    return {
        "encoder": Program(_Encoder(agent), obs, ["latents"]),
        "decoder": Program(_Decoder(agent), decoded, list(obs)),
        "controller": Program(_Controller(agent), features, ["action"]),
        "step": Program(_Step(agent), latents | action | first | state, ["features", *state]),
        "dream": Program(_Dream(agent), features | action | state, dreamt),
    }


@torch.no_grad()
def _write(part: Program, path: Path, format: str) -> None:
    n = torch.export.Dim("n")
    inputs = tuple(part.inputs.values())
    shapes = (tuple({0: n} for _ in inputs),)  # the first axis of every input; `forward` takes *inputs
    program = torch.export.export(part.module.eval(), inputs, dynamic_shapes=shapes)
    if format == "torch":
        torch.export.save(program, path)
        return
    outputs = [f"{name}_after" if name in part.inputs else name for name in part.outputs]  # names are unique in ONNX
    from torch import onnx

    with _quiet():
        onnx.export(program, f=path, input_names=list(part.inputs), output_names=outputs, dynamo=True, verbose=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on operators of packages that are not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
