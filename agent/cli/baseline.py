"""`longdream baseline`: a model-free algorithm in the real environment, to compare with."""

from __future__ import annotations

from typing import Any


def baseline(
    env: str = "longdream/Recall-v0",
    algo: str = "stable_baselines3:PPO",
    steps: int = 20_000,
    seed: int = 0,
    name: str | None = None,
    copies: int = 8,
    env_kwargs: dict[str, Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    evaluate_every: int = 2_000,
    episodes: int = 50,
    final_episodes: int = 200,
) -> dict[str, Any]:
    """Train a model-free algorithm in the real environment, with the logs and evaluations of `longdream train`.

    Observations and actions are those of an agent. The run's folder contains metrics.jsonl, tensorboard/, summary.json
    and controller.zip in SB3's own format, which is saved every minute. The run cannot be resumed.

    examples
      longdream baseline --env CartPole-v1 --steps 25000
      longdream baseline --env longdream/Recall-v0 --env.kwargs.corridor 12 --algo sb3_contrib:RecurrentPPO
      longdream baseline --env Pendulum-v1 --algo stable_baselines3:SAC --kwargs.learning_rate 1e-3

    Args:
        env: id of the environment, or module:Id.
        algo: the algorithm, package:Class; RecurrentPPO needs the package sb3-contrib.
        steps: real steps, over all copies.
        seed: random seed.
        name: name of the folder below runs/ (default: ALGORITHM-sSEED-1, or -2, ...).
        copies: number of environments in parallel.
        env_kwargs: its arguments, one by one as --env.kwargs.corridor 12, or all as JSON.
        kwargs: arguments of the algorithm, in the same forms; "policy" is the policy.
        evaluate_every: real steps between evaluations; 0 for none before the end.
        episodes: episodes per evaluation.
        final_episodes: episodes in the last evaluation.

    Raises:
        UserError: there is no such environment or algorithm, the algorithm cannot take the actions, or the folder is in
            use.
    """
    from longdream.agent.evaluation.baselines.sb3 import train  # imported here, so that --help is quick

    return train(
        env,
        algo,
        steps,
        seed,
        name,
        copies,
        env_kwargs,
        kwargs,
        evaluate_every,
        episodes,
        final_episodes,
    )
