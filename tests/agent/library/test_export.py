"""V, C and a step of M as programs give what the originals give."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import longdream as ld
from longdream.agent.library.export import parts_of


def originals(folder: Path) -> dict[str, Callable]:
    parts = parts_of(ld.load(folder, "cpu").actor)

    def run(name: str) -> Callable:
        def call(inputs: list[np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                out = parts[name].module(*map(torch.from_numpy, inputs))
            return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]

        return call

    return {name: run(name) for name in parts}


def as_onnx(path: Path) -> Callable:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [known.name for known in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def as_torch(path: Path) -> Callable:
    module = torch.export.load(path).module()

    def call(inputs: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            out = module(*map(torch.from_numpy, inputs))
        return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]

    return call


@pytest.mark.parametrize(("format", "run"), [("onnx", "images"), ("torch", "vectors")])
def test_the_programs_compute_what_the_agent_does(
    dream_runs: Callable[[str], Path], tmp_path: Path, format: str, run: str
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
    folder = dream_runs(run)
    written = ld.export_parts(folder, tmp_path / "parts", format=format)  # type: ignore[arg-type]
    about = json.loads((tmp_path / "parts" / "parts.json").read_text())
    known = originals(folder)
    programs = {name: (as_onnx if format == "onnx" else as_torch)(path) for name, path in written.items()}
    rng = np.random.default_rng(0)
    for n in (1, 3):
        obs = rng.integers(0, 255, (n, *about["encoder"]["inputs"]["obs"][1:]))
        obs = obs.astype(np.uint8 if run == "images" else np.float32)
        shapes = [(n, *shape[1:]) for name, shape in about["step"]["inputs"].items()][3:]
        state = [np.zeros(shape, np.float32) for shape in shapes[:-1]] + [np.zeros(n, np.int64)]
        action = np.eye(about["step"]["inputs"]["action"][1], dtype=np.float32)[:1].repeat(n, 0)
        theirs = {}
        for kind, call in (("original", known), ("program", programs)):
            (latents,) = call["encoder"]([obs])
            held = [array.copy() for array in state]
            for t in range(3):  # a frame that begins an episode, and two more
                features, *held = call["step"]([latents, action, np.full(n, t == 0), *held])
            (chosen,) = call["controller"]([features])
            dreamt = call["dream"]([features, chosen, *held])
            theirs[kind] = [latents, features, chosen, *dreamt, *call["decoder"]([dreamt[0]])]
        for mine, its in zip(theirs["original"], theirs["program"], strict=True):
            assert mine.shape == its.shape and mine.dtype == its.dtype
            np.testing.assert_allclose(
                its.astype(float), mine.astype(float), atol=1 if mine.dtype == np.uint8 else 1e-4
            )


def test_what_cannot_be_exported_says_why(
    dream_runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longdream.agent.library.export.find_spec", lambda name: None)
    with pytest.raises(ld.UserError, match=r"onnx and onnxscript missing: pip install 'longdream\[onnx\]'"):
        ld.export_parts(dream_runs("images"), tmp_path)
    with pytest.raises(ld.UserError, match="format = 'tflite'"):
        ld.export_parts(dream_runs("images"), tmp_path, format="tflite")  # type: ignore[arg-type]
