"""The command line. A mistake ends in one clear line on stderr; with --json, one JSON object ends stdout."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longdream import __version__
from longdream.agent.cli import launch, output
from longdream.agent.run import files, trust
from longdream.envs.contract import UserError

if TYPE_CHECKING:
    from longdream.agent.config.schema import Config
    from longdream.agent.run.folder import Run

COMMANDS = {
    "evaluate": "evaluate:evaluate",
    "diagnose": "evaluate:diagnose",
    "envs": "evaluate:envs",
    "doctor": "doctor:doctor",
    "check-env": "doctor:check_env",
    "dream": "report:dream",
    "export": "export:export",
    "demo": "report:demo",
    "play": "play:play",
    "watch": "play:watch",
    "compare": "compare:compare",
    "plot": "compare:plot",
    "list": "compare:list_runs",
    "sweep": "sweep:sweep",
    "baseline": "baseline:baseline",
    "collect": "..evaluation.baselines.scripted:collect",
}
"""Module, beside this one, and function of each command that is a function; imported when it is called."""
OPENING = ("evaluate", "diagnose", "dream", "play", "watch")
"""Commands that open runs."""
TRAINERS = {
    "online": "trainer:OnlineTrainer",
    "imagination": "imagined:ImaginationTrainer",
    "video": "video:VideoTrainer",
}
"""Module in agent/train and class of the trainer of each kind of run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 a mistake in what was asked, 1 a failure, 128 + n ended by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    gpus, of_a_rank = launch.gpus_of(arguments)
    if gpus > 1:
        return launch.launch(gpus, of_a_rank)
    as_json = "--json" in arguments
    trust.consent("--trust" in arguments)
    arguments = [argument for argument in arguments if argument not in ("--json", "--trust")]
    result: dict[str, Any] | None
    with output.Console(as_json, program=argv is None) as console, warnings.catch_warnings():
        warnings.showwarning = output.print_warning
        try:
            result = command(arguments)
            console.stdout.flush()
            code = 1 if result is not None and result.get("ok") is False else 0  # a check that failed
            if result is None and console.stdout.gone:  # as in `longdream train --help | head`
                code = 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            code = 130
            result = {"error": "stopped"}
            print("longdream: stopped", file=sys.stderr)
        except Exception as error:
            expected = output.explain(error)
            code, message = expected or (1, f"{type(error).__name__}: {error}")
            if expected is None or os.environ.get("LONGDREAM_DEBUG", "0") not in ("", "0"):
                traceback.print_exc()
            print(f"longdream: {message}", file=sys.stderr)
            result = {"error": message.partition("\n")[0]}
        if as_json and result is not None:
            console.end(files.to_json(result))
    return code


def command(arguments: list[str]) -> dict[str, Any] | None:
    """Run the command that the arguments name, and print its result; None where help was asked for and given."""
    name, *rest = arguments or ["help"]
    if name in ("-h", "--help", "help"):
        from longdream.agent.cli.usage import USAGE

        print(USAGE)
        return None
    if name in ("--version", "version"):
        print(f"longdream {__version__}")
        return {"version": __version__}
    if name == "train":
        with launch.as_rank() as rank:
            summary = train(rest)
        return None if rank else summary
    if name not in OPENING:  # what these run is for their run to say, and for the user to trust
        trust.find_modules_here()
    if name == "bench":
        from longdream.agent import bench

        with launch.as_rank() as rank:
            result = bench.run(rest)
        return None if rank else result
    if name not in COMMANDS:
        from longdream.agent.config.flags import suggest

        known = ["train", *COMMANDS, "bench"]
        raise UserError(f"unknown command {name!r}" + suggest(name, known, f"there are {', '.join(known)}"))
    from longdream.agent.cli.functions import call

    module, _, function = COMMANDS[name].partition(":")
    home = "longdream.agent.cli" if not module.startswith("..") else "longdream.agent"
    return call(f"longdream {name}", getattr(import_module(f"{home}.{module.strip('.')}"), function), rest)


def train(arguments: list[str]) -> dict[str, Any] | None:
    """Train in a new run or a resumed one, or one per seed; the summary."""
    from longdream.agent.config import options
    from longdream.agent.config.flags import split

    own = ("name", "resume", "seeds", "jobs", "gpus")
    words, flags = split(arguments, lambda flag: str if flag in own else options.hint(flag))
    if flags is None:
        from longdream.agent.cli.usage import train_help

        train_help(words[0] if words else None)
        return None
    launch.check_gpus(flags.pop("gpus", "1"))
    name, resume, seeds, jobs = (flags.pop(flag, None) for flag in own[:-1])
    settings = options.from_flags(flags)
    if len(words) > (resume is None):
        hint = "one preset at a time" if resume is None else "a run that is resumed has its settings already"
        raise UserError(f"unexpected {words[-1]!r}: {hint}; options look like --seed 3")
    if seeds is not None or jobs is not None:
        from longdream.agent.cli.seeds import train_seeds

        return train_seeds(words, settings, name, resume, seeds, jobs)
    summary = begin(words[0] if words else None, settings, name, resume)
    from longdream.agent.evaluation.tables import summary_table

    summary_table(summary)
    if "return_mean" in summary:
        print(f"next: longdream dream {summary['run']}")
    return summary


def begin(
    source: str | Config | None, settings: dict[str, Any], name: str | None, resume: str | Path | None
) -> dict[str, Any]:
    """Train a preset, a YAML file or a Config with these settings, by dotted name; the summary, with the run's folder.

    Errors as in Trainer.train.
    """
    config, label = prepare(source, settings, name, resume)
    from longdream.agent.run.folder import claim  # imported here: it brings torch; help and many mistakes need none

    def start(folder: Path) -> dict[str, Any]:
        module, _, trainer = TRAINERS[config.kind].partition(":")
        try:
            kind = getattr(import_module(f"longdream.agent.train.{module}"), trainer)
            return kind.train(config, folder, resume=resume is not None) | {"run": str(folder)}
        except Exception as error:
            if folder.exists() and not isinstance(error, UserError):
                error.add_note(f"go on with: longdream train --resume {folder}")
            raise

    fixed = name is not None or launch.is_rank()
    return claim(lambda: launch.agreed(folder_of(config, label, name, resume)), start, fixed)


def folder_of(config: Config, label: str, name: str | None, resume: str | Path | None = None) -> Path:
    """The folder of a run that `prepare` has prepared. Raises UserError where a new one is in use."""
    from longdream.agent.run.folder import unused

    return Path(resume) if resume is not None else unused(name, label, config.seed)


def prepare(
    source: str | Config | None, settings: dict[str, Any], name: str | None, resume: str | Path | None
) -> tuple[Config, str]:
    """The configuration of a run, checked, and what its folder is named after, unless it has a name.

    Raises:
        UserError: settings that cannot be used, or a folder that is in use.
    """
    from longdream.agent.config import checks, options

    def open_run(folder: str | Path) -> Run:
        from longdream.agent.run import folder as run_folder  # imported here: it brings torch

        return run_folder.open_run(folder)

    label = ""
    if resume is None:
        source, settings = options.sized(source, settings)
    if resume is not None:
        fixed = ["name"] if name else [key for key in settings if not options.setting(key).on_resume]
        if fixed:
            raise UserError(f"--{fixed[0]} cannot change in a run that goes on: leave it out, or start a new run")
        config = options.update(open_run(resume).config, settings)
    elif settings.get("world"):
        if source is not None:
            raise UserError(f"unexpected {source!r}: --world brings the settings of its run")
        world = open_run(settings["world"])
        config = options.changed(world.config, {"kind": "imagination"} | settings)
        label = f"{world.folder.name}-{config.controller.kind.partition(':')[0]}"
    elif settings.get("init") and source is None:
        init = open_run(settings["init"])
        config = options.changed(init.config, settings)
        label = init.folder.name
    elif isinstance(source, str):
        path = Path(source)
        config = options.load(source)
        if path.name == "config.yaml":  # of a run, which somebody else may have made
            trust.require(path.parent, config)
        config = options.changed(config, settings)
        label = path.parent.name if path.name == "config.yaml" else path.stem
    elif source is not None:
        config = options.changed(source, settings)
        label = config.kind
    else:
        raise UserError(f"train what? Name a preset, one of {', '.join(options.presets())}, a .yaml file or --env ID")
    folder_of(config, label, name, resume)  # a name that cannot be is said first
    checks.check_given(config, settings)
    checks.check(config)
    if trust.code_of(config):  # it was typed, or the run that it comes from is trusted
        trust.find_modules_here()
    return config, label


if __name__ == "__main__":
    sys.exit(main())
