"""A run that begins with the weights of another one (`--init RUN`), as in fine-tuning."""

from __future__ import annotations

from pathlib import Path

from longdream.agent.core.learner import Learner
from longdream.agent.run import folder as run_folder
from longdream.envs.contract import EnvSpec, UserError

RAMP = 100
"""Updates over which the learning rates rise: new optimizers know nothing yet of the size of the gradients."""


def warm_start(learner: Learner, source: Path) -> None:
    """Give a learner the weights of V, M and, where both have one, C, of the run in `source`.

    Optimizers and counters stay as they are.

    Raises:
        UserError: there is no such run, or its parts are others.
        CheckpointError: it has no checkpoint that can be used.
    """
    run = run_folder.open_run(source)
    saved, _ = run.saved
    _check_spec(learner.spec, run.spec, source)
    for name, module in learner.modules().items():
        weights = saved["weights"].get(name)
        if weights is None:
            continue
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            first = " ".join(str(error).split("\n\t")[-1].split())
            raise UserError(
                f"--init {source}: its {name} is not the one of this run, which must have that run's settings "
                f"of encoder, worldmodel, forcing, heads and controller ({first[:200]})"
            ) from None


def _check_spec(here: EnvSpec, there: EnvSpec, source: Path) -> None:
    for part in ("obs", "action"):
        mine = getattr(here, part)
        its = getattr(there, part)
        if mine != its:
            raise UserError(f"--init {source}: it was trained on {part} {its}, and this environment has {mine}")
