"""Where dreams begin, and what cannot be dreamt."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import longdream.envs as envs  # noqa: F401  (registers the environments)
from longdream.agent.dream_env.starts import first_moments, open_replay, replayed_moments
from longdream.agent.run import checkpoint
from longdream.agent.run.folder import load_agent
from longdream.envs.contract import UserError


def vec(folder: Path, num_envs: int = 5, **arguments: Any) -> Any:
    """The vector form, as users make it."""
    arguments = {"pool": 20, "horizon": 4} | arguments
    kind = "vector_entry_point"
    return gym.make_vec("longdream/Dream-v0", num_envs, kind, checkpoint=str(folder), **arguments)


def test_dreams_begin_after_replayed_rows_as_acting_would_have_left_them(dream_runs: Callable) -> None:
    folder = dream_runs("mixed")  # its "leg" counts the steps of the episode
    agent, run = load_agent(folder)
    config, replay = agent.config, open_replay(run)
    moments = replayed_moments(agent, replay, 64, 6, seed=3)
    assert len(moments.z) == 64 and len({row.tobytes() for row in moments.feat.numpy()}) > 20
    # the truth: row by row through `observe`, from the same clips
    rows = replay.sample(np.random.default_rng(3), 16, 6, config.replay.episode_start_fraction)
    carry, feats = agent.initial(16), []
    for t in range(6):
        first = rows["is_first"][:, t].copy() if t else np.ones(16, bool)
        z = agent.model.encoder({key: torch.from_numpy(value[:, t]) for key, value in rows["obs"].items()})
        feat, state = agent.model.commit(carry.state, z, carry.action, torch.from_numpy(first))
        carry = carry._replace(state=state, action=torch.from_numpy(rows["action"][:, t]))
        feats.append(feat)
    feats = torch.stack(feats, 1)
    over = torch.from_numpy(rows["terminated"] | rows["truncated"])
    for i, feat in enumerate(moments.feat):
        near = (feats[i // 4] - feat).abs().amax(-1)
        assert near.min() < 1e-4 and not over[i // 4, near.argmin()]


def test_dreams_begin_at_first_frames(dream_runs: Callable) -> None:
    env = vec(dream_runs("mixed"), start="initial", observation="image").unwrapped
    seen, _ = gym.make("MixedForDreams-v0").reset()
    first = env.agent.spec.pack_obs({key: np.asarray(v)[None] for key, v in seen.items()})
    truth = first_moments(env.agent, first)
    torch.testing.assert_close(env.moments.feat, truth.feat.expand(20, -1))
    assert (env.moments.state.age <= 1).all()


def test_dreams_begin_where_start_says(dream_runs: Callable) -> None:
    folder = dream_runs("mixed")
    env = vec(folder, 3, start="observation", horizon=2).unwrapped
    with pytest.raises(UserError, match="needs reset"):
        env.reset(seed=0)
    real, frames = gym.make("MixedForDreams-v0").unwrapped, []
    real.reset()
    for _ in range(3):
        frames.append(real.seen())
        for _ in range(3):  # far enough apart for a V that has hardly learned
            real.step(np.array([0, 5]))
    given = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
    obs, _ = env.reset(seed=0, options={"observation": given})
    truth = first_moments(env.agent, env.agent.spec.pack_obs(given))
    assert (obs == truth.feat.numpy()).all() and len({row.tobytes() for row in obs}) > 1
    ended = [env.step(np.array([[0, 5]] * 3))[2:4] for _ in range(2)]
    assert np.any(ended)
    assert (env.reset()[0] == obs).all()  # the same again: they are kept
    one = gym.make("longdream/Dream-v0", checkpoint=str(folder), start="observation")
    np.testing.assert_allclose(one.reset(options={"observation": frames[1]})[0], obs[1], atol=1e-5)
    for wrong, message in (({"eye": given["eye"]}, "knows"), (given | {"leg": np.zeros((3, 5))}, "'leg' has shape")):
        with pytest.raises(UserError, match=message):
            env.reset(options={"observation": wrong})
    with pytest.raises(UserError, match="unknown option"):
        vec(folder).reset(options={"observation": given})


def test_a_run_in_training_keeps_its_files(dream_runs: Callable) -> None:
    folder = dream_runs("images")
    _, run = load_agent(folder)
    later = folder / "replay" / "segment_000000999.bin"  # written since the checkpoint
    later.write_bytes(b"rows")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    open_replay(run).close()
    vec(folder).reset(seed=0)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    later.unlink()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0}, "temperature = 0: must be greater than 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"horizon": 0}, "horizon = 0: must be at least 1"),
        ({"steps": 0}, "steps"),
        ({"pool": 0}, "pool"),
        ({"num_envs": 0}, "num_envs"),
        ({"context": 1}, "context = 1: must be at least 2"),
        ({"context": 5000}, "no so many rows in a row"),
        ({"observation": "pixels"}, "observation = 'pixels': use one of latent, feature, image"),
        ({"start": "end"}, "start = 'end': use one of replay, initial, observation"),
        ({"device": "tpu"}, "device"),
        ({"autoreset_mode": AutoresetMode.DISABLED}, "autoreset_mode"),
        ({"checkpoint": "runs/nothing-there"}, "no such run"),
        ({"checkpoint": ""}, "which dream"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(dream_runs: Callable, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gym.make_vec(
            "longdream/Dream-v0", **{"num_envs": 2, "checkpoint": str(dream_runs("images")), "pool": 4} | wrong
        )


def test_checkpoints_that_cannot_be_used_are_refused(dream_runs: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dream_runs("images"), folder)
    tree, step = checkpoint.load(folder / "checkpoints")
    shutil.rmtree(folder / "replay")
    with pytest.raises(UserError, match=r"replay is missing: put it back, or dream with start='observation'"):
        vec(folder)
    assert vec(folder, start="observation").num_envs == 5
    for change, message in (
        ({"replay": {"kept": "on the device"}}, "memory of the device"),
        ({"weights": {"model": {}, "controller": {}}}, "not of the agent"),
        ({"spec": None}, "no 'spec'"),
    ):
        changed = {key: value for key, value in (tree | change).items() if value is not None}
        shutil.rmtree(folder / "checkpoints")  # or the one before would be used
        checkpoint.save(folder / "checkpoints", step + 1, changed)
        with pytest.raises(UserError, match=message):
            vec(folder)
        step += 1
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("forcing:\n", "forcing:\n  noise: 1.0\n"))
    with pytest.raises(UserError, match=r"unknown setting forcing.noise"):
        vec(folder)
