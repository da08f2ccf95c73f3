"""Scripted policies: their geometry, compared with slow references, and their returns in the original Memory Maze."""

from collections import deque

import numpy as np
import pytest

from longdream.envs.memory_maze.env import MemoryMazeEnv, simulation_class, upstream_imports
from longdream.envs.memory_maze.policies import Navigator, Oracle, PathFollower, Policy, Random, aim, distances, visible


def slow_distances(layout: np.ndarray, x: int, y: int) -> np.ndarray:
    """Breadth-first search, one cell at a time."""
    distance = np.full(layout.shape, np.inf)
    distance[y, x] = 0
    queue = deque([(x, y)])
    while queue:
        x, y = queue.popleft()
        for u, v in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            inside = 0 <= u < layout.shape[1] and 0 <= v < layout.shape[0]
            if inside and layout[v, u] and distance[v, u] == np.inf:
                distance[v, u] = distance[y, x] + 1
                queue.append((u, v))
    return distance


@pytest.mark.parametrize(("n", "size"), [(1, 1), (3, 5), (7, 9), (2, 15)])
def test_distances_equal_those_of_breadth_first_search(n: int, size: int) -> None:
    rng = np.random.default_rng(size)
    layout = (rng.random((n, size, size)) < 0.7).astype(np.uint8)
    goal = rng.integers(size, size=(n, 2)) + 0.3
    layout[np.arange(n), goal[:, 1].astype(int), goal[:, 0].astype(int)] = 1
    result = distances(layout, goal)
    for i in range(n):
        np.testing.assert_array_equal(result[i], slow_distances(layout[i], *goal[i].astype(int)))


def test_walls_block_the_view_and_corners_need_clearance() -> None:
    layout = np.array([[[1, 1, 1], [1, 0, 1], [1, 1, 1]]] * 5, np.uint8)
    a = np.array([(0.5, 0.5)] * 5)
    b = np.array([(2.5, 0.5), (0.5, 2.5), (2.5, 2.5), (1.9, 0.95), (2.95, 0.5)])
    # along two sides; through the wall; past its corner, too close for the ball; up to the outer wall
    np.testing.assert_array_equal(visible(layout, a, b), [True, True, False, False, True])
    assert not visible(layout[:1], a[:1], np.array([(2.5, 0.01)]))


def test_aim_is_the_farthest_visible_point() -> None:
    layout = np.ones((1, 5, 5), np.uint8)
    layout[0, 1:, 1:4] = 0  # two corridors joined along y = 0
    position = np.array([(0.5, 4.5)])
    goal = np.array([(4.5, 4.5)])
    distance = distances(layout, goal)
    np.testing.assert_array_equal(aim(layout, distance, position, goal), [(0.5, 0.5)])
    np.testing.assert_array_equal(aim(layout, distance, np.array([(4.5, 0.5)]), goal), goal)


class Mazes:
    """Several original Memory Mazes without rendering, with their probes stacked."""

    def __init__(self, size: int, seeds: list[int]) -> None:
        make = simulation_class(draws=False)
        self.copies = [make(size) for _ in seeds]
        for copy, seed in zip(self.copies, seeds, strict=True):
            copy.seed(seed)
            copy.reset()

    def probes(self) -> dict[str, np.ndarray]:
        each = [copy.probes() for copy in self.copies]
        return {key: np.stack([probes[key] for probes in each]) for key in each[0]}

    def play(self, policy: Policy, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and actions, (steps, n)."""
        policy.reset(len(self.copies))
        rewards, actions = [], []
        for _ in range(steps):
            actions.append(policy.act(self.probes()))
            rewards.append([copy.step(a)[0] for copy, a in zip(self.copies, actions[-1], strict=True)])
        return np.array(rewards), np.array(actions)


def test_the_oracle_reaches_targets_and_random_actions_do_not() -> None:
    rewards, actions = Mazes(9, [0, 1, 2]).play(Oracle(), 400)
    assert (rewards.sum(0) >= 5).all()  # 28 in 1,000 steps, on average
    assert actions.dtype == np.int64
    chance, _ = Mazes(9, [0]).play(Random(np.random.default_rng(0)), 100)
    assert chance.sum() <= 1
    single_rewards, single_actions = Mazes(9, [1]).play(Oracle(), 60)
    np.testing.assert_array_equal(single_actions[:, 0], actions[:60, 1])
    np.testing.assert_array_equal(single_rewards[:, 0], rewards[:60, 1])


def test_the_navigator_wanders_through_the_whole_maze() -> None:
    mazes = Mazes(9, [3])
    policy = Navigator(np.random.default_rng(0))
    policy.reset(1)
    visited = set()
    goals = set()
    for _ in range(600):
        probes = mazes.probes()
        mazes.copies[0].step(policy.act(probes)[0])
        visited.add(tuple(probes["agent_pos"][0].astype(int)))
        goals.add(tuple(policy.goal[0]))
    assert len(visited) > 0.5 * probes["maze_layout"].sum()
    assert len(goals) > 8
    for x, y in goals:
        assert probes["maze_layout"][0, int(y), int(x)] == 1


def test_noise_is_the_fraction_of_random_actions() -> None:
    n, rng = 500, np.random.default_rng(0)
    probes = {
        "maze_layout": np.ones((n, 9, 9), np.uint8),
        "agent_pos": np.full((n, 2), 4.5),
        "agent_dir": np.tile([0.0, 1.0], (n, 1)),
    }
    policy = Navigator(rng, noise=0.5)
    policy.reset(n)
    actions = policy.act(probes)
    follower = PathFollower()
    follower.reset(n)
    assert (actions != follower.act(probes, policy.goal)).mean() == pytest.approx(0.5 * 5 / 6, abs=0.07)


def test_touches_equal_upstreams() -> None:
    ours = MemoryMazeEnv(9, probes=True)
    with upstream_imports():
        from memory_maze import tasks
    theirs = tasks.memory_maze_9x9(seed=3, image_only_obs=True)
    policy = Oracle()
    policy.reset(1)
    obs, info = ours.reset(seed=3)
    step = theirs.reset()
    total = 0.0
    prompts = []
    for _ in range(150):
        np.testing.assert_array_equal(obs, step.observation)
        action = policy.act({key: np.asarray(value)[None] for key, value in info.items()})[0]
        obs, reward, _, _, info = ours.step(action)
        step = theirs.step(action)
        assert reward == step.reward
        total += reward
        prompts.append(int(info["target_index"]))
    assert total >= 4 and len(set(prompts)) == 3
    ours.close()
    theirs.close()
