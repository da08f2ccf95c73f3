"""Runs that begin with the weights of another: fine-tuning."""

from pathlib import Path

import pytest
import torch

from longdream.agent.cli import main as cli
from longdream.agent.config import options
from longdream.agent.config.schema import Config
from longdream.agent.run import folder as run_folder
from longdream.agent.run.warm_start import RAMP
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs.contract import UserError


def tiny(**settings: object) -> Config:
    few = {"learn.steps": 180, "learn.prefill": 100, "evaluate.every": 0, "evaluate.final_episodes": 2}
    return options.update(options.load("tiny"), few | {key.replace("__", "."): v for key, v in settings.items()})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "source"
    OnlineTrainer.train(tiny(), folder, console=False)
    return folder


def test_a_run_begins_with_the_weights_of_another(source: Path, tmp_path: Path, monkeypatch) -> None:
    """V, M and C, with new optimizers; the agent acts in the prefill, and the rates rise from update to update."""
    wanted = run_folder.load_agent(source)[0]
    seen = []
    scales = []
    act = OnlineTrainer.act

    def watched(self: OnlineTrainer, random: bool) -> None:
        if not seen:
            for name, module in self.agent.modules().items():
                weights = module.state_dict()
                for key, value in wanted.modules()[name].state_dict().items():
                    assert torch.equal(weights[key], value), key
            assert not any(optimizer.adamw.state for optimizer in self.agent.optimizers.values())
            assert self.agent.updates == 0
        seen.append(random)
        if self.count["learning_began"]:
            scales.append((self.agent.updates, self.rate_scale()))
        act(self, random)

    monkeypatch.setattr(OnlineTrainer, "act", watched)
    summary = OnlineTrainer.train(tiny(seed=4, init=str(source)), tmp_path / "run", console=False)
    assert summary["env_steps"] >= 180 and not any(seen)
    assert len(scales) > 5 and all(scale == min(1.0, (updates + 1) / RAMP) for updates, scale in scales)


def test_it_brings_its_settings_and_resumes(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--init", str(source), "--seed", "5", "--name", "tuned", "--env.kwargs.corridor", "4"]
    assert cli.main(command) == 0
    config = run_folder.open_run("runs/tuned").config
    assert config.learn.steps == 180 and config.env.kwargs["corridor"] == 4 and config.init == str(source)
    assert cli.main(["train", "--resume", "runs/tuned", "--steps", "200"]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "nowhere"}, "nowhere: there is no such run"),
        ({"worldmodel.width": 24}, r"its model is not the one of this run.*encoder, worldmodel, forcing"),
        ({"controller.hidden": 7}, "its controller is not the one of this run"),
        ({"env.kwargs.doors": 4}, r"it was trained on .* and this environment has"),
    ],
)
def test_parts_that_do_not_fit_are_refused(source: Path, tmp_path: Path, settings: dict, message: str) -> None:
    config = options.update(tiny(init=str(source)), settings)
    with pytest.raises(UserError, match=message):
        OnlineTrainer.train(config, tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()
