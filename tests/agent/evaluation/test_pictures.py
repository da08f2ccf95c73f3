"""What an evaluation shows is what was drawn, in TensorBoard and as files; and it changes nothing in training."""

import io
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longdream.agent.config import options
from longdream.agent.config.schema import EnvConfig
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation.comparison import compare
from longdream.agent.evaluation.pictures import ROWS, drawings, evaluation_pictures, moving, path, still
from longdream.agent.run.folder import load_agent
from longdream.agent.run.logger import PICTURES, Logger
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs import World


def frames_of(data: bytes) -> np.ndarray:
    return iio.imread(io.BytesIO(data), index=None)


def test_tensorboard_gives_back_what_evaluations_showed(tmp_path: Path) -> None:
    settings = {"learn.steps": 220, "evaluate.every": 100, "evaluate.final_episodes": 2, "log.to": ("tensorboard",)}
    config = options.update(options.load("tiny"), settings)
    OnlineTrainer.train(config, tmp_path / "run", console=False)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0}).Reload()
    names = ("dream", "reconstruction", "surprise")
    assert set(events.Tags()["images"]) == {f"pictures/{name}" for name in names}
    for name in names:
        shown = events.Images(f"pictures/{name}")
        assert len(shown) == 3 and [event.step for event in shown] == sorted(event.step for event in shown)
        for event in shown:
            frames = frames_of(event.encoded_image_string)
            assert frames.shape[-3:] == (event.height, event.width, 3)
            assert frames.std() > 5  # something is drawn
            if name == "dream":
                assert event.encoded_image_string[:3] == b"GIF" and len(frames) >= 5
                assert (frames[0] != frames[-1]).any()
        (file,) = (tmp_path / "run" / PICTURES).glob(f"{name}.*")
        assert file.read_bytes() == shown[-1].encoded_image_string  # the newest is there for `longdream watch`


def test_a_film_shows_reality_and_dream_row_by_row(dream_runs: Callable[[str], Path]) -> None:
    agent, _ = load_agent(dream_runs("images"))
    config = agent.config
    world = World(config.env.id, 1, 3, config.env.kwargs)
    comparison = compare(agent, world, 4, ROWS, 3)
    drawn = drawings(comparison)
    frames = frames_of(drawn["dream"].data)
    assert len(frames) == len(comparison)
    side = 16 * (96 // 16)
    real = frames[:, 20 : 20 + side : 6, 20 : 20 + side : 6]  # GIF has 256 colours
    assert abs(real.astype(int) - comparison.real["obs"]).mean() < 12
    assert comparison.surprise is not None and comparison.surprise.shape == (len(comparison), 3)
    assert (comparison.surprise[0] == 0).all() and (comparison.surprise >= 0).all()
    world.close()


@pytest.mark.parametrize(
    ("run", "names"), [("vectors", {"dream", "surprise"}), ("mixed", {"dream", "reconstruction", "surprise"})]
)
def test_numbers_are_drawn_as_lines(dream_runs: Callable[[str], Path], run: str, names: set[str]) -> None:
    agent, _ = load_agent(dream_runs(run))
    pictures = evaluation_pictures(agent, agent.config.env, 0, True)
    assert set(pictures) == names and pictures["dream"].data[1:4] == (b"PNG" if run == "vectors" else b"IF8")


def test_an_evaluation_changes_no_random_stream(dream_runs: Callable[[str], Path]) -> None:
    agent, _ = load_agent(dream_runs("images"))
    config = agent.config
    before, steps = torch.get_rng_state(), agent.dream_steps
    one, two = (evaluation_pictures(agent, config.env, 7, False) for _ in range(2))
    assert one == two and torch.equal(before, torch.get_rng_state()) and agent.dream_steps == steps


def test_an_episode_that_is_over_at_once_has_pictures_too(dream_runs: Callable[[str], Path]) -> None:
    agent, _ = load_agent(dream_runs("vectors"))
    config = agent.config
    env = EnvConfig(config.env.id, {"max_episode_steps": 2})
    assert set(evaluation_pictures(agent, env, 0, True)) == {"dream", "surprise"}


def test_a_maze_run_draws_its_path() -> None:
    settings = {"env.id": "longdream/FastMemoryMaze-9x9-v0", "env.kwargs": {"max_episode_steps": 30}}
    config = options.update(options.load("tiny"), settings)
    world = World(config.env.id, 1, 0, config.env.kwargs)
    pictures = evaluation_pictures(Agent(config, world.spec), config.env, 0, False)
    world.close()
    assert set(pictures) == {"dream", "reconstruction", "surprise", "path"}
    assert frames_of(pictures["path"].data).shape == (*pictures["path"][1:], 3)


def test_the_path_lies_where_the_agent_was() -> None:
    layout = np.ones((9, 9), np.uint8)
    places = [(0.5 + t / 10, 8.5) for t in range(70)]  # along the upper edge of the map

    def drawn(reward: np.ndarray, targets: np.ndarray) -> np.ndarray:
        probes = [
            {
                "maze_layout": layout,
                "agent_pos": np.array(place),
                "targets_pos": targets,
                "target_index": np.int64(0),
                "target_color": np.array([1.0, 0.0, 0.0]),
            }
            for place in places
        ]
        return path(probes, reward).astype(int)

    away = np.array([[4.5, 0.5], [8.5, 0.5]])
    plain = drawn(np.zeros(70), away)
    height = len(plain)
    upper, middle = plain[: height // 4, :, :], plain[height // 3 : 2 * height // 3]
    colourful = [np.ptp(part, axis=-1).max() for part in (upper, middle)]
    assert colourful[0] > 80 > 20 > colourful[1]
    red = np.argwhere((plain[..., 0] > 200) & (plain[..., 1] < 60))
    assert len(red) > 50 and red[:, 0].mean() > 0.8 * height  # the prompted target, at the foot of the map
    reward = np.zeros(70)
    reward[35] = 1
    star = np.argwhere((drawn(reward, away) != plain).any(-1))
    star = star[star[:, 0] > 30]  # below the title, which counts them
    assert abs(star[:, 1].mean() / plain.shape[1] - 0.45) < 0.1 and star[:, 0].mean() < height / 4


@pytest.mark.parametrize("room", [True, False])
def test_pictures_are_files_of_the_run(tmp_path: Path, room: bool, capsys) -> None:
    picture = still(np.full((8, 10, 3), 77, np.uint8))
    film = moving([np.full((8, 10, 3), shade, np.uint8) for shade in (10, 200)])
    assert picture[1:] == (8, 10) and frames_of(film.data).shape == (2, 8, 10, 3)
    if not room:
        (tmp_path / "videos").write_text("not a folder")
    with Logger(tmp_path, sinks=()) as logger:
        logger.draw(3, {"still": picture, "film": film})
    if room:
        assert (tmp_path / PICTURES / "still.png").read_bytes() == picture.data
        assert (tmp_path / PICTURES / "film.gif").read_bytes() == film.data
    else:  # what only shows something ends no run
        assert "the run goes on without" in capsys.readouterr().err
