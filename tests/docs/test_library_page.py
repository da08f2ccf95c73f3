"""The examples of the pages on the library, and of the README, run as they stand, in a run trained for a moment."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import longdream as ld
from longdream.agent.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--steps", "60", "--learn.prefill", "40", "--learn.warmup", "2", "--evaluate.every", "0"]
SHORT += ["--evaluate.final_episodes", "4"]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/demo in it."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "tiny", *SHORT, "--name", "demo"]) == 0
    return folder


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/index.md", 1), ("docs/library.md", 7)])
def test_the_examples_run(demo: Path, monkeypatch: pytest.MonkeyPatch, page: str, count: int) -> None:
    monkeypatch.chdir(demo)
    assert len(blocks(page)) == count
    here: dict = {}
    for block in blocks(page):
        exec(block, here)
    assert np.isfinite(here["dream"].rewards).all() and len(here["dream"].frames) == len(here["dream"].rewards)
    if page == "docs/library.md":
        assert here["futures"].rewards.shape == (16, 6) and here["spread"].shape == (6,)
        assert here["again"].shape == here["obs"].shape and here["tuned"]["run"] == "runs/tuned"
        assert here["config"].worldmodel.mixer == "window"
        assert (demo / "dream.png").is_file() and (demo / "parts" / "parts.json").is_file()


def test_the_sink_of_the_page_gets_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("docs/comparing.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_sinks.py").write_text(block)
    sys.modules.pop("my_sinks", None)
    assert cli.main(["train", "tiny", *SHORT, "--name", "x", "--log.to", "tensorboard,my_sinks:Lines"]) == 0
    sys.modules.pop("my_sinks")
    assert "final/return_mean" in (tmp_path / "runs" / "x" / "lines.txt").read_text()


def test_the_sweep_of_the_page_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longdream.agent.cli import sweep

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "comparing.md").read_text(), re.DOTALL)
    (tmp_path / "rates.yaml").write_text(block)
    plan = sweep.read(tmp_path / "rates.yaml")
    assert plan.trials == 20 and ld.config(plan.train, **plan.settings).learn.steps == 8000


def test_the_pictures_of_memory_are_made_by_their_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "docs" / "images" / "memory.py").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["memory.py", str(tmp_path)])
    here: dict = {"__name__": "__main__", "__file__": "memory.py"}
    exec(compile(source.replace("FRAMES = 200", "FRAMES = 20"), "memory.py", "exec"), here)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in (ROOT / "docs" / "images").glob("memory-*.png") if "maze" not in path.name}
    far = [here["influence"](mixer)[-1] for mixer in ("hybrid", "window")]
    assert far[0] > 1e-3 and far[1] == 0 == here["influence"]("hybrid", long_memory=False)[-1]


def test_the_environment_of_the_page_is_fit_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks("docs/environments.md")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_envs.py").write_text(block)
    sys.modules.pop("my_envs", None)
    assert cli.main(["check-env", "my_envs:Corridor-v0", "--steps", "60"]) == 0
    assert cli.main(["train", "tiny", "--env", "my_envs:Corridor-v0", *SHORT]) == 0
    sys.modules.pop("my_envs")
