"""Fast Memory Maze as a Gymnasium vector environment, with methods whose tensors stay on the device."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from longdream.envs.contract import OneCopy, UserError
from longdream.envs.fast_memory_maze import scene
from longdream.envs.fast_memory_maze.mazes import COLOURS, Mazes
from longdream.envs.fast_memory_maze.textures import texels
from longdream.envs.memory_maze.sizes import ACTIONS, RENDER_SIDE, SIZES, check_options

BYTES_PER_PIXEL = 16  # memory for the observation, its copy, and the buffers of the renderer
STAGGERED_GROUPS = 16  # groups of copies whose episodes end together


class Rows(NamedTuple):
    """One time step of n copies, on the device: obs (n, H, H, 3) uint8, reward (n,) float32, both flags (n,) bool."""

    obs: torch.Tensor
    reward: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor


class FastMemoryMazeVecEnv(gym.vector.VectorEnv):
    """A batched reimplementation of `longdream/MemoryMaze-*`: num_envs mazes with NEXT_STEP autoreset.

    The physics solves the same equations as MuJoCo does for this body, with 50 substeps per action. The renderer casts
    rays, with the textures, lighting, filtering and antialiasing of MuJoCo's renderer. docs/fast-memory-maze.md
    measures how closely both match the original. All constants are those of the original's compiled model.

    Every episode has a new maze. labmaze generates it from one of 2^31 seeds, which is drawn from the copy's seed and
    the index of the episode. A background thread generates the next maze while the present one is played. A copy's
    behaviour depends only on its own seed and actions, not on the other copies (with `stagger`, also on its index).

    Observation: uint8 (camera_resolution, camera_resolution, 3). Action: Discrete(6), as in the original. Reward: 1 for
    touching the prompted target. Only the time limit ends an episode, as a truncation; episodes never terminate. Info:
    the probes (docs/memory-maze.md) with a leading axis n if `probes` is true, else empty.

    `reset_tensors` and `step_tensors` do the same on the device, without copies to the host.

    Args:
        num_envs: number of copies.
        size, probes, camera_resolution, top_camera, good_visibility, control_freq, randomize_colors, render_mode: as
            for the original, longdream.envs.memory_maze.env.MemoryMazeEnv.
        device: "cpu", "cuda", "cuda:1" and so on. CUDA needs Triton, which CUDA builds of torch include.
        stagger: cut the first episode after `reset` to a different length in each sixteenth of the copies, so that the
            ends of episodes are spread evenly over time from then on. The last sixteenth plays the whole episode, and
            so does a single copy.

    Raises:
        UserError: an argument is invalid, the device does not exist, or the copies do not fit into its memory.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["rgb_array", "top"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    action_names = ACTIONS

    def __init__(
        self,
        num_envs: int = 1,
        size: int = 9,
        probes: bool = False,
        camera_resolution: int = 64,
        top_camera: bool = False,
        good_visibility: bool = False,
        control_freq: float = 4.0,
        randomize_colors: bool = False,
        render_mode: str | None = None,
        device: str = "cpu",
        stagger: bool = False,
    ) -> None:
        self.substeps = check_options(size, camera_resolution, control_freq, render_mode)
        self.device = _device(device)
        self._backend = _backend(self.device)
        _check_memory(self.device, num_envs, camera_resolution, size)
        self.num_envs = num_envs
        self.size = size
        self.probes = probes
        self.render_mode = render_mode
        self.top_camera = top_camera
        self.randomize_colors = randomize_colors
        self.metadata = {**self.metadata, "render_fps": control_freq}  # type: ignore[misc]
        self.count = SIZES[size].targets
        self.max_steps = math.ceil((SIZES[size].seconds - 1e-3) * control_freq)
        self.stagger = stagger
        self.wall_height = (scene.WALL_HEIGHT_LOW if good_visibility else scene.WALL_HEIGHT) / scene.CELL
        self.target_height = (scene.TARGET_HEIGHT_HIGH if good_visibility else scene.TARGET_HEIGHT) / scene.CELL
        self.resolution = camera_resolution
        self.single_observation_space = spaces.Box(0, 255, (camera_resolution, camera_resolution, 3), np.uint8)
        self.single_action_space = spaces.Discrete(len(ACTIONS))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self.texels = _texels(self.device)
        outer = size + 2
        spheres = self.count + len(scene.EARS)
        self.cells = self._zeros(outer, outer, dtype=torch.int32)
        self.spheres = self._zeros(spheres, scene.SPHERE_NUMBERS, dtype=torch.float32)
        self.colours = self._zeros(self.count, 3, dtype=torch.float64)  # of targets, 0 to 1
        self.body = self._zeros(9, dtype=torch.float64)  # x, y, z of the ball's centre (m), heading, 5 velocities
        self.prompt, self.key, self.picks = (self._zeros(dtype=torch.int64) for _ in range(3))
        self.steps = np.zeros(num_envs, np.int64)
        self.ended = np.zeros(num_envs, np.bool_)
        self.mazes: Mazes | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode in every copy.

        An int seeds copy i with seed + i. A seeded copy starts at its first episode; a copy without a seed continues
        with its next episode."""
        return self.reset_tensors(seed).cpu().numpy(), self._info()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        rows = self.step_tensors(torch.as_tensor(np.asarray(actions)))
        obs, reward, terminated, truncated = (value.cpu().numpy() for value in rows)
        return obs, reward.astype(np.float64), terminated, truncated, self._info()

    def reset_tensors(self, seed: int | list[int | None] | None = None) -> torch.Tensor:
        """As `reset`, but returns only the observations, (n, H, H, 3) uint8 on the device."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise UserError(f"{len(seeds)} seeds for {self.num_envs} copies: give one for each, or a whole number")
        if self.mazes is None:
            entropy = np.random.SeedSequence().generate_state(self.num_envs).tolist()
            old_seeds = [int(number) for number in entropy]
            old_index = [0] * self.num_envs
        else:
            old_seeds, old_index = self.mazes.position()
        new_seeds = [old if new is None else new for old, new in zip(old_seeds, seeds, strict=True)]
        new_index = [i if new is None else 0 for i, new in zip(old_index, seeds, strict=True)]
        if min(new_seeds) < 0:
            raise UserError(f"seed {min(new_seeds)}: seeds are not negative")
        if self.mazes is None or any(new is not None for new in seeds):
            self._set_mazes(new_seeds, new_index)
        self._begin(np.arange(self.num_envs))
        if self.stagger:
            self.steps = self.max_steps - _staggered_lengths(self.num_envs, self.max_steps)
        return self.observe()

    def step_tensors(self, actions: torch.Tensor) -> Rows:
        """As `step`, with tensors. The actions (n,) are integers and may be on any device.

        Actions on the CPU are checked. Those on a CUDA device are clamped to the valid range instead: to check them,
        the host would have to wait for the device at every step.

        Raises:
            ResetNeeded: there was no reset yet.
            UserError: the actions have the wrong shape or type, or actions on the CPU are out of range.
        """
        reward, truncated = self.step_unseen(actions)
        return Rows(self.observe(), reward, torch.zeros_like(truncated), truncated)

    def step_unseen(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `step_tensors` without rendering, for policies that use the probes. Returns reward and truncated, (n,)."""
        if self.mazes is None:
            raise ResetNeeded("Memory Maze: call reset before step")
        if actions.shape != (self.num_envs,) or actions.is_floating_point():
            raise UserError(f"actions {tuple(actions.shape)} {actions.dtype}: give {self.num_envs} whole numbers")
        actions = _valid(actions.long()).to(self.device).contiguous()
        starting = np.flatnonzero(self.ended)
        reward = torch.zeros(self.num_envs, dtype=torch.float32, device=self.device)
        if len(starting) < self.num_envs:
            self._backend.advance(
                self.cells, self.spheres, self.count, self.substeps, actions, self.body, self.prompt, self.key,
                self.picks, reward,
            )  # fmt: skip
        self.steps += 1
        if len(starting):
            reward.index_fill_(0, self._tensor(starting), 0.0)
            self._begin(starting)
        self.ended = self.steps >= self.max_steps
        if self.ended.any():
            return reward, self._tensor(self.ended.copy())
        return reward, self._zeros(dtype=torch.bool)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A large image of every copy, uint8 (480, 480, 3): the agent's view, or the map."""
        if self.render_mode is None or self.mazes is None:
            return None
        return tuple(self._draw(self.render_mode == "top", RENDER_SIDE).cpu().numpy())

    def get_probes(self) -> dict[str, np.ndarray]:
        """The state that the image does not show: the probes of docs/memory-maze.md, each with a leading axis n."""
        body = self.body.cpu().numpy()
        position = body[:, :2] / scene.CELL - 1.0
        ahead = np.stack([np.cos(body[:, 3]), np.sin(body[:, 3])], 1)
        targets = self.spheres[:, : self.count, :2].double().cpu().numpy() - 1.0
        offset = targets - position[:, None]
        right = np.stack([ahead[:, 1], -ahead[:, 0]], 1)
        targets_vec = np.stack([(offset * right[:, None]).sum(-1), (offset * ahead[:, None]).sum(-1)], -1)
        prompt = self.prompt.cpu().numpy().copy()
        return {
            "maze_layout": (self.cells[:, 1:-1, 1:-1] < scene.WALL).to(torch.uint8).cpu().numpy(),
            "agent_pos": position.astype(np.float32),
            "agent_dir": ahead.astype(np.float32),
            "targets_pos": targets.astype(np.float32),
            "targets_vec": targets_vec.astype(np.float32),
            "target_index": prompt,
            "target_color": self.colours.cpu().numpy()[np.arange(self.num_envs), prompt].astype(np.float32),
        }

    def get_state(self) -> dict[str, Any]:
        """The complete state of the environment: numpy arrays (num_envs, ...) and lists of numbers."""
        if self.mazes is None:
            raise ResetNeeded("Memory Maze: call reset before get_state")
        seeds, index = self.mazes.position()
        tensors = {key: getattr(self, key).cpu().numpy().copy() for key in _STATE}
        return {**tensors, "steps": self.steps.copy(), "ended": self.ended.copy(), "seeds": seeds, "episodes": index}

    def set_state(self, state: dict[str, Any]) -> None:
        for key in _STATE:
            getattr(self, key).copy_(torch.from_numpy(np.ascontiguousarray(state[key])))
        self.steps = np.array(state["steps"], np.int64)
        self.ended = np.array(state["ended"], np.bool_)
        self._set_mazes([int(s) for s in state["seeds"]], [int(i) for i in state["episodes"]])

    def close_extras(self, **kwargs: Any) -> None:
        if self.mazes is not None:
            self.mazes.close()

    def _zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros((self.num_envs, *shape), dtype=dtype, device=self.device)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        """The values on the device. On the CPU they share memory; on CUDA the host does not wait for the copy."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":  # only copies from pinned memory are asynchronous
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _set_mazes(self, seeds: list[int], index: list[int]) -> None:
        if self.mazes is not None:
            self.mazes.close()
        self.mazes = Mazes(self.size, self.randomize_colors, seeds, index)

    def _begin(self, copies: np.ndarray) -> None:
        """Start the next episode in these copies."""
        assert self.mazes is not None
        episodes = [self.mazes.next(int(i)) for i in copies]
        k = self.count
        c = len(copies)
        spheres = np.zeros((c, self.spheres.shape[1], scene.SPHERE_NUMBERS), np.float32)
        colours = COLOURS[np.stack([e.colours for e in episodes])]
        spheres[:, :k, :2] = [e.targets for e in episodes]
        spheres[:, :k, 2] = self.target_height
        spheres[:, :k, 3:6] = np.floor(colours * 255.0)
        spheres[:, :k, 6] = scene.TARGET_RADIUS / scene.CELL
        spheres[:, k:, 3:6] = scene.EARS
        spheres[:, k:, 6] = scene.EARS_RADIUS / scene.CELL
        body = np.zeros((c, 9))
        body[:, :2] = np.stack([e.spawn for e in episodes]) * scene.CELL
        body[:, 2] = scene.BALL_RADIUS
        body[:, 3] = [e.heading for e in episodes]
        where = self._tensor(copies)
        for target, values in (
            (self.cells, np.stack([e.cells for e in episodes])),
            (self.spheres, spheres),
            (self.colours, colours),
            (self.body, body),
            (self.prompt, np.array([e.prompt for e in episodes])),
            (self.key, np.array([e.key for e in episodes])),
            (self.picks, np.zeros(c, np.int64)),
        ):
            target[where] = self._tensor(values)
        self.steps[copies] = 0
        self.ended[copies] = False

    def observe(self) -> torch.Tensor:
        """The current observations, (n, H, H, 3) uint8 on the device."""
        return self._draw(self.top_camera, self.resolution)

    def _draw(self, top: bool, side: int) -> torch.Tensor:
        """Images (n, side, side, 3) uint8 of all copies, framed in the prompted target's colour."""
        x, y, z, h = self.body[:, :4].unbind(1)
        c = torch.cos(h)
        s = torch.sin(h)
        one = torch.ones_like(h)
        count = self.count
        tan = scene.CAMERA_TAN
        if top:
            count = self.spheres.shape[1]
            outer = self.size + 2
            tan = scene.MAP_PADDING * outer * scene.CELL / 2 / scene.MAP_HEIGHT
            camera = [one * outer / 2, one * outer / 2, one * scene.MAP_HEIGHT / scene.CELL, 0 * c, one, 0 * c, one]
            aside = torch.tensor([scene.EARS_ASIDE, -scene.EARS_ASIDE], device=self.device, dtype=h.dtype)
            ears = [x[:, None] + s[:, None] * aside, y[:, None] - c[:, None] * aside]
            ears.append((z + scene.EARS_ABOVE)[:, None].expand(-1, len(scene.EARS)))
            self.spheres[:, self.count :, :3] = (torch.stack(ears, -1) / scene.CELL).float()
        else:
            ahead = scene.CAMERA_AHEAD
            camera = [x + ahead * c, y + ahead * s, z + scene.CAMERA_ABOVE]
            camera = [v / scene.CELL for v in camera] + [c, s, one * scene.CAMERA_COS, one * scene.CAMERA_SIN]
        edge = int(2 * math.sqrt(side // 64))
        prompted = self.colours[torch.arange(self.num_envs, device=self.device), self.prompt]
        out = torch.empty((self.num_envs, side, side, 3), dtype=torch.uint8, device=self.device)
        self._backend.draw(
            self.cells, self.spheres, count, torch.stack(camera, 1).float(), tan, self.wall_height, self.texels, edge,
            (prompted * 255 * 0.7).to(torch.uint8), out,
        )  # fmt: skip
        return out

    def _info(self) -> dict[str, Any]:
        return self.get_probes() if self.probes else {}


_STATE = ("cells", "spheres", "colours", "body", "prompt", "key", "picks")


class FastMemoryMazeEnv(OneCopy):
    """A single maze, for ``gym.make``. Takes the arguments of FastMemoryMazeVecEnv except num_envs."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "top"], "render_fps": 4}
    vector: FastMemoryMazeVecEnv

    def __init__(self, size: int = 9, **kwargs: Any) -> None:
        super().__init__(FastMemoryMazeVecEnv(1, size, **kwargs))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, _ = super().reset(seed=seed)
        return obs, self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.vector.mazes is None or self.vector.ended.any():
            raise ResetNeeded("Memory Maze: call reset before step, at the beginning and after an episode ended")
        if not self.action_space.contains(action):
            raise UserError(_out_of_range(action))
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, self._info()

    def close(self) -> None:
        self.vector.close()

    def get_probes(self) -> dict[str, Any]:
        """The state that the image does not show: the probes of docs/memory-maze.md."""
        return {key: value[0] for key, value in self.vector.get_probes().items()}

    def _info(self) -> dict[str, Any]:
        return self.get_probes() if self.vector.probes else {}


def _staggered_lengths(copies: int, max_steps: int) -> np.ndarray:
    """The lengths in steps, (copies,) int64, of the first episodes of copies with `stagger`."""
    groups = min(STAGGERED_GROUPS, copies)
    group = np.arange(copies) * groups // copies
    return np.maximum(1, max_steps * (group + 1) // groups)


def _valid(actions: torch.Tensor) -> torch.Tensor:
    """The actions (n,) int64: checked if they are on the CPU, clamped if the host would have to wait for them."""
    if actions.device.type != "cpu":
        return actions.clamp(0, len(ACTIONS) - 1)
    low, high = (int(limit) for limit in torch.aminmax(actions))
    if low < 0 or high >= len(ACTIONS):
        raise UserError(_out_of_range(low if low < 0 else high))
    return actions


def _out_of_range(action: Any) -> str:
    names = ", ".join(f"{i} {name}" for i, name in enumerate(ACTIONS))
    return f"action {action!r}: Memory Maze has {names}"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: use 'cpu', 'cuda' or 'cuda:0'") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}: the fast Memory Maze runs on 'cpu' and 'cuda'; use one of these")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name!r}: torch finds no CUDA device here; use device='cpu'")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def _backend(device: torch.device) -> Any:
    if device.type == "cpu":
        from longdream.envs.fast_memory_maze import cpu

        return cpu
    from longdream.envs.fast_memory_maze import cuda

    return cuda


def _texels(device: torch.device) -> torch.Tensor:
    if device not in _TEXELS:
        _TEXELS[device] = torch.from_numpy(texels()).to(device)
    return _TEXELS[device]


_TEXELS: dict[torch.device, torch.Tensor] = {}  # 112 MB, shared by all environments of a process


def _check_memory(device: torch.device, copies: int, side: int, size: int) -> None:
    if copies < 1:
        raise UserError(f"num_envs={copies}: there must be at least 1 copy")
    bytes_per_copy = side * side * BYTES_PER_PIXEL + 4 * (size + 2) ** 2
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if copies * bytes_per_copy > free:
        raise UserError(
            f"num_envs={copies} needs {copies * bytes_per_copy / 2**30:.1f} GiB, and {device} has"
            f" {free / 2**30:.1f} GiB free: use at most {free // bytes_per_copy} copies"
        )
