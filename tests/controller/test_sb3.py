from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from longdream.controller.config import ControllerConfig
from longdream.controller.sb3 import DreamVec, StableBaselines, _space, encode
from longdream.controller.types import Improving
from longdream.worldmodel.dream import Starts

CONFIG = ControllerConfig(gamma=0.9, horizon=8)
QUICK = {"n_epochs": 4, "batch_size": 64, "learning_rate": 3e-3, "ent_coef": 0.01}


def build(states: int, algorithm=PPO, parts: tuple[int, ...] = (2,), actions: int = 2, **options) -> StableBaselines:
    kwargs = options.pop("kwargs", QUICK if algorithm is PPO else {})
    settings = {"copies": 16, **kwargs, **options}
    return StableBaselines(replace(CONFIG, kwargs=settings), states, parts, actions, algorithm)


def improve(agent: StableBaselines, world, places: int, times: int) -> list[dict[str, Tensor]]:
    starts = Starts(*world.start(torch.arange(places).repeat(4)), torch.ones(4 * places))
    return [agent.improve(world, starts) for _ in range(times)]


def test_ppo_learns_to_wait_in_the_dream(chained) -> None:
    agent = build(5)
    metrics = improve(agent, chained, 5, 40)
    assert agent.act(torch.eye(5), True)[:, 1].tolist() == [1.0] * 5
    assert metrics[-1]["return"] > metrics[0]["return"] + 0.3 and metrics[-1]["steps"] == 40 * 8 * 16 == chained.dreamt
    assert isinstance(agent, Improving) and not list(agent.parameters())


def test_boxes(places) -> None:
    target = torch.tensor([[-0.6], [0.5]])

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cost = (action - target[place]).square().sum(-1)
        return -cost, torch.ones_like(cost), 1 - place

    agent = build(2, PPO, (), 1)
    improve(agent, places(2, step), 2, 30)
    assert (agent.act(torch.eye(2), True) - target).abs().max() < 0.35


def test_one_that_learns_from_its_own_replay(chained) -> None:
    agent = build(5, DQN, kwargs={"learning_starts": 32, "train_freq": 4})
    metrics = improve(agent, chained, 5, 3)
    assert metrics[-1]["steps"] == 3 * 8 * 16 and np.isfinite(metrics[-1]["return"].item())
    assert agent.algorithm.replay_buffer.size() == 3 * 8


def test_several_factors(places) -> None:
    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = action[:, :2].argmax(-1)
        second = action[:, 2:].argmax(-1)
        return (first == place).float() + (second == 2 - place).float(), torch.ones(len(place)), place

    agent = build(2, PPO, (2, 3), 5)
    improve(agent, places(2, step), 2, 30)
    assert agent.act(torch.eye(2), True).tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]]


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_a_resumed_one_goes_on_exactly_and_the_zip_is_sb3s(chained, tmp_path: Path, algorithm) -> None:
    torch.manual_seed(0)
    agent = build(5, algorithm)
    improve(agent, chained, 5, 2)
    rng_state = torch.get_rng_state()
    saved = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, agent.state_dict())
    improve(agent, chained, 5, 3)
    torch.manual_seed(99)
    other = build(5, algorithm)
    other.load_state_dict(saved)
    torch.set_rng_state(rng_state)
    improve(other, chained, 5, 3)
    ours, theirs = (dict(a.algorithm.policy.state_dict()) for a in (agent, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    agent.export(tmp_path)
    loaded = algorithm.load(tmp_path / "controller.zip", device="cpu")
    chosen, _ = loaded.predict(np.eye(5, dtype=np.float32), deterministic=True)
    assert torch.equal(encode(chosen, (2,)), agent.act(torch.eye(5), True))


def test_dreams_begin_at_moments_that_had_not_ended_and_end_as_sb3_wants(places) -> None:
    """Place 1 is an end. From 0 a dream goes on by action 1, and ends by action 0."""

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert not (place == 1).any()
        stop = action[:, 0] > 0.5
        return torch.ones(len(place)), (~stop).float(), torch.where(stop, 2, place)

    world = places(3, step)
    env = DreamVec(3, _space((2,), 2), copies=4, horizon=3)
    place = torch.tensor([0, 1]).repeat(8)
    env.open(world, Starts(*world.start(place), (place == 0).float()))
    obs = env.reset()
    assert obs.tolist() == [[1, 0, 0]] * 4
    actions = np.array([1, 1, 1, 0])
    obs, reward, done, infos = env.step(actions)
    assert reward.tolist() == [1] * 4 and done.tolist() == [False, False, False, True]
    assert infos[3]["terminal_observation"].tolist() == [0, 0, 1] and not infos[3]["TimeLimit.truncated"]
    assert obs.tolist() == [[1, 0, 0]] * 4 and infos[0] == {}
    env.step(np.ones(4, int))
    _, _, done, infos = env.step(np.ones(4, int))
    assert done.tolist() == [True, True, True, False]
    assert all(
        infos[i]["TimeLimit.truncated"] and infos[i]["terminal_observation"].tolist() == [1, 0, 0] for i in (0, 1)
    )


class Counter(BaseCallback):
    seen = 0

    def _on_step(self) -> bool:
        Counter.seen += 1
        return True


def test_callbacks_are_called(chained) -> None:
    Counter.seen = 0
    improve(build(5, callback=f"{__name__}:Counter"), chained, 5, 2)
    assert Counter.seen == 2 * CONFIG.horizon


@pytest.mark.parametrize(
    ("algorithm", "parts", "options", "problem"),
    [
        (SAC, (2,), {}, "SAC cannot take Discrete actions: PPO, A2C, DQN can"),
        (DQN, (2, 3), {}, "DQN cannot take MultiDiscrete actions: PPO, A2C can"),
        (DQN, (), {}, "DQN cannot take Box actions: PPO, A2C, SAC, TD3, DDPG can"),
        (PPO, (2,), {"kwargs": {"n_stepps": 3}}, "n_stepps"),
        (
            DQN,
            (2,),
            {"kwargs": {"train_freq": [1, "episode"]}},
            "train_freq = 1 episodes: DQN counts",
        ),
        (DQN, (2,), {"kwargs": {"train_freq": [1, "day"]}}, "train_freq"),
        (PPO, (2,), {"kwargs": {"n_steps": 1}, "copies": 1}, "PPO with controller.kwargs = {'n_steps': 1}: "),
        (PPO, (2,), {"callback": "nowhere:Nothing"}, "controller.kwargs.callback = nowhere:Nothing"),
    ],
)
def test_bad_input(algorithm, parts, options: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        build(3, algorithm, parts, max(1, sum(parts)), **options)
    assert "\n" not in str(caught.value)


def test_what_takes_which_actions_is_said_truly() -> None:
    from longdream.controller.sb3 import ALGORITHMS

    for space, names in ALGORITHMS.items():
        parts = {"Discrete": (2,), "MultiDiscrete": (2, 3), "Box": ()}[space.__name__]
        for algorithm in (PPO, A2C, DQN, SAC, TD3, stable_baselines3.DDPG):
            try:
                build(3, algorithm, parts, max(1, sum(parts)), kwargs={})
                able = True
            except ValueError:
                able = False
            assert able == (algorithm.__name__ in names.split(", ")), (space, algorithm)


@pytest.mark.parametrize(("name", "parts"), [("TRPO", (2,)), ("QRDQN", (2,)), ("ARS", ()), ("TQC", ()), ("CrossQ", ())])
def test_algorithms_of_sb3_contrib_learn(places, name: str, parts: tuple[int, ...]) -> None:
    algorithm = getattr(pytest.importorskip("sb3_contrib"), name)

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return -action.square().sum(-1), torch.ones(len(place)), place

    agent = build(5, algorithm, parts, max(1, sum(parts)))
    metrics = improve(agent, places(5, step), 5, 2)
    assert np.isfinite(metrics[-1]["return"].item()) and agent.act(torch.eye(5), True).shape == (5, max(1, sum(parts)))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "MaskablePPO",
            "MaskablePPO needs masks of valid actions, which M does not predict: use one of",
        ),
        ("RecurrentPPO", "RecurrentPPO keeps a state between its steps, and C is given M's memory instead: use one of"),
        ("TQC", "TQC cannot take Discrete actions: PPO, A2C, DQN can"),
    ],
)
def test_algorithms_of_sb3_contrib_that_do_not_fit(name: str, problem: str) -> None:
    algorithm = getattr(pytest.importorskip("sb3_contrib"), name)
    with pytest.raises(ValueError, match=problem) as caught:
        build(5, algorithm)
    assert "\n" not in str(caught.value)


def test_another_policy_than_the_default_one(chained) -> None:
    algorithm = pytest.importorskip("sb3_contrib").ARS
    agent = build(5, algorithm, kwargs={"policy": "LinearPolicy"})
    assert "Linear" in type(agent.algorithm.policy).__name__
    with pytest.raises(ValueError, match=r"PPO with controller\.kwargs.*Policy NoPolicy unknown"):
        build(5, PPO, kwargs={"policy": "NoPolicy"})


def test_dreams_have_no_attributes_of_environments() -> None:
    env = DreamVec(3, _space((2,), 2), copies=4, horizon=3)
    assert env.get_attr("render_mode", [0, 2]) == [None, None] and not env.has_attr("action_masks")
    with pytest.raises(AttributeError, match="action_masks: dreams have no methods to call"):
        env.env_method("action_masks")
