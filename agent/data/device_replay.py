"""Collecting and replay where M learns: frames of an environment that makes tensors never leave the accelerator.

For vector environments with `reset_tensors(seed)` and `step_tensors(actions)`, NEXT_STEP autoreset and a Discrete
action, like `longdream/FastMemoryMaze-9x9-v0`. The counterparts of agent/train/collector.py and agent/data/replay.py,
with the same methods.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longdream.agent.core.agent import Agent, Carry
from longdream.agent.core.cuda_graphs import Graphed
from longdream.agent.train.collector import SURPRISES
from longdream.controller.types import Planning
from longdream.envs.contract import EnvSpec, UserError
from longdream.envs.make import World, derive_seed
from longdream.worldmodel.dynamics import State


class DeviceRow(NamedTuple):
    """A row of n copies, as longdream.envs.contract.Row, of tensors."""

    obs: dict[str, Tensor]
    is_first: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


class DeviceReplay:
    """The last `capacity` rows of n streams in the memory of `device`: a ring, (time, stream).

    It is no part of a checkpoint: a run that is resumed collects anew before it learns on.

    Raises:
        UserError: more than the device has room for.
    """

    def __init__(
        self,
        device: torch.device,
        spec: EnvSpec,
        num_envs: int,
        capacity: int,
        around: Literal["surprise", "reward"] = "surprise",
    ):
        self.device, self.num_envs, self.times, self.around = device, num_envs, capacity // num_envs, around
        if self.times < 1:
            raise UserError(f"replay.capacity = {capacity} is less than a row for each of {num_envs} copies")
        kinds = {"image": torch.uint8, "vector": torch.float32, "discrete": torch.int64}
        shapes = {f"obs/{key}": (obs.shape, kinds[obs.kind]) for key, obs in spec.obs.items()}
        shapes["action"] = (spec.action.size,), torch.uint8 if spec.action.parts else torch.float32
        shapes |= {key: ((), torch.float32) for key in ("reward", "surprise")}
        shapes |= {key: ((), torch.bool) for key in ("is_first", "terminated", "truncated")}
        try:
            self.fields = {
                name: torch.zeros(self.times, num_envs, *shape, dtype=kind, device=device)
                for name, (shape, kind) in shapes.items()
            }
        except RuntimeError:  # on CUDA, OutOfMemoryError, which is one
            raise UserError(
                f"replay.capacity = {capacity:,} rows do not fit the memory of {device}: lower it, or keep the replay "
                f"on disk (replay.keep = disk)"
            ) from None
        self.firsts = np.zeros((self.times, num_envs), bool)  # is_first once more, where drawing needs no device
        self.added = 0  # rows of each stream so far

    def __len__(self) -> int:
        return min(self.added, self.times) * self.num_envs

    @property
    def longest_clip(self) -> int:
        """Rows of the longest clip that a full replay can draw."""
        return self.times

    def add(self, row: DeviceRow, action: Tensor, surprise: Tensor, first: np.ndarray) -> None:
        """One row of every stream; first `(n,)` is row.is_first on the host."""
        at = self.added % self.times
        for key, value in row.obs.items():
            self.fields[f"obs/{key}"][at] = value
        for key in ("reward", "is_first", "terminated", "truncated"):
            self.fields[key][at] = getattr(row, key)
        self.fields["action"][at] = action.to(self.fields["action"].dtype)
        self.fields["surprise"][at] = surprise
        self.firsts[at] = first
        self.added += 1

    def can_sample(self, length: int) -> bool:
        return min(self.added, self.times) >= length

    def sample(
        self, rng: np.random.Generator, batch: int, length: int, starts: float = 0.0, weight: float = 0.0
    ) -> dict[str, Any]:
        """`batch` clips of `length` rows, drawn as `Replay.sample` draws them; tensors on the device."""
        held = min(self.added, self.times)
        oldest = self.added - held  # times count from the first row ever added
        last = held - length  # of where a clip may begin, counted from the oldest row
        begin, env = rng.integers(last + 1, size=batch), rng.integers(self.num_envs, size=batch)
        kind = rng.random(batch)
        order = (oldest + np.arange(held)) % self.times
        if starts and (which := np.flatnonzero(kind < starts)).size:
            found, stream = np.nonzero(self.firsts[order[: last + 1]])
            if found.size:
                pick = rng.integers(found.size, size=which.size)
                begin[which], env[which] = found[pick], stream[pick]
        if weight and (which := np.flatnonzero((kind >= starts) & (kind < starts + weight))).size:
            telling = self.fields[self.around][torch.from_numpy(order).to(self.device)]
            mass = (telling.clamp(min=0) if self.around == "surprise" else telling != 0).double().flatten()
            ends = mass.cumsum(0)
            if float(ends[-1]) > 0:
                level = torch.from_numpy(rng.random(which.size)).to(self.device) * ends[-1]
                hit = torch.searchsorted(ends, level, right=True).clamp(max=len(ends) - 1).cpu().numpy()
                around, env[which] = np.divmod(hit, self.num_envs)
                low, high = np.maximum(0, around - length + 1), np.minimum(around, last)
                begin[which] = low + (rng.random(which.size) * (high - low + 1)).astype(np.int64)
        time = (oldest + begin[:, None] + np.arange(length)) % self.times
        rows, streams = (torch.from_numpy(v).to(self.device) for v in (time, env[:, None]))
        out = {name: values[rows, streams] for name, values in self.fields.items()}
        out["action"] = out["action"].float()
        obs = {name[4:]: out.pop(name) for name in list(out) if name.startswith("obs/")}
        return {"obs": obs, **out}

    def state(self) -> dict[str, Any]:
        return {"kept": "on the device"}

    def restore(self, state: dict[str, Any]) -> list[str]:
        return ["the replay was in the accelerator's memory: it is collected anew before learning goes on"]

    def commit_eviction(self) -> None:
        """Nothing of it is on disk."""

    def close(self) -> None:
        self.fields = {}


class DeviceCollector:
    """As `Collector`, for an environment that makes tensors: per step, the flags of ended and begun episodes are all
    that the host gets to see."""

    def __init__(self, world: World, agent: Agent, replay: DeviceReplay, rng: np.random.Generator, seed: int):
        self.vector: Any = world.vector
        self.world, self.agent, self.replay, self.learn = world, agent, replay, agent.config.learn
        n, device = world.num_envs, agent.device
        self.random = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        obs = self.vector.reset_tensors([derive_seed(seed, i, 0) for i in range(n)])
        no = torch.zeros(n, dtype=torch.bool, device=device)
        self.row = DeviceRow(self._pack(obs), ~no, no.float(), no, no)
        self.first = np.ones(n, bool)
        self.carry: Carry = agent.initial(n)
        # return, length and the parts of surprise of the running episodes
        self.running = torch.zeros(2 + len(SURPRISES), n, device=device)
        recorded = agent.capturable and not isinstance(agent.controller, Planning)  # plans branch on values
        self.take_in = Graphed(self._take_in) if recorded else self._take_in
        self.env_steps = 0
        self.episodes = 0
        self.earned = torch.zeros((), dtype=torch.float64, device=device)

    def take_earned(self) -> float:
        """As longdream.agent.train.collector.Collector.take_earned."""
        earned = float(self.earned)
        self.earned.zero_()
        return earned

    @torch.no_grad()
    def step(self, random: bool) -> list[dict[str, float]]:
        """One step of every copy; metrics of each episode that ended. See `Collector.step`."""
        row, n, parts = self.row, self.world.num_envs, self.agent.spec.action.parts[0]
        self.carry, seen, chosen = self.take_in(self.carry, row)
        self.running += seen
        self.earned += seen[0].sum()
        device = self.agent.device
        choice = torch.randint(parts, (n,), device=device, generator=self.random)
        if self.learn.sticky:
            again = torch.rand(n, device=device, generator=self.random) < self.learn.sticky
            choice = torch.where(again & ~row.is_first, self.carry.action.argmax(-1), choice)
        if not random:
            dare = torch.rand(n, device=device, generator=self.random) < self.learn.explore
            choice = torch.where(dare, choice, chosen)
        action = torch.nn.functional.one_hot(choice, parts).float()
        self.carry = self.carry._replace(action=action)
        # what an M that has learned nothing did not expect tells nothing
        self.replay.add(row, action, torch.zeros_like(seen[-1]) if random else seen[-1], self.first)
        over = row.terminated | row.truncated
        self.first = over.cpu().numpy()  # what follows an end is a first row
        ended = self._ended(self.first)
        obs, reward, terminated, truncated = self.vector.step_tensors(choice)
        self.row = DeviceRow(self._pack(obs), over, reward, terminated, truncated)
        self.env_steps += int((~self.first).sum())
        return ended

    def _take_in(self, carry: Carry, row: DeviceRow) -> tuple[Carry, Tensor, Tensor]:
        """The carry after the row; its reward, length and surprises `(2 + parts, n)`; the action to take `(n,)`."""
        carry, surprise = self.agent.observe(carry, row)
        assert surprise is not None
        seen = torch.stack([row.reward, (~row.is_first).float(), *surprise, surprise.total()])
        return carry, torch.nan_to_num(seen, 0.0, 0.0, 0.0), self.agent.choose(carry, False).argmax(-1)

    def _pack(self, obs: Any) -> dict[str, Tensor]:
        return dict(obs) if isinstance(obs, dict) else {next(iter(self.agent.spec.obs)): obs}

    def _ended(self, over: np.ndarray) -> list[dict[str, float]]:
        which = np.flatnonzero(over)
        if not which.size:
            return []
        at = torch.from_numpy(which).to(self.agent.device)
        total, length, *surprises = self.running[:, at].cpu().numpy()
        self.running[:, at] = 0
        self.episodes += len(which)
        means = dict(zip(SURPRISES, surprises / np.maximum(length, 1), strict=True))
        columns = {"return": total, "length": length, **means}
        return [{f"episode/{key}": float(value[i]) for key, value in columns.items()} for i in range(len(which))]

    def get_state(self) -> dict[str, Any]:
        """What set_state needs to go on."""
        feat, state, action = self.carry
        return {
            "world": self.vector.get_state(),
            "row": {"obs": dict(self.row.obs), **{key: getattr(self.row, key) for key in DeviceRow._fields[1:]}},
            "carry": {"feat": feat, "state": dict(state._asdict()), "action": action},
            "running": self.running,
            "first": self.first,
            "random": self.random.get_state(),
            "counters": [self.env_steps, self.episodes],
            "earned": float(self.earned),
        }

    def set_state(self, tree: dict[str, Any]) -> None:
        """Go on where get_state was called."""
        device = self.agent.device
        self.vector.set_state(tree["world"])
        row = {key: value.to(device) for key, value in tree["row"].items() if key != "obs"}
        self.row = DeviceRow({key: value.to(device) for key, value in tree["row"]["obs"].items()}, **row)
        carry = tree["carry"]
        state = State(**carry["state"]).map(lambda t: t.to(device))
        self.carry = Carry(carry["feat"].to(device), state, carry["action"].to(device))
        self.running, self.first = tree["running"].to(device), np.array(tree["first"])
        self.random.set_state(tree["random"].cpu())
        self.env_steps, self.episodes = tree["counters"]
        self.earned.fill_(tree.get("earned", 0.0))
