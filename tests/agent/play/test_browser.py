"""Both pages in a real browser: Chromium of the system, driven by Playwright. Skipped where one of them is missing."""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longdream.agent.config import options
from longdream.agent.train.trainer import OnlineTrainer

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt install chromium)")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
expect = playwright.expect

SEEING = {
    "env.kwargs": {"corridor": 3, "doors": 2, "size": 16}, "learn.steps": 700, "learn.prefill": 400,
    "learn.warmup": 150, "learn.warmup_model": 250, "replay.batch": 16, "replay.length": 10, "encoder.channels": 16,
    "encoder.depth": 8, "worldmodel.width": 32, "learn.encoder_rows": 160, "evaluate.every": 0,
    "evaluate.final_episodes": 2, "log.to": ("tensorboard",),
}  # fmt: skip
"""Enough for V and M to see, in some seconds."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "seeing"
    OnlineTrainer.train(options.update(options.load("tiny"), SEEING), folder, console=False)
    return folder


@pytest.fixture(scope="module")
def server(served, run: Path):
    with served("play", run, "--port", "0") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with playwright.sync_playwright() as driver:
        profile = str(tmp_path_factory.mktemp("profile"))
        window = {"width": 1180, "height": 900}
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=FLAGS, viewport=window
        )
        yield context
        context.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A new tab in which nothing goes wrong: no script fails, and the policy forbids nothing that the page does."""
    problems = []
    page = browser.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    lost = "ERR_CONNECTION_REFUSED"  # the test that ends the server
    assert [problem for problem in problems if lost not in problem] == []


def opened(page, address: str):
    page.goto(address)
    expect(page.locator("#pad button").first).to_be_visible(timeout=30_000)
    expect(page.locator("#moment")).to_have_text("0")
    return page


def moment(page, number: int) -> None:
    expect(page.locator("#moment")).to_have_text(str(number))


def steps(page, *keys: str) -> None:
    """Press keys one after another, each once the step before is shown."""
    for key in keys:
        now = int(page.locator("#moment").inner_text().split()[0])
        page.keyboard.press(key)
        moment(page, now + 1)


PIXELS = """(id) => {
  const canvas = document.getElementById(id);
  return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
}"""


def pixels(page, name: str) -> list[int]:
    return page.evaluate(PIXELS, name)


def gap(page, one: str = "real", other: str = "dream") -> float:
    """Mean difference of two pictures on the page."""
    return statistics.mean(abs(a - b) for a, b in zip(pixels(page, one), pixels(page, other), strict=True))


def slide(page, name: str, value: float) -> None:
    page.locator(f"#{name}").fill(str(value))
    expect(page.locator(f"#{name}-text")).to_have_text(f"{value:g}")


def test_it_opens_and_keys_move_both_sides(page, server) -> None:
    opened(page, server.address)
    expect(page.locator("#title")).to_contain_text("seeing in longdream/Recall-v0")
    texts = page.locator("#pad button").all_inner_texts()
    assert [text.startswith(name) for text, name in zip(texts, ("forward", "door 1", "door 2"), strict=True)] == [
        True
    ] * 3
    before = [pixels(page, name) for name in ("real", "dream")]
    steps(page, "ArrowUp", "w")
    after = [pixels(page, name) for name in ("real", "dream")]
    assert all(a != b for a, b in zip(before, after, strict=True))
    page.locator("#pad button").first.click()  # as by touch
    moment(page, 3)
    meters = page.locator("#meter").inner_text().split("\n")
    assert {"end", "reward", "C's value", "forward", "door 1", "door 2"} <= set(meters)


def test_both_sides_agree_while_corrected_and_part_when_let_go(page, server) -> None:
    """In the corridor's end the doors come in a random order. M, corrected, has seen it; alone it cannot know."""
    opened(page, server.address)
    slide(page, "steps", 1)  # the mean of what may come
    junction = ["ArrowUp"] * 4

    def gaps() -> list[float]:
        values = []
        for _ in range(3):
            now = int(page.locator("#moment").inner_text())
            page.click("#start-episode")
            moment(page, now + 1)
            steps(page, *junction)
            values.append(gap(page))
        return values

    corrected = gaps()
    page.click("#eyes")
    expect(page.locator("#dream-name")).to_have_text("M's dream, alone")
    alone = gaps()
    page.click("#eyes")  # look again
    expect(page.locator("#dream-name")).to_have_text("M's dream, corrected")
    steps(page, "ArrowUp", "ArrowUp")
    again = gap(page)
    assert max(corrected) < 0.7 * min(alone) and again < 0.7 * min(alone)


@pytest.mark.parametrize("what", ["scan", "attention", "both"])
def test_forgetting_changes_what_is_dreamt_next(what: str, page, server) -> None:
    opened(page, server.address)
    page.click("#mode-dream")
    expect(page.locator("#side-real")).to_be_hidden()
    steps(page, "ArrowUp", "ArrowUp", "ArrowUp")
    dreamt = pixels(page, "dream")
    for forget in (False, True):
        page.click("#back")
        expect(page.locator("#moment")).to_have_text("2 of 3")
        if forget:
            page.click(f"#forget-{what}")
            expect(page.locator("#note")).to_contain_text("forgotten")
        page.keyboard.press("ArrowUp")
        moment(page, 3)
        expect(page.locator("#side-other")).to_be_visible()  # the same moment of the future before
        assert pixels(page, "other") == dreamt
        assert (pixels(page, "dream") != dreamt) == forget


def test_back_in_time_two_futures_and_their_exchange(page, server) -> None:
    opened(page, server.address)
    steps(page, *["ArrowUp"] * 4, "1")
    expect(page.locator("#state")).to_contain_text("over")
    page.locator("#time").fill("2")
    expect(page.locator("#moment")).to_have_text("2 of 5")
    expect(page.locator("#swap")).to_be_hidden()
    page.keyboard.press("2")
    moment(page, 3)
    expect(page.locator("#side-other")).to_be_visible()
    page.click("#swap")
    expect(page.locator("#moment")).to_have_text("3 of 5")
    page.locator("#time").fill("5")
    expect(page.locator("#state")).to_contain_text("over")


def test_the_agent_drives_and_time_goes_on(page, server) -> None:
    opened(page, server.address)
    slide(page, "speed", 20)
    page.click("#driver")
    expect(page.locator("#driver")).to_have_text("you drive")
    page.wait_for_timeout(500)
    assert int(page.locator("#moment").inner_text()) >= 3
    page.click("#play")
    expect(page.locator("#play")).to_have_text("play")
    number = int(page.locator("#moment").inner_text().split()[0])
    page.click("#step")
    moment(page, number + 1)


def test_a_recording_plays_and_is_an_episode(page, server, run: Path) -> None:
    opened(page, server.address)
    page.click("#record")
    expect(page.locator("#record")).to_have_text("stop and save")
    steps(page, "ArrowUp", "ArrowUp", "ArrowUp")
    page.click("#record")
    film = page.locator("#files video")
    expect(film).to_be_visible(timeout=30_000)
    page.wait_for_timeout(200)
    played = film.evaluate("(film) => film.play().then(() => [film.videoWidth, film.duration, film.error])")
    assert played[0] > 300 and played[1] > 0.3 and played[2] is None
    names = page.locator("#files a").all_inner_texts()
    assert [Path(name).parent.name for name in names] == ["videos", "recordings"]
    assert all(Path(name).is_relative_to(run) and Path(name).stat().st_size for name in names)


def test_a_second_tab_is_a_session_of_its_own(page, browser, server) -> None:
    opened(page, server.address)
    other = opened(browser.new_page(), server.address)
    steps(page, "ArrowUp", "ArrowUp")
    steps(other, "ArrowUp")
    moment(page, 2)
    page.reload()  # the same tab goes on where it was
    moment(page, 2)
    moment(other, 1)
    other.close()


def test_a_picture_to_begin_with(page, server, tmp_path: Path) -> None:
    import imageio.v3 as iio
    import numpy as np

    red = np.full((40, 60, 3), (230, 30, 30), np.uint8)
    iio.imwrite(tmp_path / "red.png", red)
    opened(page, server.address)
    page.set_input_files("#upload", tmp_path / "red.png")
    expect(page.locator("#dream-name")).to_have_text("M's dream, alone")
    moment(page, 1)
    assert pixels(page, "dream")[:3] == [230, 30, 30]
    (tmp_path / "no.png").write_text("no picture")
    page.set_input_files("#upload", tmp_path / "no.png")
    expect(page.locator("#error")).to_contain_text("no.png is no picture")


def test_a_lost_connection_comes_back(served, browser, run: Path) -> None:
    """The server ends and is started again: the page says so, and goes on in a new session."""
    page = browser.new_page()
    with served("play", run, "--port", "0") as first:
        address = first.address
        opened(page, address)
        steps(page, "ArrowUp")
    expect(page.locator("#state")).to_contain_text("connection lost")
    with served("play", run, "--port", address.rstrip("/").rpartition(":")[2]):
        expect(page.locator("#state")).to_have_text("", timeout=30_000)
        moment(page, 0)
        steps(page, "ArrowUp")
    page.close()


def test_a_key_held_through_a_lost_connection_still_counts(page, server) -> None:
    opened(page, server.address)
    page.keyboard.down("ArrowUp")
    moment(page, 2)
    page.evaluate("() => socket.close()")
    expect(page.locator("#state")).to_contain_text("connection lost")
    expect(page.locator("#state")).to_have_text("")
    now = int(page.locator("#moment").inner_text().split()[0])
    page.wait_for_function(f"() => parseInt(document.getElementById('moment').textContent) > {now + 2}")
    page.keyboard.up("ArrowUp")


def test_a_phone_shows_everything_in_its_width(page, server) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    opened(page, server.address)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    for name in ("#real", "#dream", "#pad button", "#eyes"):
        box = page.locator(name).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    page.locator("#pad button").first.click()
    moment(page, 1)


def test_the_map_of_a_maze_is_drawn_beside_what_is_read_of_it(page, server) -> None:
    """From what the server sends of a moment (test_probes.py), given here: walls in percent, rows from the top."""
    opened(page, server.address)
    expect(page.locator("#map-panel")).to_be_hidden()
    walls = [[100, 0, 0], [0, 0, 0], [0, 0, 0]]
    true = {"walls": walls, "targets": [[2.5, 0.5]]}
    moment = {"agent": [0.5, 0.5], "heading": [1, 0], "prompted": 0, "colour": [255, 0, 0], "true": true}
    page.evaluate("(maze) => map(maze)", moment)
    expect(page.locator("#map-true")).to_be_visible()
    expect(page.locator("#map-read")).to_be_hidden()
    read = {"walls": [[50, 0, 0], [0, 0, 0], [0, 0, 0]], "targets": [[2.5, 2.5]]}
    page.evaluate("(maze) => map(maze)", moment | {"read": read})
    expect(page.locator("#map-read")).to_be_visible()

    def colour(name: str, x: float, y: float) -> list[int]:
        """At (x, y) in cells, from the lower left corner of the maze, which has a frame of one cell around it."""
        everything = pixels(page, name)
        side = round((len(everything) / 4) ** 0.5)
        row, column = (int(side * place / 5) for place in (4 - y, x + 1))
        return everything[4 * (side * row + column) :][:3]

    wall, free, red = [110, 118, 129], [33, 38, 45], [255, 0, 0]
    assert [colour("map-true", *at) for at in ((0.5, 2.5), (1.5, 1.5), (2.5, 0.5))] == [wall, free, red]
    assert [colour("map-read", *at) for at in ((0.5, 2.5), (2.5, 0.5), (2.5, 2.5))] == [[72, 78, 87], free, red]


def test_frames_and_keys_are_quick(page, server) -> None:
    """Measured as docs/play.md says; the bounds are those of a machine that does much else."""
    opened(page, server.address)
    page.click("#mode-dream")
    slide(page, "steps", 1)
    slide(page, "speed", 60)
    page.evaluate("() => { measured.frames = 0; measured.latency = []; }")
    page.keyboard.down("ArrowUp")
    began = time.perf_counter()
    page.wait_for_timeout(3000)
    fps = page.evaluate("() => measured.frames") / (time.perf_counter() - began)
    page.keyboard.up("ArrowUp")
    slide(page, "speed", 30)
    page.evaluate("() => { measured.latency = []; }")
    for _ in range(20):
        page.keyboard.press("ArrowUp")
        page.wait_for_timeout(60)
    latency = statistics.median(page.evaluate("() => measured.latency"))
    print(json.dumps({"fps": round(fps, 1), "key_to_picture_ms": round(latency, 1)}))
    assert fps > 10 and latency < 300


def test_keys_of_boxes_and_the_mouse(served, browser, dream_runs: Callable[[str], Path]) -> None:
    page = browser.new_page()
    with served("play", dream_runs("box"), "--port", "0") as server:
        opened(page, server.address)
        steps(page, "ArrowRight")
        box = page.locator("#real").bounding_box()
        page.click("#play")
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.down()
        page.wait_for_timeout(500)
        page.mouse.up()
        page.click("#play")
        expect(page.locator("#play")).to_have_text("play")
        assert int(page.locator("#moment").inner_text()) > 2
    page.close()


def test_a_run_is_watched_while_it_trains(page, served, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("replay", "checkpoints", "summary.json"))
    shutil.copytree(folder, tmp_path / "runs" / "two")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:2]) + lines[2][:5])
    with served("watch", tmp_path / "runs", "--port", "0") as server:
        page.goto(server.address)
        expect(page.locator("#runs button")).to_have_count(2)
        one = page.locator("#runs button", has_text="one")
        before = one.inner_text()
        expect(page.locator("#pictures img").first).to_be_visible()
        for name in ("dream.gif", "reconstruction.png", "surprise.png"):
            image = page.locator(f"#pictures img[alt='{name}']").first
            assert image.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 50
        metrics.write_text("".join(lines))
        expect(one).not_to_have_text(before, timeout=10_000)
        assert page.locator("#curves canvas").count() > 10
        assert page.locator("canvas[data-key='episode/surprise']").count() == 1
        page.locator("#runs button", has_text="two").click()
        expect(page.locator("#pictures .pictures")).to_have_count(1)
