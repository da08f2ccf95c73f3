"""Exported agents: weights in one file, in 32, 16 or 8 bits, that open as a run does."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.run import export
from longdream.agent.run import folder as run_folder
from longdream.agent.run.checkpoint import CheckpointError
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import UserError
from longdream.envs.make import World


def prior(**settings: object) -> Config:
    """The objective with a part that only training needs, and an actor-critic with another."""
    few = {"learn.steps": 200, "learn.prefill": 100, "evaluate.every": 0, "evaluate.final_episodes": 2}
    few |= {"forcing.objective": "prior", "encoder.classes": 8, "encoder.channels": 16, "learn.warmup": 0}
    return options.update(options.load("tiny"), few | settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    OnlineTrainer.train(prior(), folder, console=False)
    return folder


def exported(run: Path, out: Path, precision: str) -> Path:
    assert cli.main(["export", str(run), "--out", str(out), "--precision", precision]) == 0
    return out


WEIGHTS = {
    "matrix": torch.randn(70, 131, generator=torch.Generator().manual_seed(0)),
    "kernel": torch.randn(33, 7, 5, 5, generator=torch.Generator().manual_seed(1)).to(
        memory_format=torch.channels_last
    ),
    "rows": torch.randn(64, 80, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 3, 64)[:, None],
    "zeros": torch.zeros(5, 1000),
    "small": torch.randn(3, 5, generator=torch.Generator().manual_seed(3)),
    "vector": torch.randn(5000, generator=torch.Generator().manual_seed(4)),
    "count": torch.tensor([[2**40] * 2500] * 2),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_weights_come_back_as_exact_as_they_were_kept(precision: export.Precision) -> None:
    again = export.unpack(export.pack(WEIGHTS, precision))
    assert again.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        assert again[name].shape == weight.shape and again[name].dtype == weight.dtype, name
        if precision == "float32" or name in ("zeros", "small", "vector", "count"):
            assert torch.equal(again[name], weight), name
        elif precision == "bfloat16":
            assert torch.equal(again[name], weight.bfloat16().float()), name
        else:
            size = weight.flatten(1).square().mean(1).sqrt()
            error = (again[name] - weight).flatten(1)
            assert (error.abs().amax(1) <= 0.51 * export.STEP * size).all(), name
            assert (error.square().mean(1).sqrt() <= 0.025 * size).all(), name


def test_eight_bits_take_six(run: Path) -> None:
    weight = {"w": WEIGHTS["matrix"].repeat(20, 1)}
    sizes = {p: len(safetensors.torch.save(export.pack(weight, p))) for p in ("float32", "bfloat16", "int8")}
    assert sizes["int8"] < 0.4 * sizes["bfloat16"] and sizes["bfloat16"] < 0.51 * sizes["float32"]


def test_an_outlier_is_cut_off_and_the_rest_of_its_row_kept() -> None:
    weight = torch.ones(1, 5000)
    weight[0, 0] = 1e4
    again = export.unpack(export.pack({"w": weight}, "int8"))["w"]
    assert torch.isfinite(again).all() and again[0, 0] > 100 * again[0, 1]


def test_an_exported_agent_acts_as_the_run_does(run: Path, tmp_path: Path) -> None:
    own, opened = run_folder.load_agent(run)
    world = World(own.config.env.id, 3, 0, own.config.env.kwargs)
    row = world.reset()
    for precision, tolerance in (("float32", 0.0), ("bfloat16", 0.05), ("int8", 0.2)):
        agent, again = run_folder.load_agent(exported(run, tmp_path / precision, precision))
        assert (again.spec, again.saved[1], again.config.device) == (opened.spec, opened.saved[1], "auto")
        torch.manual_seed(0)
        other = agent.observe(agent.initial(3), row)[0].feat
        torch.manual_seed(0)
        feat = own.observe(own.initial(3), row)[0].feat
        assert (other - feat).abs().mean() <= tolerance * feat.abs().mean()
    world.close()


def test_what_only_training_needs_is_left_out(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "a", "float32")
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
        "README.md",
        "config.yaml",
        "weights.safetensors",
    ]
    names = list(safetensors.torch.load((folder / "weights.safetensors").read_bytes()))
    assert any(name.startswith("model.objective.head.") for name in names)
    assert any(name.startswith("controller.critic.") for name in names)
    assert not [name for name in names if ".ahead." in name or name.startswith("controller.target.")]
    agent = run_folder.load_agent(folder)[0]  # and the target critic is then the critic
    critic, target = agent.controller.critic, agent.controller.target  # type: ignore[attr-defined]
    assert all(map(torch.equal, critic.state_dict().values(), target.state_dict().values()))
    card = (folder / "README.md").read_text()
    result = run_folder.summary(run)
    assert result and f"{result['return_mean']:.2f} (95% interval" in card and "200 real steps" in card


def test_the_command_and_what_takes_its_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(run), "--precision", "float32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 200 and result["folder"] == f"exports/{run.name}"
    Path(result["folder"]).rename("agent")
    assert cli.main(["evaluate", "agent", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    own = run_folder.summary(run)
    assert own and {key: own[key] for key in summary} == summary
    assert cli.main(["train", "--init", "agent", "--name", "more", "--steps", "120"]) == 0
    assert np.isfinite(json.loads(Path("runs/more/summary.json").read_text())["return_mean"])
    capsys.readouterr()
    for arguments, error in (
        (["export", str(run), "--out", "agent"], "agent exists already: name a new folder"),
        (["train", "--resume", "agent"], "an exported agent, without optimizers: longdream train --init agent"),
        (["train", "--world", "agent"], "agent has no replay"),
        (["export", "nobody", "--out", "other"], "nobody: there is no such run"),
    ):
        assert cli.main(arguments) == 2
        assert error in capsys.readouterr().err
    assert not Path("other").exists()


def test_an_agent_that_comes_with_the_program_is_named(run: Path, tmp_path: Path, monkeypatch) -> None:
    exported(run, tmp_path / "pretrained" / "corridor", "int8")
    monkeypatch.setattr(run_folder, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert run_folder.pretrained() == ["corridor"]
    assert run_folder.open_run("corridor").spec == run_folder.open_run(run).spec
    with pytest.raises(UserError, match="did you mean corridor"):
        run_folder.open_run("coridor")


def test_damaged_files_are_one_line(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "a", "int8")
    path = folder / export.WEIGHTS
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for case in range(120):
        blob = bytearray(whole)
        if case < 20:
            del blob[int(rng.integers(len(blob))) :]
        else:
            for at in rng.integers(len(blob) if case % 2 else 4000, size=1 + case % 3):
                blob[at] = int(rng.integers(256))
        path.write_bytes(blob)
        try:
            run_folder.load_agent(folder)
        except UserError as error:
            assert "\n" not in str(error)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"weights.safetensors cannot be read"):
        run_folder.load_agent(folder)


def test_lengths_that_lie_are_refused() -> None:
    packed = export.pack({"w": WEIGHTS["matrix"]}, "int8")
    for shape in ([70, 132], [70, 10**9], [0, 5], [-1, 131]):
        with pytest.raises(ValueError, match="8-bit weights"):
            export.unpack(packed | {"w:shape": torch.tensor(shape)})
