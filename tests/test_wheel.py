"""The wheel in an environment of its own, outside of the checkout, with nothing but what the base install brings."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--steps", "60", "--learn.prefill", "40", "--learn.warmup", "1", "--evaluate.every", "0"]
SHORT += ["--evaluate.final_episodes", "2"]
SCRIPT = """
import contextlib, io, json, sys
import longdream as ld
from longdream.agent.cli.main import main
from longdream.agent.config import options

def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, "--json"])
    return json.loads(out.getvalue().splitlines()[-1]) | {"code": code, "said": err.getvalue()}

results = {" ".join(words[:2]): run(*words) for words in json.load(sys.stdin)}
for preset in options.presets():
    ld.config(preset, **({"video.data": "."} if preset.startswith("video") else {}))
agent = ld.load("runs/x")
obs, _ = agent.make_env().reset(seed=0)
_, memory = agent.act(obs, agent.reset())
results["python"] = {"file": ld.__file__, "presets": sorted(options.presets())}
results["python"]["dreamt"] = agent.imagine(memory, horizon=3).frames.shape
results["python"]["pretrained"] = str(ld.load("memory-maze-9x9").action_space)
print(json.dumps(results))
"""
"""Commands one after another in one process: each alone would import torch anew."""


def needed(distribution: str) -> set[str]:
    """Names of the installed packages that one needs, itself included, without its extras."""
    names: set[str] = set()
    left = [distribution]
    while left:
        name = left.pop()
        if name in names:
            continue
        names.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(metadata.distribution(requirement.name).metadata["Name"])
    return names


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with the wheel, and with links to the installed packages that it requires."""
    home = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, home / "source", symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(home), "."]
    subprocess.run(build, cwd=home / "source", check=True, capture_output=True)
    (wheel,) = home.glob("longdream-*.whl")
    venv.create(home / "venv", with_pip=False)
    python = str(home / "venv" / "bin" / "python")
    install = [*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", str(wheel)]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # else it is installed already
    subprocess.run(install, env=alone, check=True, capture_output=True)
    (place,) = (home / "venv" / "lib").glob("python*/site-packages")
    tops = set()
    (requirements,) = (path for path in place.glob("longdream-*.dist-info/METADATA"))
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if not line.startswith("Requires-Dist: ") or "extra ==" in line:
            continue
        for name in needed(metadata.distribution(Requirement(line.partition(": ")[2]).name).metadata["Name"]):
            distribution = metadata.distribution(name)
            for file in distribution.files or []:
                if file.parts[0] not in ("..", "__pycache__"):
                    tops.add(Path(str(distribution.locate_file(file.parts[0]))))
    for top in tops:
        if not (place / top.name).exists():
            (place / top.name).symlink_to(top)
    shutil.rmtree(home / "source")
    return home


def test_it_brings_one_name(installed: Path) -> None:
    """And with it the presets and the trained agent; what a user calls envs, agent or runs stays theirs."""
    (wheel,) = installed.glob("longdream-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"longdream"}
    packed = {name.removeprefix("longdream/") for name in names}
    sources = [
        path for folder in ("agent", "controller", "envs", "worldmodel") for path in (ROOT / folder).rglob("*.py")
    ]
    assert {"py.typed", *(str(path.relative_to(ROOT)) for path in sources)} <= packed
    assert {f"agent/play/page/{path.name}" for path in (ROOT / "agent" / "play" / "page").iterdir()} <= packed
    assert {f"runs/presets/{path.name}" for path in (ROOT / "runs" / "presets").glob("*.yaml")} <= packed
    files = [path for path in (ROOT / "runs" / "pretrained").rglob("*") if path.is_file()]
    assert files and {str(path.relative_to(ROOT)) for path in files} <= packed


def test_the_wheel_trains_evaluates_dreams_and_says_what_an_extra_would_bring(installed: Path) -> None:
    home = installed
    environ = {"HOME": str(home), "PATH": "/bin", "OMP_NUM_THREADS": "1"}
    commands = [
        ["doctor"],
        ["envs"],
        ["train", "tiny", "--name", "x", *SHORT],
        ["evaluate", "runs/x", "--episodes", "2"],
        ["dream", "runs/x"],
        ["list"],
        ["plot", "runs/x", "--out", "x.pdf"],
        ["compare", "runs/x"],
        ["train", "memory-maze-9x9"],
        ["train", "cartpole", "--env", "longdream/FastMemoryMaze-9x9-v0"],
        ["train", "quickstart", "--log.to", "wandb"],
        ["sweep", "x.yaml"],
    ]
    program = [str(home / "venv" / "bin" / "longdream"), "--help"]
    shown = subprocess.run(program, cwd=home, env=environ, capture_output=True, text=True, check=True).stdout
    assert all(f"longdream {words[0]}" in shown for words in commands)
    python = [str(home / "venv" / "bin" / "python"), "-c", SCRIPT]
    done = subprocess.run(python, cwd=home, env=environ, capture_output=True, text=True, input=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["python"]["file"].startswith(str(home / "venv")) and results["python"]["dreamt"] == [3, 16, 16, 3]
    assert results["python"]["pretrained"] == "Discrete(6)"
    assert results["python"]["presets"] == sorted(path.stem for path in (ROOT / "runs" / "presets").glob("*.yaml"))
    doctor = results["doctor"]
    assert doctor["torch"]["ok"] and doctor["memory maze"]["ok"] is None and doctor["video"]["ok"] is None
    assert "pip install 'longdream[maze]'" in doctor["memory maze"]["found"]
    assert "longdream/Recall-v0" in results["envs"]["own"] and results["evaluate runs/x"]["episodes"] == 2
    assert results["dream runs/x"]["video"] == "runs/x/videos/dream.gif"
    assert results["list"]["runs"][0]["status"] == "complete" and results["plot runs/x"]["groups"] == {"x": 1}
    assert results["compare runs/x"]["groups"]["x"]["last"]["iqm"] >= 0
    for name, message in (
        (
            "train memory-maze-9x9",
            "Memory Maze needs memory_maze, dm_control, mujoco, labmaze, numba: pip install 'longd",
        ),
        ("train cartpole", "Fast Memory Maze needs memory_maze"),
        ("train quickstart", "pip install 'longdream[wandb]'"),
        ("sweep x.yaml", "longdream sweep needs Optuna: pip install 'longdream[sweep]'"),
    ):
        assert results[name]["code"] == 2 and message in results[name]["said"], results[name]
        assert results[name]["said"].count("\n") == 1
