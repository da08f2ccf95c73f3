"""V and M from recordings, without an environment: from the command line to what is written, and exactly resumed."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from longdream.agent.cli import main as cli
from longdream.agent.config import checks, options
from longdream.agent.config.schema import Config
from longdream.agent.data.video.library import open_library
from longdream.agent.evaluation.tables import summary_table
from longdream.agent.run import checkpoint
from longdream.agent.run import folder as run_folder
from longdream.agent.run.signals import Interrupted
from longdream.agent.train import video as train_video
from longdream.agent.train.video import ClipLearner, VideoTrainer, load_model
from longdream.envs.contract import UserError

SHORT = {"learn.updates": 8, "learn.warmup": 3, "evaluate.times": 2, "video.held_out_clips": 2}


def tiny(data: Path, **settings: Any) -> Config:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return options.update(options.load("video-tiny"), SHORT | {"video.data": str(data)} | named)


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics, without what the clock on the wall says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def without_clock(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in summary.items() if key not in ("wall_s", "video", "picture")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line(mazes: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [part for key, value in SHORT.items() for part in (f"--{key}", str(value))]
    assert cli.main(["train", "video-tiny", "--data", str(mazes), "--name", "clips", "--json", *flags]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert printed.out.count("\n") == 1 and "5 recordings to learn from, 1 held out" in printed.err
    assert summary == json.loads(Path("runs/clips/summary.json").read_text()) | {"run": "runs/clips"}
    assert summary["updates"] == 11 and summary["frames"] == 11 * 16 and summary["layout"] == "memory-maze"
    ways = ("reconstruction", "one_step", "open_loop", "still")
    assert all(0 < summary[f"psnr_{way}"] < 60 and len(summary["curves"][way]) == 4 for way in ways)
    lines = record(Path("runs/clips"))
    assert [line["step"] for line in lines] == [*range(1, 12), 11]
    assert [line["step"] for line in lines if "held_out/psnr_open_loop" in line] == [4, 8]
    assert [line.get("count/length") for line in lines] == [4] * 7 + [8] * 4 + [None]
    assert "model/prediction" not in lines[2]
    assert {"model/prediction", "model/reward", "encoder/psnr"} <= lines[3].keys()
    assert "final/psnr_open_loop" in lines[-1] and (Path("runs/clips") / "tensorboard").is_dir()
    assert iio.imread(summary["picture"]).shape[2] == 3 and len(iio.imread(summary["video"])) == 2 * 7
    # it runs again from its own config, and goes on
    assert options.load("runs/clips/config.yaml").video.data == str(mazes)
    assert cli.main(["train", "--resume", "runs/clips", "--learn.updates", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 12
    model, config, spec, updates = load_model("runs/clips")
    assert updates == 12 and config.video.size == 16 and spec.action.size == 6
    assert model.encoder.tokens == 1
    for words in (["evaluate"], ["dream"]):  # nobody acts in it
        assert cli.main([*words, "runs/clips"]) == 2
        assert "was trained on video" in capsys.readouterr().err
    assert cli.main(["train", "--world", "runs/clips"]) == 2
    assert "runs/clips was trained on video: it has no replay" in capsys.readouterr().err


def test_v_is_frozen_on_request(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(tree: dict[str, Any], part: str) -> list[torch.Tensor]:
        return [value for key, value in tree["weights"]["model"].items() if key.startswith(f"{part}.")]

    keep = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda root, step, tree: keep(root, step, tree, keep=100))
    for freeze in (True, False):
        folder = tmp_path / f"freeze-{freeze}"
        VideoTrainer.train(tiny(mazes, video__freeze=freeze, evaluate__save_seconds=0.0), folder, console=False)
        saved = [checkpoint.load(path)[0] for path in sorted((folder / "checkpoints").iterdir())]
        begun, warm, end = (next(t for t in saved if t["counters"]["updates"] == n) for n in (1, 3, 11))
        same = [torch.equal(*pair) for pair in zip(weights(warm, "encoder"), weights(end, "encoder"), strict=True)]
        assert all(same) == freeze
        assert all(map(torch.equal, weights(begun, "dynamics"), weights(warm, "dynamics")))
        assert not all(map(torch.equal, weights(warm, "dynamics"), weights(end, "dynamics")))
    assert "encoder/psnr" not in record(tmp_path / "freeze-True")[-2]


def test_v_of_another_run(mazes: Path, tmp_path: Path) -> None:
    def weights(folder: Path) -> list[torch.Tensor]:
        return list(load_model(folder)[0].encoder.state_dict().values())

    first, second = tmp_path / "first", tmp_path / "second"
    VideoTrainer.train(tiny(mazes), first, console=False)
    taken = {"video.encoder": str(first), "video.freeze": True, "learn.warmup": 0, "seed": 1, "video.keep": "memory"}
    summary = VideoTrainer.train(options.update(tiny(mazes), taken), second, console=False)
    assert all(map(torch.equal, weights(first), weights(second))) and summary["updates"] == 8
    for wrong, problem in (
        ({"encoder.depth": 8}, "its encoder.* and video.size must be those of this run"),
        ({"video.size": 32}, "its encoder.* and video.size must be those of this run"),
        ({"video.encoder": "nowhere"}, "nowhere: there is no such run"),
        ({"learn.warmup": 2}, "set video.freeze to true and learn.warmup to 0"),
        ({"video.retrace": 0.5}, "set video.condition to pose"),
    ):
        with pytest.raises(UserError, match=re.escape(problem)):
            config = options.update(tiny(mazes), taken | wrong)
            checks.check(config)
            VideoTrainer.train(config, tmp_path / "third", console=False)


def test_it_learns_what_actions_do(tmp_path: Path) -> None:
    """Shades that grow darker or lighter as actions say, which only who is told the right action can foresee."""
    rng = np.random.default_rng(0)
    (tmp_path / "films").mkdir()
    for i in range(8):
        led = rng.integers(2, size=40)  # 0 darker, 1 lighter
        level = [128]
        for step in 2 * led[1:] - 1:
            level.append(int(np.clip(level[-1] + 30 * step, 38, 218)))
        frames = np.broadcast_to(np.array(level)[:, None, None, None], (40, 16, 16, 3)).astype(np.uint8)
        np.savez(tmp_path / "films" / f"{i}.npz", video=frames, actions=led)
    settings = {"learn.updates": 200, "learn.warmup": 80, "learn.encoder_rate": 5e-3, "learn.model_rate": 5e-3}
    settings |= {"video.frames": 64, "video.lengths": (8,), "learn.encoder_rows": 64, "worldmodel.width": 32}
    settings |= {"evaluate.times": 0, "video.held_out_clips": 16, "learn.decay": 0.1}
    summary = VideoTrainer.train(options.update(tiny(tmp_path / "films"), settings), tmp_path / "run", console=False)
    assert summary["layout"] == "teco" and summary["psnr_reconstruction"] > 27
    assert summary["psnr_one_step"] > summary["psnr_still"] + 6
    assert not any("model/reward" in line for line in record(tmp_path / "run"))  # there are none


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, (3, 4, 8)),  # evaluations are at 4 and 8
        ({"video.carry": True}, (7,)),
        ({"video.carry": True, "forcing.history": "noisy", "video.freeze": True}, (2,)),
    ],
    ids=["clips", "carried", "noisy history"],
)
def test_resumed_is_uninterrupted(
    settings: dict, stops: tuple[int, ...], mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda root, step, tree: keep(root, step, tree, keep=100))
    damaged = mazes / "episode-1.npz"
    data = bytearray(damaged.read_bytes())
    at = data.find(b"image.npy") + 60_000
    data[at : at + 2000] = bytes(2000)
    damaged.write_bytes(data)
    config = options.update(tiny(mazes), {"evaluate.save_seconds": 0.0} | settings)
    summary = VideoTrainer.train(config, tmp_path / "whole", console=False)
    assert summary["damaged"] == 1
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "summary.json").unlink()
        for path in (folder / "checkpoints").iterdir():
            if int(path.name.split("_")[1].partition(".")[0]) > stop:
                shutil.rmtree(path)
        again = VideoTrainer.train(config, folder, resume=True, console=False)
        assert without_clock(again) == without_clock(summary)
        assert record(folder) == record(tmp_path / "whole")
        assert VideoTrainer.train(config, folder, resume=True, console=False) == again  # done is done


def test_a_signal_saves_first(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(mazes)
    summary = VideoTrainer.train(config, tmp_path / "whole", console=False)
    real = ClipLearner.update

    def update(self, *args: Any) -> Any:
        if self.updates == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ClipLearner, "update", update)
        VideoTrainer.train(config, tmp_path / "stopped", console=False)
    assert run_folder.open_run(tmp_path / "stopped").saved[1] == 7
    again = VideoTrainer.train(config, tmp_path / "stopped", resume=True, console=False)
    assert without_clock(again) == without_clock(summary) and record(tmp_path / "stopped") == record(tmp_path / "whole")


def test_stopped_in_an_evaluation(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation that a signal ends is made again, and is in the record once."""
    config = tiny(mazes)
    summary = VideoTrainer.train(config, tmp_path / "whole", console=False)
    real, stopped = train_video.evaluate_open_loop, []

    def evaluate(learner: ClipLearner, *args: Any) -> Any:
        if learner.updates not in stopped:
            stopped.append(learner.updates)
            signal.raise_signal(signal.SIGTERM)
        return real(learner, *args)

    monkeypatch.setattr(train_video, "evaluate_open_loop", evaluate)
    for resume in (False, True, True):
        with pytest.raises(Interrupted):
            VideoTrainer.train(config, tmp_path / "stopped", resume=resume, console=False)
    again = VideoTrainer.train(config, tmp_path / "stopped", resume=True, console=False)
    assert stopped == [4, 8, 11] and without_clock(again) == without_clock(summary)
    assert record(tmp_path / "stopped") == record(tmp_path / "whole")


def test_a_run_can_be_made_longer(mazes: Path, tmp_path: Path) -> None:
    """Lines and evaluations go on, evenly over what is now the whole."""
    VideoTrainer.train(tiny(mazes), tmp_path / "run", console=False)
    longer = tiny(mazes, learn__updates=21)
    assert VideoTrainer.train(longer, tmp_path / "run", resume=True, console=False)["updates"] == 24
    lines = record(tmp_path / "run")
    assert [line["step"] for line in lines if "count/updates" in line] == list(range(1, 25))
    assert [line["step"] for line in lines if "held_out/psnr_open_loop" in line] == [4, 8, 16]


def test_other_recordings_are_refused(mazes: Path, tmp_path: Path) -> None:
    config = tiny(mazes, learn__updates=1)
    VideoTrainer.train(config, tmp_path / "run", console=False)
    (mazes / "episode-3.npz").unlink()
    more = options.update(config, {"learn.updates": 2})
    with pytest.raises(UserError, match="holds other recordings than when"):
        VideoTrainer.train(more, tmp_path / "run", resume=True, console=False)


def test_nothing_is_evaluated_where_nothing_is_held_out(mazes: Path, tmp_path: Path) -> None:
    summary = VideoTrainer.train(tiny(mazes, video__held_out_clips=0), tmp_path / "run", console=False)
    assert summary["held_out"] == 0 and "psnr_open_loop" not in summary and not (tmp_path / "run" / "videos").exists()
    summary_table(summary)


# -- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("train video-tiny", "learn from what? Name a folder of recordings: --data DIR"),
    ("train video-tiny --data nowhere", "nowhere: there is no such folder"),
    ("train video-tiny --data empty", "empty holds no recordings of a layout that is known"),
    ("train video-tiny --data mazes --layout teco", "unknown flag --layout: did you mean --video.layout?"),
    ("train video-tiny --data mazes --video.layout tecco", "did you mean teco?"),
    ("train video-tiny --data mazes --video.layout mp4", "mazes holds no recordings of layout mp4"),
    ("train video-tiny --data mazes --video.lengths 4,32 --video.frames 64", "clips of 32 rows are asked for"),
    ("train video-tiny --data mazes --video.lengths 1", "--video.lengths ['1']: must be at least 2"),
    ("train video-tiny --data mazes --video.lengths 32", "video.frames = 16 frames per update hold no clip of 32"),
    ("train video-tiny --data mazes --video.horizon 40", "video.context + video.horizon = 43 rows"),
    (
        "train video-tiny --data mazes --env CartPole-v1",
        "--env.id means nothing to a run of kind video, only to online",
    ),
    ("train video-tiny --data mazes --controller.gamma 0.9", "--controller.gamma means nothing to a run of kind video"),
    ("train video-tiny --data mazes --evaluate.every 9", "--evaluate.every means nothing to a run of kind video"),
    ("train video-tiny --data mazes --steps 9", "--learn.steps means nothing to a run of kind video"),
    ("train video-tiny --data mazes --encoder.grid 16", "image of 16 x 16: encoder.grid = 16 needs"),
    ("train tiny --data mazes", "--video.data means nothing to a run of kind online, only to video: name a preset"),
]


@pytest.mark.parametrize(("line", "problem"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_in_one_line(
    line: str, problem: str, mazes: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    assert cli.main(line.split(" ")) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith("longdream: ") and problem in shown
    assert not (here / "runs").exists()


def test_a_damaged_file_is_named_once(mazes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (mazes / "episode-0.npz").write_bytes(b"PK")
    summary = VideoTrainer.train(tiny(mazes), tmp_path / "run")
    assert capfd.readouterr().err.count(f"warning: {mazes}/episode-0.npz is damaged or no NPZ file") == 1
    assert summary["damaged"] == 1 and all(line.get("count/damaged", 1) == 1 for line in record(tmp_path / "run"))


def test_held_out_recordings_that_are_damaged_end_no_run(mazes: Path, tmp_path: Path, capfd) -> None:
    (held_out,) = open_library(mazes).held_out(train_video.HELD_OUT)[1]
    episode = dict(np.load(held_out.path))
    np.savez(held_out.path, **episode | {"action": np.ones((12, 6))})
    summary = VideoTrainer.train(tiny(mazes), tmp_path / "run")
    assert summary["updates"] == 11 and summary["damaged"] == 1 and "psnr_open_loop" not in summary
    assert f"{held_out.name} has an 'action' that is no one-hot" in (told := capfd.readouterr().err)
    assert "warning: none of the held-out recordings can be read: nothing is evaluated" in told
