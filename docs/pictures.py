"""Makes the pictures of the pages again: `make pictures`, or some of them by `make pictures ARGS="play watch"`.

Each is made by the commands that its page names, in runs/pictures. What a machine cannot make is named with the reason.
Pictures of docs/history are records of earlier versions and stay as they are; vmc.svg is drawn by hand.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WORK = ROOT / "runs" / "pictures"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WIDE = {"width": 1180, "height": 860}
PHONE = {"width": 390, "height": 844}


class Missing(Exception):
    """This machine cannot make a picture; the message says why."""


def longdream(*words: str | Path) -> None:
    """Run a command of longdream; its name is printed."""
    arguments = list(map(str, words))
    print("longdream", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "longdream", *arguments], cwd=WORK, check=True)


def demo() -> Path:
    """The run that `make demo` trains, trained here if it is not there yet."""
    if not (WORK / "runs" / "demo" / "summary.json").exists():
        longdream("train", "quickstart", "--name", "demo")
    return WORK / "runs" / "demo"


# -- pages ------------------------------------------------------------------------------------------------------------


@contextmanager
def page_of(*words: str | Path) -> Iterator[Any]:
    """The page of `longdream play` or `longdream watch` in Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise Missing("playwright is not installed: pip install '.[dev]'") from None
    if CHROMIUM is None:
        raise Missing("there is no Chromium: apt install chromium")
    command = [sys.executable, "-m", "longdream", *map(str, words), "--port", "0", "--no-open"]
    print("longdream", *words, flush=True)
    process = subprocess.Popen(command, cwd=WORK, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        address = re.search(r"http://\S+", said)
        if address is None:
            raise Missing(said.strip())
        with sync_playwright() as driver, tempfile.TemporaryDirectory() as profile:
            browser = driver.chromium.launch_persistent_context(
                profile, executable_path=CHROMIUM, args=FLAGS, viewport=WIDE
            )
            page = browser.new_page()
            page.goto(address[0])
            yield page
            browser.close()
    finally:
        process.terminate()
        process.wait()


def press(page: Any, *keys: str) -> None:
    """Press keys, each once the step before is shown."""
    for key in keys:
        now = page.locator("#moment").inner_text()
        page.keyboard.press(key)
        page.wait_for_selector(f"#moment:not(:text-is('{now}'))")


def play() -> None:
    """At the doors: M has seen the sign, then nothing but the actions."""
    with page_of("play", demo()) as page:
        page.wait_for_selector("#pad button")
        press(page, *["ArrowUp"] * 4)
        page.click("#eyes")
        press(page, *["ArrowUp"] * 8)
        page.mouse.move(0, 0)
        page.screenshot(path=IMAGES / "play.png")
        page.set_viewport_size(PHONE)
        page.screenshot(path=IMAGES / "play-phone.png")


def play_maze() -> None:
    """The agent that comes with the program: it drives, and after a while M sees nothing but its actions."""
    with page_of("play", "memory-maze-9x9") as page:
        page.wait_for_selector("#pad button")
        page.click("#driver")
        press(page, *["Period"] * 60)
        page.click("#eyes")
        press(page, *["Period"] * 12)
        page.mouse.move(0, 0)
        page.screenshot(path=IMAGES / "play-maze.png", full_page=True)


def watch() -> None:
    demo()
    with page_of("watch", "runs/demo") as page:
        page.wait_for_selector("#curves canvas")
        page.wait_for_timeout(1500)  # pictures are decoded
        page.screenshot(path=IMAGES / "watch.png", full_page=True, clip={"x": 0, "y": 0, **WIDE, "height": 1100})


# -- everything else --------------------------------------------------------------------------------------------------


def dream() -> None:
    longdream("dream", demo(), "--out", WORK / "dream.mp4")
    shutil.copy(WORK / "dream.png", IMAGES / "dream.png")


def path() -> None:
    """What a run in Memory Maze draws at each evaluation, here of the scripted oracle."""
    import numpy as np

    from longdream.agent.evaluation.pictures import path as drawn
    from longdream.agent.evaluation.pictures import still
    from longdream.envs import World
    from longdream.envs.memory_maze.policies import Oracle

    world = World("longdream/FastMemoryMaze-9x9-v0", 1, 0)
    oracle = Oracle()
    oracle.reset(1)
    row = world.reset()
    probes = []
    rewards = []
    for _ in range(300):
        probes.append(world.probes())
        rewards.append(float(row.reward[0]))
        action = oracle.act({key: np.asarray(value)[None] for key, value in probes[-1].items()})
        row = world.step(np.eye(6, dtype=np.float32)[action])
    world.close()
    (IMAGES / "memory-maze-path.png").write_bytes(still(drawn(probes, np.array(rewards))).data)


def fidelity() -> None:
    sizes = ["--states", "130", "--approaches", "100", "--episodes", "0"]
    longdream("bench", "fidelity", *sizes, "--out", WORK / "fidelity")
    shutil.copy(WORK / "fidelity" / "fidelity-9x9.png", IMAGES / "fast-memory-maze.png")


def temperature() -> None:
    if not (WORK / "runs" / "quickstart-s1" / "summary.json").exists():
        longdream("train", "quickstart", "--seed", "1", "--name", "quickstart-s1")
    longdream("bench", "temperature", WORK / "runs" / "quickstart-s1", "--out", IMAGES / "temperature.png")


def world_model() -> None:
    """An hour or more on one GPU."""
    import torch

    if not torch.cuda.is_available():
        raise Missing("it trains M on long videos, which needs a GPU (docs/video.md)")
    data = WORK / "maze"
    if not data.exists():
        env = "longdream/FastMemoryMaze-9x9-v0"
        longdream("collect", "--env", env, "--policy", "navigator", "--episodes", "480", "--out", data)
    out = WORK / "world-model"
    mixers = "hybrid,causal,ssm+local,window"
    more = ["--seeds", "0", "--clips", "32", "--contexts", "", "--device", "cuda"]
    longdream("bench", "world-model", "--data", data, "--mixers", mixers, "--out", out, *more)
    shutil.copy(out / "retrieval.png", IMAGES / "world-model-curves.png")
    shutil.copy(out / "retrieval-s0-strip.png", IMAGES / "world-model-retrieval.png")


def memory() -> None:
    """What docs/memory.md shows, computed by the code that it is about."""
    subprocess.run([sys.executable, str(IMAGES / "memory.py"), str(IMAGES)], check=True)


RECIPES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "play": (play, ("play.png", "play-phone.png")),
    "watch": (watch, ("watch.png",)),
    "play-maze": (play_maze, ("play-maze.png",)),
    "dream": (dream, ("dream.png",)),
    "path": (path, ("memory-maze-path.png",)),
    "fidelity": (fidelity, ("fast-memory-maze.png",)),
    "temperature": (temperature, ("temperature.png",)),
    "world-model": (world_model, ("world-model-curves.png", "world-model-retrieval.png")),
    "memory": (memory, ("memory-scan.png", "memory-layers.png", "memory-forcing.png")),
}
"""What makes pictures, and which, by the name that is typed."""


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        print(f"unknown picture {unknown[0]!r}: there are {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    for name in names or RECIPES:
        make, files = RECIPES[name]
        try:
            make()
        except Missing as reason:
            print(f"{', '.join(files)}: not made: {reason}", file=sys.stderr)
            continue
        print(f"made {', '.join(files)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
