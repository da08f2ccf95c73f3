"""The fast Memory Maze compared with the original: its constants, and `longdream bench fidelity` on a small scale."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest

from longdream.agent.bench.envs import fidelity, maze
from longdream.envs.contract import UserError
from longdream.envs.fast_memory_maze import plain, scene
from longdream.envs.fast_memory_maze.env import FastMemoryMazeVecEnv
from longdream.envs.fast_memory_maze.mazes import COLOURS, episode
from longdream.envs.memory_maze.sizes import SIZES


@pytest.fixture(params=[False, True], ids=["", "good visibility"])
def real(request: pytest.FixtureRequest) -> Iterator[Any]:
    env = gym.make("longdream/MemoryMaze-9x9-v0", good_visibility=request.param, disable_env_checker=True).unwrapped
    env.reset(seed=0)
    yield env.simulation
    env.close()


def test_physics_constants_equal_the_compiled_models(real: Any) -> None:
    model, data = real.physics.model.ptr, real.physics.data.ptr
    rules, _ = plain.modules()
    mass = np.zeros((5, 5))
    mujoco.mj_fullM(model, data, mass)
    name = mujoco.mjtObj.mjOBJ_BODY
    torso = mujoco.mj_name2id(model, name, "walker/torso")
    shell = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "walker/shell")
    ground = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "ground")
    reference, impedance = model.geom_solref[shell], model.geom_solimp[shell]
    expected = {
        "STEP": model.opt.timestep,
        "GRAVITY": -model.opt.gravity[2],
        "RADIUS": model.geom_size[shell, 0],
        "MASS": mass[0, 0],
        "LEVER": np.hypot(mass[0, 3], mass[1, 3]),
        "TURN_INERTIA": mass[3, 3],
        "ROLL_INERTIA": mass[4, 4],
        "TURN_DAMPING": model.dof_damping[3],
        "ROLL_DAMPING": model.dof_damping[4],
        "ROLL_GEAR": -model.actuator_gear[0, 0],
        "TURN_GEAR": model.actuator_gear[1, 0],
        "INVERSE_WEIGHT": model.body_invweight0[torso, 0],
        "STIFFNESS": 1 / (impedance[1] * reference[0]) ** 2,
        "DAMPING": 2 / (impedance[1] * reference[0]),
        "TORSION": max(model.geom_friction[shell, 1], model.geom_friction[ground, 1]),
    }
    for key, value in expected.items():
        assert getattr(rules, key) == pytest.approx(value, rel=1e-8), key
    assert max(model.geom_friction[shell, 0], model.geom_friction[ground, 0]) == 1
    np.testing.assert_array_equal(impedance, [0.9, 0.95, 0.001, 0.5, 2])
    assert (model.opt.cone, model.opt.noslip_iterations, model.opt.impratio) == (1, 5, 1)
    assert real.substeps == 50


def test_scene_constants_equal_the_compiled_models(real: Any) -> None:
    model, data = real.physics.model.ptr, real.physics.data.ptr
    high = real.arena.z_height < 1
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "walker/egocentric")
    ball = data.geom("walker/shell").xpos
    away = data.cam_xpos[camera] - ball
    view = -data.cam_xmat[camera].reshape(3, 3)[:, 2]
    assert np.hypot(*away[:2]) == pytest.approx(scene.CAMERA_AHEAD) and away[2] == pytest.approx(scene.CAMERA_ABOVE)
    assert -view[2] == pytest.approx(scene.CAMERA_SIN) and np.hypot(*view[:2]) == pytest.approx(scene.CAMERA_COS)
    assert np.tan(np.deg2rad(model.cam_fovy[camera] / 2)) == pytest.approx(scene.CAMERA_TAN)
    above = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "top_camera")
    width = scene.MAP_PADDING * 11 * scene.CELL / 2 / scene.MAP_HEIGHT
    assert np.tan(np.deg2rad(model.cam_fovy[above] / 2)) == pytest.approx(width)
    _, look = plain.modules()
    assert model.vis.headlight.ambient[0] == pytest.approx(look.AMBIENT)
    assert model.vis.headlight.diffuse[0] == pytest.approx(look.DIFFUSE)
    assert model.nlight == 0 and not model.vis.headlight.specular.any() and model.vis.quality.offsamples == 4
    assert real.arena.z_height == (scene.WALL_HEIGHT_LOW if high else scene.WALL_HEIGHT)
    target = data.geom("target/geom")
    assert target.xpos[2] == pytest.approx(scene.TARGET_HEIGHT_HIGH if high else scene.TARGET_HEIGHT)
    assert model.geom("target/geom").size[0] == scene.TARGET_RADIUS
    np.testing.assert_array_equal(np.array(real.task._target_colors), COLOURS)


@pytest.mark.parametrize("size", SIZES)
def test_mazes_have_the_originals_statistics(size: int) -> None:
    """The mean numbers of free cells and of room cells agree within five standard errors."""
    env = gym.make(f"longdream/MemoryMaze-{size}x{size}-v0", disable_env_checker=True).unwrapped
    rng, theirs, ours = np.random.default_rng(0), [], []
    arena = env.simulation.arena
    for seed in range(1, 41):
        arena.seed(seed)
        arena.regenerate(np.random.RandomState(seed))
        while len(arena.target_positions) < SIZES[size].targets:
            arena.regenerate(np.random.RandomState(seed))
        entities, floors = np.array(arena.maze.entity_layer), np.array(arena.maze.variations_layer)
        theirs.append([np.isin(entities, (" ", "P", "G")).sum(), (floors != ".").sum()])
        made = episode(size, False, int(rng.integers(2**31)), 0)
        floor = made.cells[made.cells < scene.WALL]
        ours.append([len(floor), (floor == 9).sum()])
    env.close()
    a, b = np.array(theirs, float), np.array(ours, float)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error + 1e-9).all()


def test_fidelity(tmp_path: Path) -> None:
    result = fidelity.measure(states=8, approaches=6, episodes=0, out=tmp_path)
    assert result["psnr_mean"] >= 30 and result["psnr_p05"] >= 24
    assert result["pose_error_1"] <= 1e-6, "where nothing but rounding differs"
    assert result["pose_error_10_open"] <= 1e-5 and result["pose_error_10_contact"] <= 0.01
    assert result["touch_agreement"] >= 0.95 and result["counts"]["pictures"] == 32
    assert imageio.imread(tmp_path / "fidelity-9x9.png").shape == (192, 576, 3)


@pytest.mark.parametrize("options", [{"good_visibility": True}, {"top_camera": True}])
def test_options_look_as_in_the_original(options: dict[str, bool]) -> None:
    env = gym.make("longdream/MemoryMaze-9x9-v0", disable_env_checker=True, **options).unwrapped
    fast = FastMemoryMazeVecEnv(1, 9, **options)
    env.reset(seed=2)
    fast.reset_tensors(0)
    for action in (1, 4, 1):
        frame = env.step(action)[0]
    fidelity.match(fast, env.simulation)
    assert fidelity.psnr(frame, fast.observe()[0].numpy()) >= 30
    env.close()
    fast.close()


def test_returns_are_compared() -> None:
    rows = fidelity.returns(2, 1, 0, sizes=(9,), policies=("random",))
    (row,) = rows
    assert set(row) == {"size", "policy", "real_mean", "real_ci95", "fast_mean", "fast_ci95", "agree"}
    assert row["agree"] == (
        row["fast_ci95"][0] <= row["real_mean"] <= row["fast_ci95"][1]
        and row["real_ci95"][0] <= row["fast_mean"] <= row["real_ci95"][1]
    )


def test_bench_maze_measures_both() -> None:
    result = maze.measure(copies=2, rounds=1, steps=2, upstream_steps=2)
    assert result["device"] == "cpu" and result["copies"] == 2 and 0 < result["physics_share"] < 1
    assert result["ratio"] == pytest.approx(result["steps_per_s"] / result["upstream_steps_per_s"], rel=0.05)
    without_upstream = maze.measure(copies=1, rounds=1, steps=1, upstream=False)
    assert (
        without_upstream["ratio"] is without_upstream["upstream_steps_per_s"] is None
        and without_upstream["steps_per_s"] > 0
    )


def test_benches_refuse_nonsense() -> None:
    with pytest.raises(UserError, match="too small"):
        fidelity.measure(states=0)
    with pytest.raises(UserError, match="--size 10"):
        maze.measure(size=10)
