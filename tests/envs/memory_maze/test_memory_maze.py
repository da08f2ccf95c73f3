"""Memory Maze as a Gymnasium environment: spaces, seeds, options, time limit, error messages and common wrappers."""

import hashlib
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv

from longdream.envs.contract import UserError
from longdream.envs.make import World
from longdream.envs.memory_maze.env import MemoryMazeEnv
from longdream.envs.memory_maze.sizes import SIZES, references

ID = "longdream/MemoryMaze-9x9-v0"
WALK = [1, 1, 5, 5, 1, 4, 1, 0, 2, 1]


def walk(env: gym.Env, seed: int | None, actions: list[int] = WALK) -> np.ndarray:
    """Frames of a walk, (T + 1, H, W, 3)."""
    frames = [env.reset(seed=seed)[0]]
    return np.stack(frames + [env.step(action)[0] for action in actions])


@pytest.fixture(scope="module")
def env():
    with closing(gym.make(ID, probes=True)) as made:
        yield made


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_registered(size: int) -> None:
    with closing(gym.make(f"longdream/MemoryMaze-{size}x{size}-v0", probes=True)) as made:
        assert made.observation_space == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        assert made.action_space == gym.spaces.Discrete(6)
        obs, info = made.reset(seed=1)
        assert obs in made.observation_space
        assert info["maze_layout"].shape == (size, size) and info["targets_pos"].shape == (SIZES[size].targets, 2)


def test_gymnasium_and_stable_baselines_accept_it(env: gym.Env) -> None:
    from stable_baselines3.common.env_checker import check_env as sb3_check

    check_env(gym.make(ID).unwrapped)
    with closing(MemoryMazeEnv(9)) as fresh:
        sb3_check(fresh)


def test_stable_baselines_trains_in_it() -> None:
    from stable_baselines3 import PPO

    model = PPO("CnnPolicy", gym.make(ID), n_steps=16, batch_size=8, n_epochs=1, device="cpu", seed=0)
    model.learn(16)
    assert model.num_timesteps == 16


def test_a_seed_gives_the_same_episode_in_another_process(env: gym.Env) -> None:
    here = walk(env, 11)
    code = "import sys; sys.path.insert(0, 'tests/envs/memory_maze'); import test_memory_maze as t;"
    code += "import gymnasium as gym, hashlib;"
    code += "print(hashlib.sha256(t.walk(gym.make(t.ID), 11).tobytes()).hexdigest())"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == hashlib.sha256(here.tobytes()).hexdigest()
    assert "gym " not in done.stderr and "WARNING" not in done.stderr
    np.testing.assert_array_equal(walk(env, 11), here)  # independent of earlier episodes


def test_without_a_seed_the_next_episode_follows(env: gym.Env) -> None:
    seeds = (2, None, None, 2**70 + 2)
    first, again = ([env.reset(seed=seed)[1]["maze_layout"] for seed in seeds] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({layout.tobytes() for layout in first}) == 4


def test_the_global_generator_is_not_used(env: gym.Env) -> None:
    np.random.seed(1)
    before = walk(env, 5, WALK[:3])
    np.random.seed(2)
    np.testing.assert_array_equal(walk(env, 5, WALK[:3]), before)
    state = np.random.get_state()[1]
    env.reset(seed=5)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_the_time_limit_truncates_and_nothing_terminates() -> None:
    with closing(MemoryMazeEnv(9, control_freq=0.5)) as env:  # 125 steps of 400 substeps
        env.reset(seed=0)
        ends = [env.step(0)[2:4] for _ in range(125)]
        assert ends == [(False, False)] * 124 + [(False, True)]
        with pytest.raises(ResetNeeded):
            env.step(0)
        env.reset()
        assert env.step(0)[3] is False


def test_probes_are_consistent(env: gym.Env) -> None:
    _, info = env.reset(seed=8)
    first = {key: np.copy(value) for key, value in info.items()}
    assert info["maze_layout"].dtype == np.uint8 and set(np.unique(info["maze_layout"])) == {0, 1}
    for place in (info["agent_pos"], *info["targets_pos"]):
        assert info["maze_layout"][int(place[1]), int(place[0])] == 1
    ahead, right = info["agent_dir"], info["agent_dir"][::-1] * [1, -1]
    expected = (info["targets_pos"] - info["agent_pos"]) @ np.stack([right, ahead], 1)
    np.testing.assert_allclose(info["targets_vec"], expected, atol=1e-6)
    assert np.linalg.norm(ahead) == pytest.approx(1)
    turned = env.step(2)[4]["agent_dir"]
    assert np.cross([*ahead, 0], [*turned, 0])[2] > 0.2  # left is anticlockwise
    moved = env.step(1)[4]
    for key, value in first.items():
        np.testing.assert_array_equal(info[key], value)  # later steps must not change arrays that were returned before
        assert type(moved[key]) in (np.ndarray, np.int64)


def test_forward_moves_along_the_direction_of_view(env: gym.Env) -> None:
    _, info = env.reset(seed=5)  # the agent has free space ahead
    *_, after = env.step(1)
    moved = after["agent_pos"] - info["agent_pos"]
    distance = np.linalg.norm(moved)
    assert moved @ info["agent_dir"] == pytest.approx(distance, abs=1e-6) and distance > 0.1


def test_the_border_has_the_prompts_colour(env: gym.Env) -> None:
    obs, info = env.reset(seed=4)
    color = (info["target_color"] * 255 * 0.7).astype(np.uint8)
    np.testing.assert_array_equal(obs[:2], np.broadcast_to(color, (2, 64, 3)))
    np.testing.assert_array_equal(obs[:, -2:], np.broadcast_to(color, (64, 2, 3)))
    assert obs[2:-2, 2:-2].std() > 5


def test_render_modes() -> None:
    frames = {}
    for mode in ("rgb_array", "top"):
        with closing(gym.make(ID, render_mode=mode)) as env:
            obs, _ = env.reset(seed=6)
            frames[mode] = env.render()
            np.testing.assert_array_equal(
                env.step(1)[0], walk(env, 6, [1])[1]
            )  # rendering does not change the observations
    assert frames["rgb_array"].shape == frames["top"].shape == (480, 480, 3)
    small = frames["rgb_array"][30:-30, 30:-30].astype(float).mean((0, 1))
    np.testing.assert_allclose(small, obs[4:-4, 4:-4].astype(float).mean((0, 1)), atol=6)
    red, blue = frames["top"][..., 0].astype(int), frames["top"][..., 2].astype(int)
    assert ((blue > 100) & (red < 10)).sum() > 20  # the blue ear
    with closing(gym.make(ID)) as env:
        env.reset(seed=6)
        assert env.render() is None


def test_vector_environments() -> None:
    make = partial(gym.make, "longdream:" + ID, probes=True)
    with closing(AsyncVectorEnv([make, make], context="forkserver")) as envs:
        obs, infos = envs.reset(seed=[3, 4])
        assert obs.shape == (2, 64, 64, 3) and infos["agent_pos"].shape == (2, 2)
        frames = [obs.copy()] + [envs.step(np.array([a, a]))[0].copy() for a in WALK[:4]]
    with closing(gym.make(ID)) as alone:
        np.testing.assert_array_equal(np.stack(frames)[:, 1], walk(alone, 4, WALK[:4]))


def test_a_world_continues_exactly() -> None:
    with closing(World(ID, 2, 3)) as world, closing(World(ID, 2, 3)) as other:
        world.reset()
        rng = np.random.default_rng(0)
        for _ in range(6):
            world.step(world.random_action(rng))
        other.set_state(world.get_state())
        for _ in range(4):
            action = world.random_action(rng)
            np.testing.assert_array_equal(world.step(action).obs["obs"], other.step(action).obs["obs"])


def test_videos_are_recorded(tmp_path: Path) -> None:
    env = gym.wrappers.RecordVideo(gym.make(ID, render_mode="top"), str(tmp_path), episode_trigger=lambda _: True)
    with closing(env):
        walk(env, 0)
        assert env.frames_per_sec == 4
    assert [path.stat().st_size > 1000 for path in tmp_path.glob("*.mp4")] == [True]


def test_options_have_their_effect() -> None:
    frames = {}
    for name, options in {"": {}, "low": {"good_visibility": True}, "top": {"top_camera": True}}.items():
        with closing(MemoryMazeEnv(9, **options)) as env:
            frames[name], _ = env.reset(seed=9)
    with closing(MemoryMazeEnv(9, camera_resolution=96)) as env:
        obs, _ = env.reset(seed=9)
        assert obs.shape == (96, 96, 3) and obs in env.observation_space
    with closing(MemoryMazeEnv(9, probes=True, randomize_colors=True)) as env:
        colors = {tuple(env.reset(seed=seed)[1]["target_color"].round(3)) for seed in range(5)}
    assert not np.array_equal(frames[""], frames["low"]) and not np.array_equal(frames[""], frames["top"])
    assert len(colors) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 10}, "size=10: there are 9, 11, 13, 15"),
        ({"camera_resolution": 32}, "camera_resolution=32: it must be 64 to 480"),
        ({"camera_resolution": 500}, "camera_resolution=500"),
        ({"control_freq": 7.0}, "control_freq=7.0: it must be 200 divided by a whole number"),
        ({"control_freq": 0.0}, "control_freq=0.0"),
        ({"render_mode": "human"}, "render_mode='human': use None"),
    ],
)
def test_invalid_options_are_reported(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MemoryMazeEnv(**{"size": 9, **options})


def test_invalid_steps_are_reported() -> None:
    with closing(MemoryMazeEnv(9)) as env:
        with pytest.raises(ResetNeeded, match="call reset before step"):
            env.step(0)
        env.reset(seed=0)
        for action in (6, -1, 1.5, None):
            with pytest.raises(UserError, match="Memory Maze has 0 noop, 1 forward"):
                env.step(action)
        assert env.step(np.int64(1))[0].shape == (64, 64, 3)


def test_known_returns_by_id() -> None:
    assert references(ID) == {"random": 0.22, "human": 26.4, "oracle": 34.8}
    assert references("longdream:longdream/FastMemoryMaze-15x15-v0")["oracle"] == 87.7
    assert references(ID, {"probes": True}) and not references(ID, {"control_freq": 8.0})
    assert references("longdream/Recall-v0") == references("longdream/MemoryMaze-9x11-v0") == {}


def test_making_it_leaves_modules_and_warning_filters_unchanged() -> None:
    code = "import gymnasium as gym, longdream, sys, warnings; before = list(warnings.filters);"
    code += f"gym.make('{ID}'); assert warnings.filters == before;"
    code += "print('gym' in sys.modules, 'memory_maze' in sys.modules, 'memory_maze.maze' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout.split() == ["False", "False", "True"] and done.stderr == ""
