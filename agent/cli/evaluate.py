"""`longdream evaluate`, `longdream diagnose` and `longdream envs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from longdream.envs.contract import UserError


def evaluate(
    run_folder: Path,
    env: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    workers: Literal["sync", "async"] | None = None,
    greedy: bool | None = None,
    copies: int | None = None,
    forget_every: tuple[int, ...] = (),
    console: bool = True,
) -> dict[str, Any]:
    """Play whole real episodes: with the trained agent; the same without long memory; and with random actions.

    In place of a run, the name of a scripted policy, oracle, navigator or random, plays in Memory Maze.

    examples
      longdream evaluate runs/quickstart-s0-1 --episodes 100
      longdream evaluate runs/quickstart-s0-1 --env.kwargs.corridor 24
      longdream evaluate runs/maze-s0-1 --env longdream/MemoryMaze-9x9-v0 --episodes 50 --workers async
      longdream evaluate runs/maze-s0-1 --env longdream/FastMemoryMaze-9x9-v0 --episodes 256 --copies 256
      longdream evaluate runs/maze-s0-1 --forget_every 30,100,250
      longdream evaluate oracle --env longdream/MemoryMaze-15x15-v0 --episodes 10

    Args:
        run_folder: of the run, or the name of a scripted policy.
        env: another environment, with the same observations and actions (default: the run's own). It is made with the
            arguments that --env.kwargs gives, not with the run's.
        env_kwargs: its arguments, one by one as --env.kwargs.corridor 24, or all as JSON.
        episodes: how many (default: the run's evaluate.final_episodes; 10 for a scripted policy).
        seed: of the episodes (default: the run's, for those of its own evaluation).
        device: where the agent computes (default: as in the run).
        workers: copies of the environment in this process, or in one each (default: as in the run).
        greedy: its most probable actions, or sampled ones (default: as in the run).
        copies: of the environment, which play at once (default: as in the run).
        forget_every: play also with M's long memory erased every so many steps: how much is remembered, and how long.

    Raises:
        UserError: no run, or an environment that does not fit it.
    """
    # imported here, so that --help is quick
    from longdream.agent.config import options
    from longdream.agent.config.checks import check
    from longdream.agent.evaluation.policy import evaluate_agent
    from longdream.agent.evaluation.tables import summary_table
    from longdream.agent.run.folder import load_agent
    from longdream.envs.memory_maze.sizes import references

    least = [("episodes", episodes, 1), ("seed", seed, 0), ("copies", copies, 1)]
    for flag, value, smallest in [*least, *(("forget_every", steps, 1) for steps in forget_every)]:
        if value is not None and value < smallest:
            raise UserError(f"--{flag} {value}: must be at least {smallest}")
    if str(run_folder) in ("oracle", "navigator", "random"):
        from longdream.agent.evaluation.baselines import scripted

        policy: Any = str(run_folder)
        where = env or "longdream/MemoryMaze-9x9-v0"
        summary = scripted.evaluate(policy, where, env_kwargs, 10 if episodes is None else episodes, seed or 0)
        if console:
            summary_table(summary)
        return summary
    agent, run = load_agent(run_folder, device)
    config = agent.config
    settings: dict[str, Any] = {"env.id": env, "env.workers": workers, "seed": seed, "evaluate.greedy": greedy}
    settings["evaluate.final_episodes"] = episodes
    settings["evaluate.copies"] = copies
    settings = {name: value for name, value in settings.items() if value is not None}
    without = ""
    if env is not None and _registered(env) != _registered(config.env.id):
        settings["env.kwargs"] = {}  # the run's arguments are those of its own environment
        if config.env.kwargs and not env_kwargs:
            own = " ".join(f"--env.kwargs.{key} {value}" for key, value in config.env.kwargs.items())
            without = f", without what the run's own environment was given: {own}"
    for key, value in (env_kwargs or {}).items():
        settings[f"env.kwargs.{key}"] = value
    config = options.update(config, settings)
    check(config)
    episodes = config.evaluate.final_episodes
    if console:
        print(f"playing {episodes} episodes of {config.env.id}{without}", file=sys.stderr)
    summary = evaluate_agent(agent, config.env, episodes, config.seed, config.evaluate, forget_every=forget_every)
    known = references(config.env.id, config.env.kwargs)
    summary |= {"env_steps": run.saved[1]} | ({"references": known} if known else {})
    if console:
        summary_table(summary)
    return summary


def diagnose(
    run_folder: Path,
    rows: int = 2048,
    episodes: int = 16,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    console: bool = True,
) -> dict[str, Any]:
    """Why an agent is weak: what V sees, what M's dreams keep, what the heads expect and what C does, on real steps.

    Each part has a light. Red: look here first. Yellow: it may be this. Behind it stands what to try. The first red one
    from above decides: a dream cannot be better than V, nor C than its dreams.

    examples
      longdream diagnose runs/quickstart-s0-1
      longdream diagnose runs/quickstart-s0-1 --rows 8192 --json

    Args:
        run_folder: of the run.
        rows: real steps to look at.
        episodes: to play for the returns with and without memory.
        seed: of the episodes (default: the run's).
        device: where the agent computes (default: as in the run).

    Raises:
        UserError: no run, or an environment that does not fit it.
    """
    # imported here, so that --help is quick
    from longdream.agent.evaluation import diagnosis
    from longdream.agent.evaluation.policy import evaluate_agent
    from longdream.agent.evaluation.tables import findings_table
    from longdream.agent.run.folder import load_agent

    for flag, value, smallest in (("rows", rows, 64), ("episodes", episodes, 1), ("seed", seed, 0)):
        if value is not None and value < smallest:
            raise UserError(f"--{flag} {value}: must be at least {smallest}")
    agent, run = load_agent(run_folder, device)
    config = agent.config
    settings = config.evaluate
    seed = config.seed if seed is None else seed
    env = config.evaluation_env
    if console:
        print(f"playing {rows:,} steps and {episodes} episodes of {env.id}", file=sys.stderr)
    findings = diagnosis.diagnose(agent, env, seed, rows)
    returns = evaluate_agent(agent, env, episodes, seed, settings)
    means = (returns[key] for key in ("return_mean", "without_memory_mean", "random_mean"))
    findings["memory"] = diagnosis.memory(*means)
    if console:
        findings_table(f"{run_folder}, after {run.saved[1]:,} steps", findings)
    return {"run": str(run_folder), "env_steps": run.saved[1]} | {
        "findings": {name: finding.to_json() for name, finding in findings.items()}
    }


def _registered(env: str) -> str:
    """The id under which Gymnasium knows "Id" or "module:Id"."""
    return env if env.startswith("remote:") else env.rpartition(":")[2]


def envs() -> dict[str, Any]:
    """List the environments that can be named. One that another package registers is named module:Id."""
    import gymnasium as gym

    own = sorted(name for name in gym.registry if name.startswith("longdream/"))
    others = sorted(name for name in gym.registry if name not in own)
    print("\n".join([*own, "", "Gymnasium's own (some need packages that it names):", *others]))
    return {"own": own, "others": others}
