"""`longdream.load`, `train`, `evaluate` and `config`: what the command line does, as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from longdream.agent.cli.main import begin
from longdream.agent.config import options
from longdream.agent.config.checks import check
from longdream.agent.config.schema import Config
from longdream.agent.library.trained import TrainedAgent
from longdream.agent.run.folder import load_agent

Device = Literal["auto", "cpu", "cuda"]


def load(run: str | Path, device: Device | None = None) -> TrainedAgent:
    """The agent of a run as last saved.

    Args:
        run: the folder, such as runs/demo. device: where the agent computes; None: as in the run.

    Raises:
        UserError: there is no such run, it was written by another version, it names code that the user has not
            consented to, or it was trained on video and nobody acts in it.
        CheckpointError: a UserError; it has no checkpoint that can be used.

    >>> import longdream as ld
    >>> ld.load("runs/demo").config.env.id
    'longdream/Recall-v0'
    """
    agent, opened = load_agent(run, device)
    return TrainedAgent(agent, opened.folder, opened.saved[1])


def config(source: str = "", **settings: Any) -> Config:
    """A configuration, checked as that of the command line is.

    Args:
        source: a preset or a YAML file; none: the defaults.
        settings: by name, as the flags of `longdream train`: `seed=3`, `**{"worldmodel.layers": 4}`.

    Raises:
        UserError: an unknown name, a value of another type or out of its range, or settings that contradict each other.

    >>> import longdream as ld
    >>> ld.config("quickstart", steps=12_000, **{"env.kwargs.corridor": 24}).env.kwargs["corridor"]
    24
    >>> ld.config("quickstart", seed=-1)
    Traceback (most recent call last):
    longdream.envs.contract.UserError: seed -1: must be at least 0
    """
    start = options.load(source) if source else Config()
    result = options.changed(start, _by_dotted_name(settings))
    check(result)
    return result


def train(
    source: str | Config | None = None,
    *,
    name: str | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train V, M and C in a new run below runs/, or go on with one, as `longdream train` does.

    Args:
        source: a preset, a YAML file or a `config`; None with `resume`, `init` or `world`.
        name: of the new folder (None: SOURCE-sSEED-1, or -2, ...). resume: a run to go on with.
        settings: by name, as the flags: `env="my_envs:Corridor-v0", steps=12_000, init="runs/demo"`, and
            `**{"worldmodel.layers": 4}`.

    Returns:
        the summary of the run, as in its summary.json (`return_mean`, `env_steps`, ...), with its folder as `run`.

    Raises:
        UserError: settings that cannot be used, or a folder that is in use. Others as `longdream train`: an environment
            that failed (EnvError), a signal (Interrupted), a full disk (DiskFull).

    >>> import longdream as ld
    >>> summary = ld.train("tiny", seed=1, steps=100, name="first", **{"evaluate.final_episodes": 2})
    >>> summary["env_steps"] >= 100, summary["run"]
    (True, 'runs/first')
    """
    return begin(source, _by_dotted_name(settings), name, resume)


def evaluate(
    run: str | Path,
    *,
    env: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    device: Device | None = None,
    workers: Literal["sync", "async"] | None = None,
    greedy: bool | None = None,
) -> dict[str, Any]:
    """Play whole real episodes with the agent of a run, with the same agent without long memory, and with random
    actions.

    Args:
        run: its folder.
        env, env_kwargs: another environment with the same observations and actions. None: the run's own.
        episodes: how many of each. None: the run's evaluate.final_episodes.
        seed, device, workers, greedy: None for those of the run.

    Returns:
        `return_mean`, `return_std`, `return_ci95`, `length_mean`, `random_mean`, `without_memory_mean` and more, as
        `longdream evaluate --json`.

    Raises:
        UserError: there is no such run, or the environment does not fit it. EnvError: the environment failed.

    >>> import longdream as ld
    >>> ld.evaluate("runs/demo", episodes=4)["episodes"]
    4
    """
    from longdream.agent.cli import evaluate as command

    settings = (env, env_kwargs, episodes, seed, device, workers, greedy)
    return command.evaluate(Path(run), *settings, console=False)


def _by_dotted_name(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        options.full_name(name): str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
