"""Between host and device: actions are encoded as the contract has it, and what is fetched is the caller's own."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch.utils import _pytree as pytree

from longdream.agent.dream_env.transfer import Actions, fetched, index
from longdream.envs.contract import ActionSpec, UserError, env_spec

SPACES = [
    spaces.Discrete(3),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([3, 2, 5]),
    spaces.MultiDiscrete([[3, 2], [1, 4]], start=[[0, -1], [7, 2]]),
    spaces.Box(-2.0, 3.0, (2, 2), np.float32),
    spaces.Box(np.array([0.0, 1.0]), np.array([1.0, 1.0]), dtype=np.float64),  # one that cannot move
    spaces.Box(-3, 9, (2,), np.int16),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def taken(space: spaces.Space, n: int, device: str = "cpu") -> tuple[Actions, ActionSpec, Any]:
    spec = env_spec(spaces.Discrete(2), space).action
    batched = batch_space(space, n)
    return Actions(spec, batched, n, torch.device(device)), spec, batched


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actions_are_encoded_as_the_contract_has_it(space: spaces.Space, device: str) -> None:
    actions, spec, batched = taken(space, 9, device)
    batched.seed(0)
    for _ in range(3):
        native = batched.sample()
        actions.put(native)
        encoded = actions.encoded()
        assert encoded.dtype == torch.float32 and encoded.device.type == device
        np.testing.assert_array_equal(encoded.cpu().numpy(), spec.encode(native).clip(-1, 1))


@pytest.mark.parametrize("space", SPACES[:4], ids=str)
def test_choices_beyond_a_space_are_refused(space: Any) -> None:
    actions, _, batched = taken(space, 5)
    native = batched.sample()
    for far in (-1, 1):
        wrong = native.copy()
        ends = (np.asarray(space.start), np.asarray(space.start) + (space.n if hasattr(space, "n") else space.nvec) - 1)
        wrong[3] = ends[far > 0] + far
        with pytest.raises(UserError, match="actions"):
            actions.put(wrong)
    with pytest.raises(UserError, match="actions"):
        actions.put(native.astype(float))
    with pytest.raises(UserError, match="actions"):
        actions.put(native[:4])
    actions.put(native.astype(np.int8))


@pytest.mark.parametrize("space", SPACES[4:6], ids=str)
def test_boxes_are_clipped_and_finite(space: Any) -> None:
    actions, spec, batched = taken(space, 5)
    far = np.full(batched.shape, 1e300)
    actions.put(far)
    moves = np.array(spec.high) > np.array(spec.low)
    assert (actions.encoded().numpy() == moves).all()
    for bad in (np.nan, np.inf):
        far[2] = bad
        with pytest.raises(UserError, match="finite"):
            actions.put(far)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_fetched_is_in_order_and_ones_own(device: str) -> None:
    def part(*shape: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 2 if kind == torch.bool else 100, shape, device=device).to(kind)

    tree = {
        "eye": part(3, 5, 7, 1, kind=torch.uint8),
        "pair": (part(3, 4, kind=torch.float32).T, part(2, 3, kind=torch.float32)),
        "gear": part(3, kind=torch.int64),
        "on": part(3, kind=torch.bool),
    }
    wanted = pytree.tree_map(lambda t: t.cpu().numpy().copy(), tree)
    arrays, later = fetched(tree, torch.device(device)), fetched(tree, torch.device(device))
    for tensor in pytree.tree_leaves(tree):
        tensor.zero_()
    for array in pytree.tree_leaves(later):
        array[...] = 1
    for got, known in zip(pytree.tree_leaves(arrays), pytree.tree_leaves(wanted), strict=True):
        assert got.dtype == known.dtype
        np.testing.assert_array_equal(got, known)


@pytest.mark.parametrize("device", DEVICES)
def test_indices_arrive(device: str) -> None:
    rows = np.array([4, 0, 2])
    there = index(rows, torch.device(device))
    assert there.device.type == device and torch.arange(5, device=device)[there].tolist() == [4, 0, 2]
