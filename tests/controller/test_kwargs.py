"""`controller.kwargs`: settings of one kind of controller alone."""

import pytest
from stable_baselines3 import PPO

from longdream.controller.config import ControllerConfig
from longdream.controller.evolution import Evolution
from longdream.controller.planner import Planner
from longdream.controller.sb3 import StableBaselines
from longdream.controller.tree import Tree


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (Planner, {"candidates": 0}, "candidates 0: must be at least 1"),
        (Planner, {"method": "cme"}, "method 'cme': should be 'cem' or 'mppi'"),
        (Tree, {"value_weight": -1.0}, "value_weight -1.0: must be at least 0"),
        (Tree, {"simulation": 4}, "simulation: there is no such setting; there are simulations, considered"),
        (Evolution, {"population": 3}, "population 3: must be at least 4"),
        (Evolution, {"deviation": 0.0}, "deviation 0.0: must be more than 0"),
    ],
)
def test_settings_that_do_not_fit(kind: type, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^controller.kwargs.{message}"):
        kind(ControllerConfig(kwargs=kwargs), 4, (3,), 3)


def test_settings_of_stable_baselines_stand_beside_its_arguments() -> None:
    agent = StableBaselines(
        ControllerConfig(kwargs={"copies": 3, "n_epochs": 7, "n_steps": 5, "batch_size": 15}), 4, (3,), 3, PPO
    )
    assert agent.env.num_envs == 3 and agent.algorithm.n_epochs == 7 and agent.algorithm.n_steps == 5
    with pytest.raises(ValueError, match=r"^controller\.kwargs\.copies 0: must be at least 1$"):
        StableBaselines(ControllerConfig(kwargs={"copies": 0}), 4, (3,), 3, PPO)
