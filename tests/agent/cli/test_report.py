"""Dream beside reality: what is compared, what is drawn, what the files hold; the table and the demo."""

import dataclasses
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longdream.agent.cli import report
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation.comparison import PSNR_CAP, Comparison, compare, steps_to_show
from longdream.agent.evaluation.plots import CONTEXT, IMAGINED, _plots, film, save_film, sheet
from longdream.agent.evaluation.tables import summary_table
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError
from longdream.envs.make import World

SHORT = {
    "learn.steps": 60,
    "learn.prefill": 40,
    "learn.warmup": 2,
    "evaluate.final_episodes": 4,
    "evaluate.every": 0,
}


def tiny(**settings) -> Config:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return options.update(options.load("tiny"), SHORT | named)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in Recall, which shows images."""
    folder = tmp_path_factory.mktemp("runs") / "images"
    OnlineTrainer.train(tiny(), folder, console=False)
    return folder


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in CartPole, which shows four numbers."""
    folder = tmp_path_factory.mktemp("runs") / "vectors"
    OnlineTrainer.train(tiny(env__id="CartPole-v1", env__kwargs={}), folder, console=False)
    return folder


def longest_run(picture: np.ndarray, colour: tuple[int, int, int], tolerance: int = 40) -> int:
    """The height in pixels of the highest column piece in that colour, as far as H.264 kept it."""
    near = (np.abs(picture.astype(int) - colour).max(-1) <= tolerance).astype(int)
    height = best = np.zeros(near.shape[1], int)
    for row in near:
        height = (height + 1) * row
        best = np.maximum(best, height)
    return int(best.max())


# -- what is compared -------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """A controller whose actions are anybody's guess, but always the same in the same situation."""

    def act(self, feat: torch.Tensor, greedy: bool) -> torch.Tensor:
        return F.one_hot((feat.sum(-1) * 1e3).long() % 4, 4).float()


def test_a_dream_follows_the_real_actions_from_the_moment_where_context_ends() -> None:
    config = tiny()
    world = World(config.env.id, 1, 5, config.env.kwargs)
    agent = Agent(config, world.spec)
    for parameter in agent.model.parameters():  # heads begin at zero, and would expect the same of everything
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    agent.controller = Restless()
    short, long = (compare(agent, world, context, seed=3) for context in (2, 9))
    assert len(short) == len(long) > 10
    assert all((short.real[key] == long.real[key]).all() for key in short.real)  # the same episode
    assert np.ptp(short.expected[1:4]) > 1e-3  # there is something to mistake
    # M's expectation of a row rests on the real rows before it, up to the first row that is dreamt and that one too.
    np.testing.assert_allclose(short.expected[:3], long.expected[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(short.going_on[:3], long.going_on[:3], rtol=1e-4, atol=1e-5)
    assert not np.allclose(short.expected[4:10], long.expected[4:10], atol=1e-5)  # from there on, on a dream
    assert (short.dreamt["obs"][:2] == short.kept["obs"][:2]).all()
    assert (short.dreamt["obs"][2:9] != long.dreamt["obs"][2:9]).any()
    assert (long.dreamt["obs"][:9] == long.kept["obs"][:9]).all()
    again = compare(agent, world, 2, seed=3)
    assert all((getattr(again, part)["obs"] == getattr(short, part)["obs"]).all() for part in ("real", "dreamt"))


def test_rewards_and_observations_of_every_kind_arrive_in_their_rows() -> None:
    config = tiny(env__id="longdream/Counting-v0", env__kwargs={})
    world = World(config.env.id, 1, 0)
    comparison = compare(Agent(config, world.spec), world, context=1)
    time = comparison.real["time"]
    assert len(comparison) == 4  # the first episode of the first copy has three steps
    assert time[:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(comparison.reward[1:], time[1:, 0] + 0.001 * time[1:, 3], rtol=1e-6)
    assert comparison.reward[0] == 0 and comparison.alive.tolist() == [1, 1, 1, 0]
    assert comparison.keys(image=True) == [] and comparison.keys(image=False) == ["phase", "time"]
    assert comparison.dreamt["phase"].shape == (4,) and set(comparison.error("phase")) <= {0.0, 1.0}


def test_an_episode_may_be_cut_short_and_the_context_with_it() -> None:
    config = tiny(env__id="longdream/Counting-v0", env__kwargs={})
    world = World(config.env.id, 1, 0)
    agent = Agent(config, world.spec)
    assert len(compare(agent, world, context=2, frames=3)) == 3
    for context in (3, 4, 9):  # the first episode of the first copy has four rows
        world.reset()
        short = compare(Agent(config, world.spec), world, context=context)
        assert len(short) == 4 and short.context == 3 and len(short.to_json()["going_on"]["real"]) == 1
    for context, frames in ((3, 3), (0, 9)):
        with pytest.raises(UserError, match="context"):
            compare(agent, world, context=context, frames=frames)


def made(
    real: dict[str, np.ndarray], dreamt: dict[str, np.ndarray], spec: dict[str, ObsSpec], context: int
) -> Comparison:
    rows = len(next(iter(real.values())))
    lines = [np.linspace(0, 1, rows) for _ in range(4)]
    return Comparison(EnvSpec(spec, ActionSpec((2,))), context, real, real, dreamt, *lines)


def test_errors_have_their_hand_values() -> None:
    spec = {"eye": ObsSpec("image", (4, 4, 3)), "leg": ObsSpec("vector", (2,)), "gear": ObsSpec("discrete", (), 5)}
    real = {"eye": np.zeros((3, 4, 4, 3), np.uint8), "leg": np.zeros((3, 2), np.float32), "gear": np.array([1, 2, 3])}
    dreamt = {"eye": real["eye"] + np.uint8(51), "leg": np.array([[0, 0], [3, 4], [0, 1]]), "gear": np.array([1, 0, 3])}
    dreamt["eye"][0] = 0
    comparison = made(real, dreamt, spec, context=1)
    np.testing.assert_allclose(comparison.error("eye"), [PSNR_CAP, 20 * np.log10(5), 20 * np.log10(5)])
    np.testing.assert_allclose(comparison.error("leg"), [0, np.sqrt(12.5), np.sqrt(0.5)])
    assert comparison.error("gear").tolist() == [0, 1, 0]
    values = json.loads(json.dumps(comparison.to_json()))
    assert values["errors"]["gear"] == {"unit": "wrong", "dream": [1, 0], "v": [0, 0]}
    assert values["errors"]["eye"]["unit"] == "psnr_db" and values["errors"]["eye"]["v"] == [PSNR_CAP] * 2
    assert len(values["reward"]["expected"]) == len(values["reward"]["real"]) == 2


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_run_with_images_becomes_a_video_and_a_picture(images: Path) -> None:
    pytest.importorskip("av")
    result = json.loads(json.dumps(report.dream(images, context=3, frames=12, console=False)))
    assert {"run", "env", "env_steps", "seed", "denoising_steps", "video", "picture", "fps"} <= result.keys()
    (episode,) = result["episodes"]
    assert episode["frames"] == 12 and len(episode["errors"]["obs"]["dream"]) == 9
    assert result["video"] == str(images / "videos" / "dream.mp4")
    about = iio.immeta(result["video"], plugin="pyav")
    assert about["codec"] == "h264" and about["video_format"] == "yuv420p"
    frames = iio.imread(result["video"], plugin="pyav")
    assert frames.shape[0] == 12 and frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    for t, frame in enumerate(frames):  # the frame round the dream; the timeline below it is flat
        blue, orange = (longest_run(frame, colour) for colour in (CONTEXT, IMAGINED))
        assert (blue > 150 and orange < 60) if t < 3 else (orange > 150 and blue < 60), f"frame {t}: {blue}, {orange}"
    picture = iio.imread(result["picture"])
    assert picture.ndim == 3 and longest_run(picture, CONTEXT, 0) > 80 and longest_run(picture, IMAGINED, 0) > 80


def test_a_run_with_vectors_becomes_plots_that_unfold(vectors: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    result = report.dream(
        vectors, episodes=2, context=2, frames=8, seed=4, out=tmp_path / "new" / "x.mp4", console=False
    )
    frames = iio.imread(tmp_path / "new" / "x.mp4", plugin="pyav")
    assert len(frames) == sum(episode["frames"] for episode in result["episodes"]) == 16
    assert (
        longest_run(frames[1], CONTEXT, 60) > 60 > longest_run(frames[5], CONTEXT, 60)
    )  # the line at the present step
    assert longest_run(frames[5], IMAGINED, 60) > 60 > longest_run(frames[1], IMAGINED, 60)
    assert result["episodes"][0]["errors"]["obs"]["unit"] == "rms"
    one, two = iio.imread(tmp_path / "new" / "x.png"), frames[0]
    assert one.shape[0] == 2 * two.shape[0] and one.shape[1] == two.shape[1]  # both episodes, one below the other


def test_how_far_numbers_are_from_reality_is_drawn_too() -> None:
    spec = {"leg": ObsSpec("vector", (2,)), "gear": ObsSpec("discrete", (), 5)}
    real = {"leg": np.zeros((9, 2), np.float32), "gear": np.zeros(9, np.int64)}
    near, far = (made(real, {"leg": real["leg"] + x, "gear": real["gear"]}, spec, context=2) for x in (0, 1))
    (picture, places), (other, _) = (_plots(comparison, "title") for comparison in (near, far))
    assert len(places) == 3 + 2 + 2  # entries, differences, reward and end
    drawn = [(picture[rows, columns] != other[rows, columns]).any() for rows, columns, _ in places]
    assert drawn == [True, True, False, True, False, False, False]


@pytest.mark.parametrize(("shape", "frames"), [((16, 16, 1), 3), ((33, 70, 3), 30), ((300, 200, 4), 17)])
def test_images_of_any_size_are_drawn(shape: tuple[int, int, int], frames: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spec = {"eye": ObsSpec("image", shape), "back": ObsSpec("image", (20, 20, 3)), "leg": ObsSpec("vector", (14,))}
    real = {key: rng.integers(0, 256, (frames, *s.shape)).astype(s.dtype) for key, s in spec.items()}
    comparison = made(real, real, spec, context=2)
    picture = sheet(comparison, "title")
    assert (
        picture.dtype == np.uint8 and longest_run(picture, CONTEXT, 0) > 50 and longest_run(picture, IMAGINED, 0) > 50
    )
    assert picture.shape[1] < 2000 and sheet(comparison, "title", 30).shape[1] > picture.shape[1] * (frames > 16)
    assert save_film(tmp_path / "x.gif", film(comparison, "title"), 5) == frames
    assert len(iio.imread(tmp_path / "x.gif", index=None)) == frames


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (15, 14), (17, 14), (400, 14), (3, 14), (20, 4)])
def test_a_picture_shows_each_row_once(rows: int, columns: int) -> None:
    spec = {"eye": ObsSpec("image", (16, 16, 3))}
    values = np.stack((*np.divmod(np.arange(rows), 256), np.zeros(rows)), -1).astype(np.uint8)
    real = {"eye": np.broadcast_to(values[:, None, None], (rows, 16, 16, 3))}
    picture = sheet(made(real, real, spec, context=2), "", columns)
    line = picture[76 + 48]  # through the middle of the first row of images
    shown = [int(line[x, 0]) * 256 + int(line[x, 1]) for x in range(140 + 48, line.shape[0], 96 + 10)]
    assert len(shown) == len(set(shown)) <= columns and shown == sorted(shown)
    assert shown[0] == 0 and shown[-1] == rows - 1
    assert len(shown) == rows or len(shown) >= columns - 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"episodes": 0},
        {"seed": -1},
        {"steps": 0},
        {"fps": 0.0},
        {"out": Path("x.avi")},
        {"context": 500},
        {"frames": 4},
    ],
)
def test_values_that_cannot_be_used_are_refused(images: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        report.dream(images, **wrong)


def test_no_run_and_nothing_saved_in_it_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        report.dream(tmp_path / "nothing")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text((images / "config.yaml").read_text())
    with pytest.raises(UserError, match="no checkpoint"):
        report.dream(tmp_path / "begun")


# -- the table and the demo -------------------------------------------------------------------------------------------

SUMMARY = {
    "return_mean": -0.001,
    "return_ci95": [-1234.5, 0.25],
    "episodes": 200,
    "env": "My/Env-v0",
    "env_steps": 12345,
}


def test_the_table_is_plain_off_a_terminal(capsys: pytest.CaptureFixture) -> None:
    summary_table(SUMMARY | {"random_mean": 0.5, "chance": None, "dream_steps": 1234567, "wall_s": 125.4})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "My/Env-v0"
    words = [line.split() for line in lines[1:]]
    assert words[0][:7] == ["return", "0.00", "95%", "interval", "-1,234", "to", "0.25,"]
    assert ["random", "actions", "0.50"] in words and ["real", "steps", "12,345"] in words
    assert ["time", "2", "min", "05", "s"] in words
    assert any("1,234,567" in line for line in lines) and not any("chance" in line for line in lines)
    assert all(line.isascii() for line in lines)


def test_the_table_is_drawn_on_a_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    summary_table(SUMMARY)
    out = capsys.readouterr().out
    assert "\x1b[" in out and "│" in out and "12,345" in out


def test_the_demo_trains_and_dreams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(tiny(), seed=7)
    (tmp_path / "small.yaml").write_text(options.dump(config))
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    summary = json.loads(json.dumps(report.demo("small.yaml", seed=2)))
    assert summary["run"] == "runs/demo-2" and summary["seed"] == 2
    assert summary["chance"] == pytest.approx(1 / 3) and summary["optimum"] == 1
    learned = summary["updates"] - config.learn.warmup
    assert (
        summary["dream_steps"]
        == learned * config.replay.batch * config.controller.imagination_starts * config.controller.horizon
        > 0
    )
    assert {"return_mean", "return_ci95", "random_mean", "without_memory_mean", "env_steps", "wall_s"} <= summary.keys()
    assert all((tmp_path / summary[key]).stat().st_size > 1000 for key in ("video", "picture"))
    out = capsys.readouterr().out
    assert all(str(summary[key]) in out for key in ("run", "video", "picture"))
    assert "without long memory" in out and "longdream dream runs/demo-2" in out


# -- what a new user sees ---------------------------------------------------------------------------------------------


def test_an_earlier_dream_is_kept(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("av")
    results = [report.dream(vectors, frames=6, seed=seed) for seed in (0, 1)]
    names = [Path(result[key]).name for result in results for key in ("video", "picture")]
    assert (
        names == ["dream.mp4", "dream.png", "dream-2.mp4", "dream-2.png"] and "replaced" not in capsys.readouterr().out
    )
    assert all(Path(result["video"]).exists() for result in results)
    for _ in range(2):  # a name that was given is taken, and it is said
        report.dream(vectors, frames=6, out=tmp_path / "x.gif")
    assert capsys.readouterr().out.count(f"{tmp_path / 'x.gif'} (replaced)") == 1


@pytest.mark.parametrize(
    ("settings", "shown"),
    [({}, 4), ({"forcing__steps": 8}, 8), ({"forcing__objective": "mask"}, 4), ({"forcing__objective": "teacher"}, 1)],
)
def test_a_dream_is_shown_in_several_denoising_steps(settings: dict, shown: int) -> None:
    config = tiny(**settings)
    world = World(config.env.id, 1, 0, config.env.kwargs)
    assert steps_to_show(Agent(config, world.spec).model.objective, config.forcing.steps) == shown
