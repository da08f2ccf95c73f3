"""`longdream.load`, `train`, `evaluate` and `config`: what the command line does, as functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_type_hints

from longdream.agent.cli.main import begin
from longdream.agent.config import flags, options
from longdream.agent.config.checks import check
from longdream.agent.config.schema import Config
from longdream.agent.library.trained import TrainedAgent
from longdream.agent.run.folder import load_agent
from longdream.envs.contract import UserError

Device = Literal["auto", "cpu", "cuda"]
Run: TypeAlias = str | os.PathLike[str]
"""The folder of a run, a trained agent that comes with the program, by its name, or a `TrainedAgent`."""


def load(run: Run, device: Device | None = None) -> TrainedAgent:
    """The agent of a run as last saved, or one that comes with the program.

    Args:
        run: the folder, such as runs/demo; or memory-maze-9x9. device: where the agent computes; None: as in the run.

    Raises:
        UserError: there is no such run, it was written by another version, it names code that the user has not
            consented to, or it was trained on video and nobody acts in it.
        CheckpointError: a UserError; it has no checkpoint that can be used.

    >>> import longdream as ld
    >>> ld.load("runs/demo").config.env.id
    'longdream/Recall-v0'
    >>> ld.load("memory-maze-9x9").steps
    40000448
    """
    device = flags.read("device", device, Device | None)
    agent, opened = load_agent(Path(run), device)
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
    resume: Run | None = None,
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
    if resume is not None and source is not None:
        raise UserError("train takes a source or a run to resume, not both: a run that is resumed has its settings")
    return begin(source, _by_dotted_name(settings), name, None if resume is None else os.fspath(resume))


def evaluate(
    run: Run,
    *,
    env: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    device: Device | None = None,
    workers: Literal["sync", "async"] | None = None,
    greedy: bool | None = None,
    copies: int | None = None,
    forget_every: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Play whole real episodes with the agent of a run, with the same agent without long memory, and with random
    actions.

    Args:
        run: its folder, or a trained agent.
        env, env_kwargs: another environment with the same observations and actions. None: the run's own.
        episodes: how many of each. None: the run's evaluate.final_episodes.
        seed, device, workers, greedy, copies: None for those of the run.
        forget_every: play also with M's long memory erased every so many steps.

    Returns:
        `return_mean`, `return_std`, `return_ci95`, `length_mean`, `random_mean`, `without_memory_mean` and more, as
        `longdream evaluate --json`. Returns are sums of undiscounted rewards, lengths are in steps of the environment.

    Raises:
        UserError: there is no such run, the environment does not fit it, or a value is of another type or out of its
            range. EnvError: the environment failed.

    >>> import longdream as ld
    >>> ld.evaluate("runs/demo", episodes=4)["episodes"]
    4
    """
    from longdream.agent.cli import evaluate as command

    given: dict[str, Any] = {"env": env, "env_kwargs": env_kwargs, "episodes": episodes, "seed": seed, "device": device}
    given |= {"workers": workers, "greedy": greedy, "copies": copies, "forget_every": forget_every}
    hints = get_type_hints(command.evaluate)
    given = {name: flags.read(name, value, hints[name]) for name, value in given.items()}
    return command.evaluate(Path(run), **given, console=False)


def _by_dotted_name(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        options.full_name(name): os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in settings.items()
    }
