"""`longdream sweep FILE`: search for settings with Optuna, trial after trial, resumable."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from longdream.agent.config import flags
from longdream.envs.contract import UserError

# what brings torch, matplotlib and Optuna is imported in the functions, so that --help is quick
if TYPE_CHECKING:
    import optuna

EXAMPLE = "search: {learn.model_rate: {low: 1e-4, high: 1e-2, log: true}, worldmodel.mixer: [hybrid, window]}"


@dataclass(frozen=True)
class Plan:
    """What a sweep's FILE says.

    train: a preset or a YAML file. search: by setting, a list of choices, or {low, high} and perhaps log: true.
    settings: others, the same in every trial. seeds: a run each; a trial is worth the mean of them. trials: how many.
    metric: of a run's summary. direction: maximize or minimize. sampler_seed: of Optuna's TPE sampler.
    """

    train: str
    search: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    trials: int = 20
    metric: str = "return_mean"
    direction: Literal["maximize", "minimize"] = "maximize"
    sampler_seed: int = 0


def sweep(file: Path, trials: int | None = None, jobs: int = 1) -> dict[str, Any]:
    """Search for settings with Optuna. Each trial trains a run per seed, in runs/STEM-tTRIAL-sSEED. The record of the
    search and a figure of how much each setting mattered are in runs/STEM, where STEM is the name of FILE.

    The same command goes on with a search that was stopped, and with the runs that were under way. It needs
    `pip install 'longdream[sweep]'`.

    FILE, for instance:
      train: quickstart
      settings: {learn.steps: 8000}
      search:
        learn.model_rate: {low: 1e-4, high: 1e-2, log: true}
        worldmodel.layers: {low: 1, high: 3}
        worldmodel.mixer: [hybrid, window]
      seeds: [1, 2]
      trials: 20

    examples
      longdream sweep rates.yaml
      longdream sweep rates.yaml --trials 40 --jobs 2

    Args:
        file: the YAML file; it may also name metric (return_mean), direction (maximize) and sampler_seed (0)
        trials: how many in all (default: as the file says)
        jobs: runs of a trial at a time

    Raises:
        UserError: the file cannot be used, Optuna is missing, or the record is of another search.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("longdream sweep needs Optuna: pip install 'longdream[sweep]'") from None
    plan = read(file)
    trials = plan.trials if trials is None else trials
    if trials < 1 or jobs < 1:
        raise UserError(f"--trials {trials} --jobs {jobs}: must be at least 1")
    folder = Path("runs") / file.stem
    _check(plan, file)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(plan, folder)
    _requeue(study)
    while len(over := _finished(study)) < trials:
        trial = study.ask()
        print(f"trial {len(over) + 1} of {trials}", file=sys.stderr)
        value = _run(plan, trial, folder.name, jobs)
        if value is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
    return _report(plan, study, folder)


def read(file: Path) -> Plan:
    """The plan of a sweep.

    Raises:
        UserError: the file cannot be read, or does not say what to search.
    """
    from longdream.agent.run.files import read_text

    try:
        content = flags.parse_yaml(read_text(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no YAML file: {flags.shown(error, 400)}") from None
    if not isinstance(content, dict) or not {"train", "search"} <= content.keys():
        raise UserError(f"{file} must say what to train and what to search, such as {EXAMPLE}")
    for name in content:
        if name not in Plan.__dataclass_fields__:
            raise UserError(f"{file}: unknown {name!r}" + flags.suggest(str(name), Plan.__dataclass_fields__))
    hints: dict[str, Any] = {"train": str, "search": dict[str, Any], "settings": dict[str, Any], "seeds": list[int]}
    hints |= {"trials": int, "metric": str, "sampler_seed": int}
    hints["direction"] = Literal["maximize", "minimize"]
    plan = Plan(**{name: flags.read(f"{file}: {name}", value, hints[name]) for name, value in content.items()})
    if not plan.search or not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise UserError(f"{file}: give something to search, such as {EXAMPLE}, and different seeds")
    return plan


def _check(plan: Plan, file: Path) -> None:
    """Raise UserError for settings that no run has, and for ranges that are none."""
    from longdream.agent.config import options

    start = options.load(plan.train)
    options.changed(start, plan.settings)
    for name, space in plan.search.items():
        if isinstance(space, list) and space:
            ends = space
        elif isinstance(space, dict) and {"low", "high"} <= space.keys() <= {"low", "high", "log"}:
            ends = [space["low"], space["high"]]
            if not (
                all(_is_number(end) for end in ends) and ends[0] < ends[1] and (ends[0] > 0 or not space.get("log"))
            ):
                raise UserError(f"{file}: search.{name} {space}: low must be less than high, and positive with log")
        else:
            raise UserError(f"{file}: search.{name} {space!r}: give a list of choices, or {{low: 1, high: 4}}")
        for end in ends:
            options.changed(start, {options.full_name(name): end})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _study(plan: Plan, folder: Path) -> optuna.Study:
    """The search in runs/STEM, begun or gone on with.

    Raises:
        UserError: the record there is of a search among other settings.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=folder.name,
        storage=JournalStorage(JournalFileBackend(str(folder / "optuna.log"))),
        direction=plan.direction,
        load_if_exists=True,
    )
    # a search that goes on does not draw again what it began with
    study.sampler = optuna.samplers.TPESampler(seed=plan.sampler_seed + len(study.trials))
    searched = {"train": plan.train, "search": plan.search, "settings": plan.settings, "seeds": plan.seeds}
    searched |= {"metric": plan.metric, "direction": plan.direction}
    if not study.trials:
        study.set_user_attr("plan", searched)
    elif study.user_attrs.get("plan") != searched:
        raise UserError(f"{folder} holds a search with another plan: name the file otherwise, or delete that folder")
    return study


def _requeue(study: optuna.Study) -> None:
    """Queue trials again that were under way when the search was stopped; their runs go on."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs={"began": _began(trial)})


def _began(trial: Any) -> int:
    """The number under which a trial began, which is that of its runs. One that went on has another number too."""
    return trial.user_attrs.get("began", trial.number)


def _finished(study: optuna.Study) -> list[Any]:
    """Trials that are over, each as it ended."""
    latest = {_began(trial): trial for trial in study.trials}
    return [trial for trial in latest.values() if trial.state.is_finished()]


def _run(plan: Plan, trial: optuna.Trial, name: str, jobs: int) -> float | None:
    """Train the runs of a trial; the mean of the metric. None: a run failed."""
    from longdream.agent.cli.main import prepare
    from longdream.agent.cli.seeds import train_all
    from longdream.agent.config import options

    chosen = {key: _suggested(trial, key, space) for key, space in plan.search.items()}
    began = _began(trial)
    runs = []
    for seed in plan.seeds:
        folder = Path("runs") / f"{name}-t{began}-s{seed}"
        settings = {options.full_name(key): value for key, value in {**plan.settings, **chosen}.items()}
        try:
            config, _ = prepare(plan.train, settings | {"seed": seed}, None, None)
        except UserError as error:
            print(f"trial {trial.number}: {error}", file=sys.stderr)
            return None
        runs.append((config, folder))
    trial.set_user_attr("runs", [str(folder) for _, folder in runs])
    values = []
    for summary in train_all(runs, jobs):
        if "error" in summary:
            print(f"trial {trial.number}: {summary['run']}: {summary['error']}", file=sys.stderr)
            return None
        if not _is_number(summary.get(plan.metric)):
            numbers = ", ".join(key for key, value in summary.items() if _is_number(value))
            raise UserError(f"metric {plan.metric!r}: a summary has {numbers}")
        values.append(summary[plan.metric])
    return sum(values) / len(values)


def _suggested(trial: optuna.Trial, name: str, space: Any) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(name, space)
    low, high = space["low"], space["high"]
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=bool(space.get("log")))
    return trial.suggest_float(name, low, high, log=bool(space.get("log")))


# -- what came of it ---------------------------------------------------------------------------------------------------


def _report(plan: Plan, study: optuna.Study, folder: Path) -> dict[str, Any]:
    from optuna.trial import TrialState

    from longdream.agent.evaluation.tables import number

    rows = [
        {"trial": _began(t), "value": t.value, "settings": t.params, "runs": t.user_attrs.get("runs", [])}
        for t in _finished(study)
    ]
    done = [row for row in rows if row["value"] is not None]
    done.sort(key=lambda row: row["value"], reverse=plan.direction == "maximize")
    if not done:
        return {"ok": False, "trials": rows, "error": f"all {len(rows)} trials failed; see above"}
    print(f"{plan.train}: {plan.metric} of {len(done)} trials, best first")
    for row in done[:10]:
        settings = "  ".join(f"--{key} {_short(value)}" for key, value in row["settings"].items())
        print(f"  {number(row['value']):>8}  trial {row['trial']:<4} {settings}")
    result: dict[str, Any] = {"sweep": str(folder), "trials": rows, "best": done[0], "importance": {}, "figure": None}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({trial.value for trial in complete}) > 1:
        result["importance"] = _importance(study)
    if result["importance"]:
        result["figure"] = str(_draw(result["importance"], plan, folder / "importance.pdf"))
        print(f"figure  {result['figure']}")
    else:
        print("no figure of importance: it needs more trials, of different worth")
    return result


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _importance(study: optuna.Study) -> dict[str, float]:
    """How much each setting mattered, by PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255)."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with suppress(ValueError, RuntimeError):  # too few trials, or a setting that never changed
        return {k: float(v) for k, v in get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()).items()}
    return {}


def _draw(importance: dict[str, float], plan: Plan, out: Path) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from longdream.agent.evaluation.curves import COLOURS, STYLE

    names = sorted(importance, key=lambda name: importance[name])
    with rc_context(STYLE):
        figure = Figure(figsize=(5.5, 0.8 + 0.35 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.barh(names, [importance[name] for name in names], color=COLOURS[0])
        axes.set_xlabel(f"importance for {plan.metric} (PED-ANOVA)")
        figure.savefig(out)
    return out
