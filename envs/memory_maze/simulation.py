"""A faster simulation of the original Memory Maze, with the same images and rewards.

The classes of the package `memory-maze` and of dm_control ("upstream") build the model, place the targets, spawn the
agent and detect touches. This module leaves out work that does not change the result:

* The contacts of each substep are compared with the targets in one array operation. Upstream, each of 3 to 6 targets
  loops over all contacts in Python at each of 50 substeps.
* Unused observables, and the image of every maze before the agent is placed, are not computed.
* Textures without a material, and duplicates of an image, are removed from the model: about 11 of 88 remain in a 9x9.
  Every maze is a new model, so each reset would decode and upload all of them and compute their mipmaps again.
* The scene is not allocated anew for each image.

tests/envs/memory_maze/test_identity.py compares images and rewards with upstream's, bit for bit.
"""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's functions are in compiled modules without types.)

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mujoco
import numpy as np
from dm_control import mjcf
from dm_control.locomotion.arenas import labmaze_textures
from dm_control.mujoco import Camera
from memory_maze import maze as upstream

from longdream.envs.contract import UserError
from longdream.envs.memory_maze import gl
from longdream.envs.memory_maze.sizes import ACTION_CONTROLS, SIZES

CELL = 2.0
"""Side of a cell in metres."""
PROMPT = 0.7
"""Brightness of the image's border, relative to the prompted target's colour."""
EARS = (((0.22, 0.0, 0.0), (0.7, 0.0, 0.0, 1.0)), ((-0.22, 0.0, 0.0), (0.0, 0.0, 0.7, 1.0)))
EAR_RADIUS = 0.26
"""On maps, two spheres mark the agent's position and direction: a red ear on its right and a blue ear on its left.

EARS holds (position in the head's frame in metres, RGBA) of each, EAR_RADIUS their radius in metres."""


class Simulation:
    """A single Memory Maze. Call `seed`, then `reset`, then `step`; `image`, `draw` and `probes` return its state.

    OpenGL is needed only for `image` and `draw`.

    Args:
        size: cells along a side: 9, 11, 13 or 15.
        resolution: side of `image` in pixels.
        top_camera: `image` is the map from above.
        good_visibility: low walls, and targets above the floor.
        control_freq: steps per second of simulated time.
        randomize_colors: draw the targets' colours from all six in each episode.
    """

    def __init__(
        self,
        size: int,
        resolution: int = 64,
        top_camera: bool = False,
        good_visibility: bool = False,
        control_freq: float = 4.0,
        randomize_colors: bool = False,
    ) -> None:
        kind = SIZES[size]
        self.resolution = resolution
        self.top_camera = top_camera
        self.arena: Any = _Arena(
            x_cells=size + 2,
            y_cells=size + 2,
            xy_scale=CELL,
            z_height=0.4 if good_visibility else 1.5,
            max_rooms=kind.rooms,
            room_min_size=kind.room_sides[0],
            room_max_size=kind.room_sides[1],
            spawns_per_room=1,
            targets_per_room=1,
            floor_textures=upstream.FixedFloorTexture("style_01", ["blue", "blue_bright"]),
            # upstream's dictionary with its unused entries: each of them draws a random number in every new maze
            wall_textures={"*": upstream.FixedWallTexture("style_01", "yellow")}
            | {str(i): labmaze_textures.WallTextures("style_01") for i in range(10)},
            skybox_texture=None,
            random_seed=1,  # `seed` replaces it
        )
        self.walker: Any = _Walker(camera_height=0.3, add_ears=top_camera)
        self.task = upstream.MemoryMazeTask(
            walker=self.walker,
            maze_arena=self.arena,
            n_targets=kind.targets,
            target_radius=0.6,
            target_height_above_ground=0.5 if good_visibility else -0.6,
            enable_global_task_observables=True,
            control_timestep=1.0 / control_freq,
            camera_resolution=resolution,
            target_randomize_colors=randomize_colors,
        )
        self.substeps = self.task.physics_steps_per_control_step
        self.time_limit = kind.seconds - 1e-3
        self.random_state = np.random.RandomState(0)
        self.physics: mjcf.Physics | None = None
        self.cameras: dict[tuple[str, int], Camera] = {}

    def seed(self, seed: int) -> None:
        """Restart the random generators. The episodes are then those of upstream's environment with this seed.

        The seed is from 0 to 2**32 − 1."""
        self.random_state = np.random.RandomState(seed)
        self.arena.seed(self.random_state.randint(2**31))
        self.task._target_colors = list(upstream.TARGET_COLORS)  # shuffled in place by earlier episodes

    def reset(self) -> None:
        """Start an episode: generate a maze and place the agent in it."""
        self.task.initialize_episode_mjcf(self.random_state)
        for entity in self.arena.iter_entities():
            entity.initialize_episode_mjcf(self.random_state)
        self.close()
        self.physics = physics = _compile(self.arena.mjcf_model)
        self.task.after_compile(physics, self.random_state)
        entities = list(self.arena.iter_entities())
        for entity in entities:
            entity.after_compile(physics, self.random_state)
        with physics.reset_context():
            self.task.initialize_episode(physics, self.random_state)
            for entity in entities:
                entity.initialize_episode(physics, self.random_state)
        if physics.is_dirty:
            physics.forward()
        self._target_of = {physics.bind(target.geom).element_id: target for target in self.task._targets}
        self._is_target = np.zeros(physics.model.ngeom, np.bool_)
        self._is_target[list(self._target_of)] = True
        maze = np.flipud(self.arena.maze.entity_layer[1:-1, 1:-1])
        self.layout = np.isin(maze, (" ", "P", "G")).astype(np.uint8)

    def step(self, action: int) -> tuple[float, bool]:
        """Apply an action for one control step. Returns the reward, and whether the time limit is reached."""
        physics = self._physics
        rng = self.random_state
        model = physics.model.ptr
        data = physics.data.ptr
        self.task.before_step(physics, np.array(ACTION_CONTROLS[action]), rng)
        with physics.check_invalid_state():
            for _ in range(self.substeps):
                # dm_control's order of the two halves of a step: velocities and contacts are current before and after
                mujoco.mj_step2(model, data)
                mujoco.mj_step1(model, data)
                geoms = data.contact.geom
                touched = self._is_target[geoms]
                if touched.any():
                    for geom in geoms[touched]:
                        self._target_of[int(geom)].after_substep(physics, rng)
        self.task.after_step(physics, rng)
        return float(self.task.get_reward(physics)), physics.time() >= self.time_limit

    def image(self) -> np.ndarray:
        """The observation, uint8 (resolution, resolution, 3)."""
        return self.draw("top" if self.top_camera else "egocentric", self.resolution)

    def draw(self, view: str, side: int) -> np.ndarray:
        """An image with the prompt's colour as its border, uint8 (side, side, 3). The view is "egocentric" or "top".

        The map shows the agent's ears. They are added here, unless the model has them (top_camera).
        """
        with _context(self._physics):
            key = (view, side)
            if key not in self.cameras:
                camera = self.arena.top_camera if view == "top" else self.walker.egocentric_camera
                ears = self._add_ears if view == "top" and not self.top_camera else None
                self.cameras[key] = Camera(self._physics, side, side, camera.full_identifier, scene_callback=ears)
            image = np.array(self.cameras[key].render())  # a copy: the camera reuses its buffer
        border = int(2 * np.sqrt(side // 64))
        frame = np.ones((side, side), np.bool_)
        frame[border:-border, border:-border] = False
        image[frame] = (self.color * 255 * PROMPT).astype(np.uint8)
        return image

    @property
    def color(self) -> np.ndarray:
        """RGB of the prompted target, (3,), 0 to 1."""
        return self.task._target_colors[self.task._current_target_ix]

    def probes(self) -> dict[str, Any]:
        """The state that the image does not show. docs/memory-maze.md lists names, shapes and units."""
        physics = self._physics
        body = physics.bind(self.walker.root_body)
        # copies, because `bind` returns views that change with the simulation
        position = np.array(body.xpos)
        axes = np.array(body.xmat).reshape(3, 3)
        middle = self.layout.shape[0] / 2.0
        targets = np.array([physics.bind(target.geom).xpos for target in self.task._targets])
        # Upstream's products of one vector and the matrix, one target at a time: BLAS rounds the product of two
        # matrices differently on some processors.
        targets_vec = np.array([np.dot(target - position, axes) for target in targets])
        return {
            "maze_layout": self.layout.copy(),
            "agent_pos": position[:2] / CELL + middle,
            "agent_dir": axes[:2, 1].copy(),
            "targets_pos": targets[:, :2] / CELL + middle,
            "targets_vec": targets_vec[:, :2] / CELL,
            "target_index": np.int64(self.task._current_target_ix),
            "target_color": self.color.copy(),
        }

    def close(self) -> None:
        """Free the model and the OpenGL context; `reset` creates new ones."""
        if self.physics is None:
            return
        contexts: Any = self.physics.contexts if self.cameras else None
        self.cameras.clear()
        # dm_control ends its contexts itself when the program ends
        with _context(self.physics) if contexts and not contexts.gl.terminated else nullcontext():
            self.physics.free()
        self.physics = None

    @property
    def _physics(self) -> mjcf.Physics:
        if self.physics is None:
            raise RuntimeError("Simulation used before reset, or after close")
        return self.physics

    def _add_ears(self, physics: Any, scene: mujoco.MjvScene) -> None:
        body = physics.bind(self.walker.root_body)
        axes = np.reshape(body.xmat, (3, 3))
        for position, color in EARS:
            scene.ngeom += 1
            sphere = mujoco.mjtGeom.mjGEOM_SPHERE
            size = np.full(3, EAR_RADIUS)
            centre = body.xpos + axes @ np.array(position)
            mujoco.mjv_initGeom(scene.geoms[-1], sphere, size, centre, np.eye(3).ravel(), np.array(color, np.float32))


class _Arena(upstream.MazeWithTargetsArena):
    """Upstream's maze, with a method to reseed its generator."""

    def seed(self, seed: int) -> None:
        old = self._maze
        self._maze = upstream.TextMazeVaryingWalls(
            height=old.height,
            width=old.width,
            max_rooms=old.max_rooms,
            room_min_size=old.room_min_size,
            room_max_size=old.room_max_size,
            max_variations=old.max_variations,
            spawns_per_room=old.spawns_per_room,
            objects_per_room=old.objects_per_room,
            simplify=True,
            random_seed=seed,
        )


class _Walker(upstream.RollingBallWithFriction):
    """Upstream's body. It has no free joint, so setting its velocity would only log a warning."""

    def set_velocity(self, physics: Any, velocity: Any = None, angular_velocity: Any = None) -> None:
        pass


@contextmanager
def _context(physics: mjcf.Physics) -> Iterator[None]:
    """Draw within this context: the model's OpenGL context, created on first use, is then the thread's current one.

    dm_control remembers which of its contexts is current, and two things change that without its knowledge: other
    packages' contexts in this process, and the garbage collector when it frees a maze that was not closed. Either
    would leave an image of something else.

    Raises:
        UserError: OpenGL fails, for example with MUJOCO_GL=glfw and no display.
    """
    with gl.no_garbage_collection():
        try:
            contexts: Any = physics.contexts
        except (RuntimeError, mujoco.FatalError) as error:
            problem = f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} gives no OpenGL ({' '.join(str(error).split())})"
            raise UserError(f"{problem}: unset it; longdream doctor shows what works here") from error
        with contexts.gl.make_current() as thread:
            thread.call(contexts.gl._platform_make_current)
        yield


def _compile(root: mjcf.RootElement) -> mjcf.Physics:
    """Compile the model without unused textures. Of several textures with the same image file, the first is used."""
    tree = ElementTree.fromstring(root.to_xml_string())
    assets = tree.find("asset")
    if assets is None:
        raise RuntimeError("a maze without materials")
    materials = assets.findall("material")
    used = {material.get("texture") for material in materials}
    first: dict[str, str] = {}
    replacement: dict[str, str] = {}
    for texture in assets.findall("texture"):
        name = texture.get("name", "")
        file = texture.get("file")
        if texture.get("type") == "skybox":
            continue
        if name in used and file and texture.get("type") == "2d":
            replacement[name] = first.setdefault(file, name)
        if name not in used or replacement.get(name, name) != name:
            assets.remove(texture)
    for material in materials:
        texture = material.get("texture")
        if texture in replacement:
            material.set("texture", replacement[texture])
    files = {element.get("file") for element in tree.iter()}
    images = {name: content for name, content in root.get_assets().items() if name in files}
    return mjcf.Physics.from_xml_string(ElementTree.tostring(tree, encoding="unicode"), images)
