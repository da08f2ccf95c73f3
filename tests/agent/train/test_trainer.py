"""Training online: its schedule, its record, equal seeds, and rows where they belong, from environment to update."""

import json
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.core.actor import Carry
from longdream.agent.core.agent import Agent, Stage
from longdream.agent.evaluation.policy import evaluate_agent
from longdream.agent.run import folder as run_folder
from longdream.agent.run.logger import PICTURES, Logger
from longdream.agent.run.signals import Interrupted, Signals
from longdream.agent.train import trainer
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import Row
from longdream.envs.make import World
from longdream.envs.tasks.counting import episode_length, expected_reward, is_terminal


def tiny(**settings: Any) -> Config:
    """Preset tiny, shorter; names with __ for dots."""
    short = {"learn.steps": 140, "evaluate.final_episodes": 2}
    return options.update(options.load("tiny"), short | {key.replace("__", "."): v for key, v in settings.items()})


def record(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


# -- schedule and record ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, OnlineTrainer.train(tiny(), folder, console=False)


def test_summary(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert 140 <= summary["env_steps"] < 144 and summary["episodes"] == 2
    assert summary["env"] == "longdream/Recall-v0" and summary["seed"] == 0 and summary["wall_s"] > 0
    low, high = summary["return_ci95"]
    assert low <= summary["return_mean"] <= high


def test_updates_are_those_that_are_due(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    config = tiny()
    lines = [line for line in record(folder) if "count/updates" in line]
    began = next(line["step"] for line in lines if "encoder/grad_norm" in line)
    assert 60 <= began < 64  # prefill
    assert "model/grad_norm" not in next(
        line for line in lines if line["step"] == began and "encoder/grad_norm" in line
    )
    clip = config.replay.batch * config.replay.length
    for line in lines:
        due = config.learn.warmup + int((line["step"] - began) * config.learn.train_ratio / clip)
        assert line["count/updates"] == (due if line["step"] > began or "encoder/grad_norm" in line else 0)
    assert summary["updates"] == lines[-1]["count/updates"] > config.learn.warmup


def test_lines_come_by_steps(finished: tuple[Path, dict[str, Any]]) -> None:
    lines = record(finished[0])
    logged = [line["step"] for line in lines if "controller/actor" in line]
    assert [step // 50 for step in logged] == [2, 2]  # once past 100, and what was left at the end
    assert logged[-1] == finished[1]["env_steps"]
    evaluated = [line["step"] for line in lines if "evaluate/return_mean" in line]
    assert [step // 100 for step in evaluated] == [1]
    assert [line["step"] for line in lines if "final/return_mean" in line] == [finished[1]["env_steps"]]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    timed = [json.loads(text) for text in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    parts = {key for line in timed for key in line if key.startswith("time/")}
    assert {"time/act", "time/replay", "time/encoder", "time/model", "time/controller", "time/wall"} <= parts
    assert "time/gpu" not in parts  # on the CPU


def test_lines_say_what_is_learned_per_second(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config = tiny()
    rows = config.replay.batch * config.replay.length
    dreamt = config.replay.batch * config.controller.imagination_starts * config.controller.horizon
    lines = [json.loads(text) for text in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "count/rows" in line]
    for line, before in zip(logged[1:], logged, strict=False):
        updates = line["count/updates"] - before["count/updates"]
        rate = line["time/updates_per_s"]
        assert rate == pytest.approx(updates / (line["time/wall"] - before["time/wall"]), rel=0.5)
        assert line["time/rows_per_s"] == pytest.approx(rows * rate)
        full = "controller/actor" in line
        assert line["time/dreamt_steps_per_s"] == pytest.approx(dreamt * rate if full else 0)
    assert logged[-1]["time/dreamt_steps_per_s"] > 0
    # what a checkpoint brings was not learned in this session
    folder = shutil.copytree(finished[0], tmp_path / "run")
    saved = run_folder.newest(folder)
    with ExitStack() as stack:
        again = OnlineTrainer(config, folder, saved, Signals(), stack)
        again.open(stack.enter_context(Logger(folder, console=False)), saved)
        assert again.agent.updates == finished[1]["updates"] > 0
        assert set(again.rates.take().values()) == {0.0}


def test_every_episode_has_a_line(finished: tuple[Path, dict[str, Any]]) -> None:
    lines = record(finished[0])
    episodes = [line for line in lines if "episode/return" in line]
    assert len(episodes) == [line["count/episodes"] for line in lines if "count/episodes" in line][-1] > 3
    for episode in episodes:
        parts = [episode[f"episode/surprise_{part}"] for part in ("latent", "reward", "end")]
        assert min(parts) >= 0 and episode["episode/surprise"] == pytest.approx(sum(parts), rel=1e-5)
        assert episode["episode/length"] <= 20
    averaged = [line for line in lines if "train/return" in line]
    weight = np.diff([0, *(line["count/episodes"] for line in averaged)])
    mean = np.average([line["train/return"] for line in averaged], weights=weight)
    assert mean == pytest.approx(np.mean([episode["episode/return"] for episode in episodes]))
    paid = [line for line in lines if "train/reward" in line]
    steps = np.diff([0, *(line["step"] for line in paid)])
    earned = np.dot([line["train/reward"] for line in paid], steps)
    returns = sum(episode["episode/return"] for episode in episodes)
    assert earned != 0 and abs(earned - returns) <= tiny().env.copies  # of episodes under way, at most 1 each


def test_same_seed_same_metrics(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    torch.rand(7)  # what was drawn before a run is of no consequence
    OnlineTrainer.train(tiny(), tmp_path / "again", console=False)
    assert record(tmp_path / "again") == record(finished[0])
    OnlineTrainer.train(tiny(seed=1), tmp_path / "other", console=False)
    assert record(tmp_path / "other") != record(finished[0])


def test_evaluations_are_greedy_unless_the_config_says_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    act = Agent.act
    monkeypatch.setattr(Agent, "act", lambda self, carry, greedy: asked.append(greedy) or act(self, carry, greedy))
    for greedy in (True, False):
        config = tiny(evaluate__greedy=greedy)
        agent = Agent(config, World(config.env.id, 1, 0, config.env.kwargs).spec)
        asked.clear()
        summary = evaluate_agent(agent, config.env, 2, 0, config.evaluate)
        assert set(asked) == {greedy} and summary["policy"] == ("greedy" if greedy else "drawn")


def test_evaluating_changes_nothing(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    config = tiny(evaluate__every=60, evaluate__episodes=3, log__to=("tensorboard",))
    OnlineTrainer.train(config, tmp_path / "run", console=False)

    def of_training(folder: Path) -> list[dict[str, Any]]:
        return [x for x in record(folder) if "evaluate/return_mean" not in x and "diagnosis/encoder" not in x]

    lines = of_training(tmp_path / "run")
    assert lines == of_training(finished[0])
    assert len(record(tmp_path / "run")) == len(lines) + 2 + 3  # the last evaluation is diagnosed too
    assert (tmp_path / "run" / PICTURES / "dream.gif").exists() and not (finished[0] / PICTURES).exists()


def test_no_updates_where_nothing_is_due(tmp_path: Path) -> None:
    summary = OnlineTrainer.train(tiny(learn__train_ratio=0.0, learn__warmup=0), tmp_path / "run", console=False)
    assert summary["updates"] == 0


# -- rows where they belong -------------------------------------------------------------------------------------------


def test_learning_rates_fall_on_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the whole rate when learning begins to `learn.decay` of it at the last step, for every part, after a stop
    too."""
    seen: list[tuple[Stage, list[float]]] = []

    class Noting(Agent):
        def update(self, rows: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> dict:
            metrics = super().update(rows, stage, rate_scale)
            scales = [part.adamw.param_groups[0]["lr"] / part.rate for part in self.optimizers.values()]
            seen.append((stage, scales))
            if len(seen) == 20:
                signal.raise_signal(signal.SIGTERM)
            return metrics

    monkeypatch.setattr(trainer, "Agent", Noting)
    config = tiny(learn__decay=0.2, learn__warmup_model=3)
    with pytest.raises(Interrupted):
        OnlineTrainer.train(config, tmp_path / "run", console=False)
    assert len(seen) == 20
    OnlineTrainer.train(config, tmp_path / "run", resume=True, console=False)
    assert all(max(scales) == pytest.approx(min(scales)) for _, scales in seen)
    falling = [scales[0] for stage, scales in seen if stage == "controller"]
    assert [stage for stage, _ in seen[:9]] == ["encoder"] * 5 + ["model"] * 3 + ["controller"]
    assert all(scales[0] == 1 for stage, scales in seen if stage != "controller")
    assert falling == sorted(falling, reverse=True) and falling[0] > 0.9 and 0.199 < falling[-1] < 0.25
    assert np.diff(sorted(set(falling))).max() < 0.1  # no jumps, where it was stopped either


def follow(obs: dict, action: np.ndarray, reward: Any, first: Any, terminated: Any, truncated: Any) -> Any:
    """Assert that rows of the counting environment `(..., T, ...)` follow on each other as rows do.

    Its observation holds the step, the episode, the copy and the action that it was given in the row before.
    Returns by how much the number of the episode grew where a new one began.
    """
    time, episode, copy, last = np.moveaxis(obs["time"], -1, 0).astype(int)
    assert (first == (time == 0)).all()
    assert (obs["phase"] == time % 7).all()
    assert (reward[first] == 0).all() and (last[first] == -1).all()
    chosen = action.argmax(-1)
    assert (action.sum(-1) == 1).all()
    on, before = ~first[..., 1:], np.s_[..., :-1]
    assert (last[..., 1:] == chosen[before])[on].all()  # the action of a row is what the next one was caused by
    assert np.isclose(reward[..., 1:], expected_reward(time[..., 1:], chosen[before]), atol=1e-4)[on].all()
    assert (time[..., 1:] == time[before] + 1)[on].all() and (episode[..., 1:] == episode[before])[on].all()
    assert (copy[..., 1:] == copy[before]).all()
    ended = time == episode_length(copy, episode)
    assert (terminated == (ended & is_terminal(copy, episode))).all()
    assert (truncated == (ended & ~is_terminal(copy, episode))).all()
    assert (first[..., 1:] == ended[before]).all()  # a new episode follows an end, and nothing else
    return episode[..., 1:][~on] - episode[before][~on]


class Watchful(Agent):
    """The real agent, which asserts what it is handed to act on and to learn from."""

    rows = 0
    surprised = False
    stop_after = -1
    numbered = 1

    def observe(self, carry: Carry, row: Row, measure: bool = True) -> Any:
        if measure:  # collecting
            time, _, _, last = row.obs["time"].T
            given = carry.action.numpy()
            on = ~row.is_first
            assert (given.argmax(1) == last)[on].all() and (given.sum(1) == 1)[on].all()
            assert np.allclose(row.reward, np.where(on, expected_reward(time, given.argmax(1)), 0), atol=1e-4)
            assert (carry.state.age.numpy()[on] == np.minimum(time, 1)[on]).all()  # of a window of two, one is kept
            type(self).rows += 1
        after, surprise = super().observe(carry, row, measure)
        if measure:
            assert surprise is not None and (surprise.total().numpy()[row.is_first] == 0).all()
            assert (after.state.age == 1).all()
        return after, surprise

    def update(self, rows: dict, stage: Stage = "controller", rate_scale: float = 1.0) -> dict:
        grew = follow(*(rows[key] for key in ("obs", "action", "reward", "is_first", "terminated", "truncated")))
        assert (grew == self.numbered).all()
        assert (rows["surprise"][rows["is_first"]] == 0).all()
        type(self).surprised |= bool(rows["surprise"].max() > 0)
        metrics = super().update(rows, stage, rate_scale)
        if self.updates == type(self).stop_after:
            signal.raise_signal(signal.SIGTERM)
        return metrics


@pytest.mark.parametrize("mode", ["native", "sync"])
def test_rows_stay_where_they_belong(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "Agent", Watchful)
    monkeypatch.setattr(Watchful, "rows", 0)
    monkeypatch.setattr(Watchful, "surprised", False)
    monkeypatch.setattr(Watchful, "stop_after", 12)
    if mode == "sync":  # a wrapper around each copy, which seeds every episode: it counts as episode 0 of copy 0
        monkeypatch.setattr("longdream.envs.make._native", lambda *_: None)
        monkeypatch.setattr(Watchful, "numbered", 0)
    config = tiny(
        env__id="longdream/Counting-v0", env__kwargs={}, env__copies=3, replay__capacity=300, learn__steps=400
    )
    with pytest.raises(Interrupted):
        OnlineTrainer.train(config, tmp_path / "run", console=False)
    stopped = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 60 < stopped < 200 and Watchful.rows > 20 and Watchful.surprised
    monkeypatch.setattr(Watchful, "stop_after", -1)
    monkeypatch.setattr(Watchful, "rows", 0)
    summary = OnlineTrainer.train(config, tmp_path / "run", resume=True, console=False)
    assert summary["env_steps"] >= 400 and Watchful.rows > 60
    lengths = [line["episode/length"] for line in record(tmp_path / "run") if "episode/length" in line]
    assert sum(lengths) <= summary["env_steps"]
    assert set(lengths) == ({*range(3, 14)} if mode == "native" else {3})


def test_a_row_out_of_place_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assertions above do fail: on actions that are off by one."""

    class Late(Watchful):
        def acted(self, carry: Carry, action: np.ndarray) -> Carry:
            before = super().acted(carry, action)
            return super().acted(before, np.roll(action, 1, axis=1))

    monkeypatch.setattr(trainer, "Agent", Late)
    config = tiny(env__id="longdream/Counting-v0", env__kwargs={}, env__copies=3)
    with pytest.raises(AssertionError):
        OnlineTrainer.train(config, tmp_path / "run", console=False)
