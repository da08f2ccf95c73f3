"""The measurements: what they return is consistent. How fast anything is, is not a test's business."""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from longdream.agent import bench
from longdream.agent.bench import trained
from longdream.agent.bench.agents import act, controllers, loop
from longdream.agent.bench.common import resident_bytes
from longdream.agent.bench.faults.processes import environment
from longdream.agent.bench.model import motion, objectives
from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.run.logger import Logger
from longdream.controller.evolution import EvolutionSettings
from longdream.envs.contract import UserError
from longdream.envs.make import World


def test_acting_carries_the_same_bytes_at_any_age() -> None:
    result = json.loads(json.dumps(act.measure("tiny", steps=60)))
    assert result["state_bytes_start"] == result["state_bytes_end"] > 0
    assert result["ms_per_step_start"] > 0 and result["ms_per_step_end"] > 0
    assert {"preset", "device", "steps", "rss_growth_mb"} <= result.keys()


def test_the_bytes_of_a_carry_are_those_of_its_tensors() -> None:
    config = options.load("tiny")
    agent = Agent(config, World(config.env.id, 1, 0, config.env.kwargs).spec)
    carry = agent.initial(3)
    tensors = [
        carry.feat,
        carry.action,
        *carry.state.mixers,
        *carry.state.k,
        *carry.state.v,
        carry.state.last,
        carry.state.age,
    ]
    assert act.carry_bytes(carry) == sum(t.numel() * t.element_size() for t in tensors)
    assert act.carry_bytes(agent.initial(6)) == 2 * act.carry_bytes(carry)


def test_motion_tells_how_far_off_each_mixer_is() -> None:
    result = json.loads(json.dumps(motion.measure(("ssm", "rotary"), (0,), updates=3, frames=64, layers=1, width=16)))
    assert [row["mixer"] for row in result["rows"]] == ["ssm", "rotary"]
    for row in result["rows"]:
        assert list(row["errors"]) == list(row["constant"]) == ["1-9", "10-29", "30-59", "60-"]
        assert all(np.isfinite(error) for error in [*row["errors"].values(), *row["constant"].values()])
    with pytest.raises(UserError, match="--mixers: 'rotari': did you mean rotary"):
        motion.measure(("rotari",))
    walks = motion.walks(4, 80, torch.Generator().manual_seed(0))
    sees = walks.since == 0
    shown = walks.obs[..., : 2 * motion.MARKS].unflatten(-1, (motion.MARKS, 2)) * motion.SIGHT
    torch.testing.assert_close(shown[sees], walks.marks[sees])
    assert (shown[~sees] == 0).all() and sees.any() and (walks.since > 10).any()


def test_resident_memory_is_what_the_system_counts() -> None:
    gc.collect()  # what earlier tests left would be freed in between
    before = resident_bytes()
    held = np.ones(512 << 20, np.uint8)  # large beside what the allocator may do meanwhile
    assert 448 << 20 < resident_bytes() - before < 576 << 20
    del held


def test_the_agent_sees_one_first_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, ends = [], []
    observe = Agent.observe

    def watched(self, carry, row, measure=True):
        firsts.append(bool(row.is_first[0]))
        ends.append(bool(row.terminated[0] | row.truncated[0]))
        return observe(self, carry, row, measure)

    monkeypatch.setattr(Agent, "observe", watched)
    act.measure("tiny", steps=20)
    assert firsts == [True] + [False] * 219
    assert sum(ends) > 2  # the environment did go through episodes


@pytest.mark.parametrize(
    "how", [{"steps": 120}, {"seconds": 0.5}, {"steps": 400, "train_ratio": 0.5}, {"steps": 40, "train_ratio": 0.0}]
)
def test_the_parts_of_the_loop_add_up(how: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(loop, "ALONE_S", 0.2)
    (result,) = json.loads(json.dumps(loop.measure("tiny", workers=("sync",), **how)))["rows"]
    assert list(result["share"]) == ["collect", "replay", "encoder", "model", "controller", "other"]
    assert sum(result["share"].values()) == pytest.approx(1)
    assert all(share >= 0 for share in result["share"].values()) and result["share"]["collect"] > 0
    config = options.load("tiny")
    ratio = how.get("train_ratio", config.learn.train_ratio)
    due = result["env_steps"] * ratio / (config.replay.batch * config.replay.length)
    assert result["updates"] == pytest.approx(due, abs=1)
    learning = ("replay", "encoder", "model", "controller")
    if ratio:
        replay = result["share"]["replay"] / sum(result["share"][part] for part in learning)
        assert result["replay_share_of_updates"] == pytest.approx(replay) and replay > 0
    else:
        assert all(result["share"][part] == 0 for part in learning)
    if "steps" in how:
        assert how["steps"] <= result["env_steps"] < how["steps"] + config.env.copies
    assert result["env_steps_per_s"] == pytest.approx(result["env_steps"] / result["wall_s"], rel=0.1)
    steps, sizes = zip(*result["rss_mb"], strict=True)
    assert 2 <= len(steps) <= 20 and list(steps) == sorted(steps) and min(sizes) > 50
    assert abs(result["rss_growth_mb"]) < max(sizes)
    assert list(tmp_path.rglob("*.jsonl")) == list(tmp_path.rglob("segment_*")) == []  # the folder is gone


def test_ways_of_collecting_are_compared_by_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "ALONE_S", 0.2)
    envs = ("longdream/Recall-v0", "CartPole-v1")
    settings = {"env.copies": 2, "learn.prefill": 40, "env.kwargs": {"render_mode": "rgb_array"}}
    result = json.loads(json.dumps(loop.measure("tiny", envs, steps=60, device="cpu", settings=settings)))
    asked = [(env, workers) for env in envs for workers in ("sync", "beside")]
    assert [(row["env"], row["workers"]) for row in result["rows"]] == asked
    for row in result["rows"]:
        assert row["copies"] == 2 and 60 <= row["env_steps"] < 62 and row["keep"] == "disk"
        assert row["updates"] == pytest.approx(row["env_steps"] / 4, abs=1)
        assert row["env_alone_per_s"] > row["env_steps_per_s"] > 0 and 0 < row["busy"] < 1
        assert 0 <= row["waited"] < 1 and (row["stale"] > 0) == (row["workers"] == "beside")
    shown = capsys.readouterr().out
    assert "CartPole-v1 beside" in shown and "env_alone_per_s" in shown
    with pytest.raises(UserError, match="unknown environment"):
        loop.measure("tiny", ("CartPol-v1",))


def test_growth_is_that_of_the_trend_not_of_its_ends() -> None:
    steps = np.arange(0, 1000, 10)
    wave = steps % 80.0
    assert loop.growth(list(zip(steps, 400 + 0.2 * steps, strict=True))) == pytest.approx(0.2 * 990)
    assert abs(loop.growth(list(zip(steps, 400 + wave, strict=True)))) < 5 < abs(wave[-1] - wave[0])
    assert loop.growth([(5, 400.0)] * 3) == 0


def test_the_threshold_is_reached_where_the_record_says(tmp_path: Path) -> None:
    with Logger(tmp_path, console=False, sinks=()) as logger:
        for step, value in ((100, 0.2), (200, 0.95), (300, 0.5), (400, 0.99)):
            logger.write(step, {"time/wall": step / 10, "train/return": 1.0})
            logger.write(step, {"evaluate/return_mean": value})
        logger.write(500, {"final/return_mean": 1.0})
    assert objectives.reached_at(tmp_path / "metrics.jsonl", 0.9) == (200, 20.0)
    assert objectives.reached_at(tmp_path / "metrics.jsonl", 0.95) == (200, 20.0)
    assert objectives.reached_at(tmp_path / "metrics.jsonl", 0.999) == (None, None)


def test_the_comparison_is_summed_up_per_objective() -> None:
    def row(objective: str, seed: int, value: float, steps: int | None) -> dict:
        summary = {"return_mean": value, "env_steps": 1000, "updates": 60, "wall_s": 10.0 * seed}
        reached = {"steps_to_threshold": steps, "seconds_to_threshold": steps and steps / 100}
        return {"objective": objective, "history": "clean", "seed": seed, **summary, **reached}

    rows = [row("flow", 1, 1.0, 300), row("flow", 2, 0.9, 500), row("flow", 3, 0.2, None), row("mask", 1, 0.5, None)]
    lines = objectives.markdown(rows, 0.9).splitlines()
    assert "| flow | clean | 0.700 | 0.200 | 2 of 3 | 400 | 4 | 20 |" in lines
    assert "| mask | clean | 0.500 | 0.500 | 0 of 1 | – | – | 10 |" in lines
    assert "| flow | clean | 2 | 0.900 | 500 | 5 | 1,000 | 60 | 20 |" in lines
    assert sum(line.startswith("| flow") for line in lines) == 4


def test_objectives_are_trained_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"learn.prefill": 40, "learn.warmup": 2, "evaluate.final_episodes": 4, "evaluate.episodes": 2}
    short |= {"evaluate.every": 50, "env.kwargs": {"corridor": 3, "size": 16, "max_steps": 8}}
    (tmp_path / "small.yaml").write_text(options.dump(options.update(options.load("tiny"), short)))
    kinds = ("flow/noisy", "mask/clean")
    asked = {
        "preset": "small.yaml",
        "kinds": kinds,
        "seeds": (4,),
        "steps": 80,
        "parallel": 2,
        "out": Path("out"),
        "threshold": 0.0,
    }
    result = json.loads(json.dumps(objectives.measure(**asked)))
    assert [f"{row['objective']}/{row['history']}" for row in result["rows"]] == list(kinds)
    assert {row["seed"] for row in result["rows"]} == {4}
    for row in result["rows"]:
        assert (
            80 <= row["env_steps"] < 100 and row["updates"] > 2 and row["wall_s"] > 0 and 0 <= row["return_mean"] <= 1
        )
        assert 50 <= row["steps_to_threshold"] < 80 and 0 < row["seconds_to_threshold"] <= row["wall_s"]
        config = options.load(str(Path(f"out/runs/{row['objective']}-{row['history']}-s4/config.yaml")))
        assert (config.forcing.objective, config.forcing.history) == (row["objective"], row["history"])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert json.loads(json.dumps(objectives.measure(**asked))) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times
    # one that was cut short goes on: without its summary, a run is resumed, not refused
    (tmp_path / "out/runs/mask-clean-s4/summary.json").unlink()
    again = objectives.measure(**asked)["rows"]
    assert [row["return_mean"] for row in again] == [row["return_mean"] for row in result["rows"]]
    assert (tmp_path / "out/runs/mask-clean-s4/summary.json").exists()


def test_controllers_are_compared_in_dreams_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"learn.steps": 80, "learn.prefill": 40, "learn.warmup": 2, "evaluate.episodes": 2, "evaluate.every": 0}
    short |= {"env.kwargs": {"corridor": 3, "size": 16, "max_steps": 8}}
    (tmp_path / "small.yaml").write_text(options.dump(options.update(options.load("tiny"), short)))
    kinds = ("planner/cem", "evolution", "real/PPO")
    asked = {"presets": ("small.yaml",), "kinds": kinds, "seeds": (4,), "episodes": 3, "updates": 2, "parallel": 2}
    result = json.loads(json.dumps(controllers.measure(**asked, out=Path("out"))))
    rows = {row["controller"]: row for row in result["rows"]}
    assert list(rows) == ["with M", *kinds] and result["random_mean"].keys() == {"longdream/Recall-v0"}
    for row in rows.values():
        assert row["seed"] == 4 and row["env"] == "longdream/Recall-v0" and row["wall_s"] > 0
        assert row["return_ci95"][0] <= row["return_mean"] <= row["return_ci95"][1]
    # those in dreams count the real steps behind M and their own dreams; one in reality has none
    behind = rows["with M"]["env_steps"]
    assert [rows[kind]["env_steps"] for kind in kinds[:2]] == [behind] * 2 and rows["real/PPO"]["env_steps"] >= 80
    evolution = EvolutionSettings()
    generation = evolution.population * evolution.moments * evolution.horizon
    wanted = {"planner/cem": 0, "evolution": 2 * generation, "real/PPO": 0}
    assert {kind: rows[kind]["dream_steps"] for kind in kinds} == wanted and rows["with M"]["dream_steps"] > 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert json.loads(json.dumps(controllers.measure(**asked, out=Path("out")))) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times


def test_a_run_that_cannot_go_on_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "runs" / "cut").mkdir(parents=True)
    with pytest.raises(UserError, match=r"training cut ended with code 2 .*cut\.log"):
        trained.finished(tmp_path, "cut", ["train", "tinny"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["cut.cut-1"]


def test_controllers_are_summed_up_over_seeds() -> None:
    def row(controller: str, seed: int, value: float) -> dict:
        summary = {"env": "E-v0", "return_mean": value, "return_ci95": [value - 0.1, value + 0.1], "env_steps": 1000}
        return {
            "controller": controller,
            "seed": seed,
            **summary,
            "dream_steps": 5000,
            "wall_s": 90.0,
            "random_mean": 0.5,
        }

    lines = controllers.markdown([row("tree", 1, 1.0), row("tree", 2, 0.5), row("real/PPO", 1, 0.2)]).splitlines()
    assert "| E-v0 | tree | 0.75 | 0.50 | 2 | 1,000 | 5,000 | 1.5 |" in lines
    assert "| E-v0 | real/PPO | 1 | 0.20 | 0.10 to 0.30 | 1,000 | 5,000 | 90 |" in lines
    assert any(line.startswith("| E-v0 | random actions | 0.50 |") for line in lines)


def test_a_training_that_fails_ends_in_one_line(tmp_path: Path) -> None:
    broken = options.update(options.load("tiny"), {"env.id": "longdream/Recal-v0"})
    (tmp_path / "broken.yaml").write_text(options.dump(broken))
    with pytest.raises(UserError, match=r"training flow-clean-s1 ended with code 2 .*Recall-v0.*flow-clean-s1\.log"):
        objectives.measure(str(tmp_path / "broken.yaml"), ("flow/clean",), (1,), out=tmp_path / "out")


@pytest.mark.parametrize(
    "call",
    [
        lambda: bench.find("lop"),
        lambda: act.measure("tiny", steps=3),
        lambda: loop.measure("tiny", seconds=0),
        lambda: loop.measure("tiny", steps=0),
        lambda: objectives.measure("tiny", seeds=()),
        lambda: objectives.measure("tiny", parallel=0),
        lambda: objectives.measure("tiny", kinds=("flow",)),
        lambda: controllers.measure(("tiny",), parallel=0),
        lambda: controllers.measure(("tinny",)),
        lambda: objectives.measure("tinny"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"loop\?|tiny\?|must be"):
        call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_acting_is_measured_on_cuda() -> None:
    result = act.measure("tiny", steps=40, device="cuda")
    assert result["device"] == "cuda" and result["state_bytes_start"] == result["state_bytes_end"] > 0
    assert torch.cuda.is_initialized()


POOL = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from longdream.agent.run.signals import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), end_with_parent) as pool:
        jobs = [pool.submit(os.getpid), pool.submit(time.sleep, 600)]
        print(jobs[0].result(), *pool._processes, flush=True)
        jobs[1].result()
"""


def test_workers_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    """One that waits for work, and one that works."""
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, "pool.py"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = {int(number) for number in process.stdout.readline().split()}
    assert len(workers) == 2
    process.kill()
    process.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # within the time of a test
        time.sleep(0.05)
