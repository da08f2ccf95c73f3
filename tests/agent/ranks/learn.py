"""Run as one rank: updates from one fixed batch of all ranks, of which this rank learns from its part. Rank 0 learns
from the whole batch afterwards, alone.

Randomness is drawn for the whole batch, and each rank takes its rows of it: what then differs is the order of sums.
"""

import json
import os
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.core.ranks import here, joined
from longdream.agent.run import parts
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec

UPDATES = 20


class Shared(TorchDispatchMode):
    """Random tensors `(B, ...)` are this rank's rows of those that one rank would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("rand", "randint"):
            *bounds, size = args
            draw: Any = {"rand": torch.rand, "randint": torch.randint}[name]
            return self.rows(size, lambda shape: draw(*bounds, shape, generator=self.generator))
        if name == "randint_like":
            like, *bounds = args
            draw = torch.randint
            return self.rows(like.shape, lambda s: draw(*bounds, s, generator=self.generator)).to(like.dtype)
        if name in ("rand_like", "randn_like"):
            draw = {"rand_like": torch.rand, "randn_like": torch.randn}[name]
            return self.rows(args[0].shape, lambda shape: draw(shape, generator=self.generator, dtype=args[0].dtype))
        if name == "exponential_":
            like = args[0]
            values = self.rows(like.shape, lambda shape: like.new_empty(shape).exponential_(generator=self.generator))
            return like.copy_(values)
        assert "rand" not in name and "multinomial" not in name, name
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rows(size: Any, draw: Any) -> torch.Tensor:
        ranks = here()
        part = size[0]
        return draw((part * ranks.count, *size[1:]))[ranks.rank * part : (ranks.rank + 1) * part].clone()


def rows_of(spec: EnvSpec, batch: int, length: int) -> dict[str, Any]:
    """A batch with several episodes in its clips, few of which end, so that ranks have unequal shares of everything."""
    rng = np.random.default_rng(7)
    shape = (batch, length)
    obs = {}
    for key, each in spec.obs.items():
        values = (
            rng.integers(0, 255, (*shape, *each.shape))
            if each.kind == "image"
            else rng.normal(size=(*shape, *each.shape))
        )
        obs[key] = values.astype(np.uint8 if each.kind == "image" else np.float64)
    first = rng.random(shape) < np.linspace(0, 0.5, batch)[:, None]
    actions = np.eye(spec.action.size)[rng.integers(spec.action.size, size=shape)]
    terminated = np.zeros(shape, bool)
    terminated[:, :-1] = first[:, 1:] & (rng.random((batch, length - 1)) < 0.7)
    reward = rng.normal(size=shape) * np.linspace(1, 3, batch)[:, None]
    return {
        "obs": obs, "action": actions, "reward": reward, "surprise": np.abs(reward), "is_first": first,
        "terminated": terminated, "truncated": np.zeros(shape, bool),
    }  # fmt: skip


def learn(settings: dict[str, Any], images: bool) -> dict[str, Any]:
    ranks = here()
    obs = {"image": ObsSpec("image", (16, 16, 3))} if images else {"vector": ObsSpec("vector", (4,))}
    spec = EnvSpec(obs, ActionSpec((4,)))
    whole = options.update(options.load("tiny"), {"learn.encoder_rows": 1024, **settings})
    rows = rows_of(spec, whole.replay.batch, whole.replay.length)
    config = ranks.share(whole)
    mine = slice(ranks.rank * config.replay.batch, (ranks.rank + 1) * config.replay.batch)
    rows = {key: value[mine] for key, value in rows.items() if key != "obs"} | {
        "obs": {key: value[mine] for key, value in rows["obs"].items()}
    }
    torch.manual_seed(3)
    agent = Agent(config, spec)
    parts.check_weights(agent)
    losses = []
    with Shared():
        for _ in range(UPDATES):
            metrics = agent.update(rows)
            each = ranks.gather({key: float(value) for key, value in metrics.items()})
            losses.append({key: sum(part[key] for part in each) / ranks.count for key in each[0]})
    parts.check_weights(agent)
    return {"losses": losses, "dream_steps": agent.dream_steps, "skipped": agent.skipped}


def main(cases: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]  (what asks for float32 gets float64 too)
    for place in (joined(), nullcontext()):
        with place:
            print(json.dumps({name: learn(settings, kind == "images") for name, (settings, kind) in cases.items()}))
        if os.environ["RANK"] != "0":
            return


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
