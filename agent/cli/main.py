"""The command line. A mistake ends in one clear line on stderr; with --json, one JSON object ends stdout."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from longdream.envs.contract import EnvError, UserError

USAGE = """longdream: agents that learn in their dreams

  longdream train PRESET|FILE.yaml [options]   train, evaluate, write runs/NAME
  longdream train --resume runs/NAME           go on where a run stopped
  longdream train --world runs/NAME [options]  another controller, in the dreams of a run that is there
  longdream train video-NAME --data DIR        V and M alone, on recorded video
  longdream evaluate runs/NAME                 play real episodes with a trained agent
  longdream evaluate oracle|random --env ID    the same with a scripted policy
  longdream baseline --env ID                  a model-free algorithm in the real environment, to compare with
  longdream dream runs/NAME                    a dream beside reality, as video
  longdream envs                               environments that can be named
  longdream check-env ID|module:ID             what is wrong with an environment, and how to mend it
  longdream collect --env ID --out DIR         episodes of a scripted policy as NPZ files
  longdream doctor                             what of the install works on this machine
  longdream bench NAME                         measure costs
  longdream demo                               train, evaluate and dream, in some minutes

longdream COMMAND --help explains a command. Every command takes --json and then ends stdout with one JSON object.
LONGDREAM_DEBUG=1 shows where in the program an error came from."""

TRAIN = """usage: longdream train PRESET|FILE.yaml [--name NAME] [--json] [--OPTION VALUE ...]
       longdream train video-NAME --data DIR [--name NAME] [--OPTION VALUE ...]
       longdream train --resume runs/NAME [--json] [--steps N]
       longdream train --world runs/NAME [--controller.kind KIND] [--learn.updates N] [--OPTION VALUE ...]

Train V, M and C in a new run, or go on with one. All that comes of it goes into runs/NAME.

presets
{presets}

examples
  longdream train quickstart --seed 3
  longdream train quickstart --steps 20000 --worldmodel.layers 4 --env.kwargs.corridor 24
  longdream train cartpole --env LunarLander-v3 --name lander
  longdream train quickstart --env remote:/opt/old/bin/python:their_package:Their-v0
  longdream train my_preset.yaml --controller.kind my_package.my_module:MyController
  longdream train video-memory-maze --data recordings/maze --video.lengths 64,128
  longdream train --resume runs/quickstart-s3-1
  longdream train --world runs/quickstart-s3-1 --controller.kind evolution --learn.updates 300

  --name NAME    folder below runs/ (default: PRESET-sSEED-1, or -2, ...)
  --resume RUN   go on with this run, under its own settings; --steps, --evaluate.*, --device and --threads may change
  --world RUN    keep V and M of this run; a new C learns in their dreams alone, from moments of its replay
  --data DIR     short for --video.data: recordings for V and M to learn from, without an environment and without C
  --env ID       short for --env.id
  --steps N      short for --learn.steps
"""

CHANGEABLE = ("learn.steps", "learn.updates", "video.data", "evaluate.", "device", "threads")
"""Settings that a resumed run may change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 a mistake in what was asked, 1 a failure, 128 + n ended by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own parts are named by dotted path
    result: dict[str, Any] | None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            warnings.showwarning = _warn
            result = command(arguments)
            sys.stdout.flush()
            code = 1 if result is not None and result.get("ok") is False else 0  # a check that found something
    except KeyboardInterrupt:
        code, result = 130, {"error": "stopped"}
        print("longdream: stopped", file=sys.stderr)
    except BrokenPipeError:  # who reads has read enough, as in `longdream train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        told = _tell(error)
        code, message = told or (1, f"{type(error).__name__}: {error}")
        if told is None or os.environ.get("LONGDREAM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"longdream: {message}", file=sys.stderr)
        result = {"error": message.partition("\n")[0]}
    if as_json and result is not None:
        from longdream.agent.run.folder import to_json

        print(to_json(result), flush=True)
    return code


def _warn(message: Warning | str, *_: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _tell(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of an error whose cause lies outside this program; None for one of ours."""
    from longdream.agent.core.learner import NotFinite
    from longdream.agent.run.checkpoint import DiskFull
    from longdream.agent.run.signals import Interrupted

    notes = [*getattr(error, "__notes__", ())]
    if isinstance(error, UserError):
        return 2, "\n".join([" ".join(str(error).split()), *notes])
    if isinstance(error, EnvError):
        return 1, "\n".join([str(error), *notes])
    if isinstance(error, NotFinite | DiskFull):
        return 1, "; ".join([str(error), *notes])
    if isinstance(error, Interrupted):
        return 128 + error.number, "; ".join([str(error), *notes])
    return None


def command(arguments: list[str]) -> dict[str, Any] | None:
    """Do what the arguments say, printing it in words too; None where help was asked for and given."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return None
    name, *rest = arguments
    match name:
        case "train":
            return train(rest)
        case "evaluate" | "envs":
            return call(f"longdream {name}", {"evaluate": evaluate, "envs": envs}[name], rest)
        case "doctor" | "check-env":
            from longdream.agent.cli import doctor

            return call(f"longdream {name}", doctor.doctor if name == "doctor" else doctor.check_env, rest)
        case "baseline":
            from longdream.agent.baselines import sb3 as baseline

            return call("longdream baseline", baseline.baseline, rest)
        case "collect":
            from longdream.agent.baselines import scripted

            return call("longdream collect", scripted.collect, rest)
        case "dream" | "demo":
            from longdream.agent.cli import report

            return call(f"longdream {name}", {"dream": report.dream, "demo": report.demo}[name], rest)
        case "bench":
            from longdream.agent import bench

            if not rest or rest[0].startswith("-"):
                print(f"usage: longdream bench {'|'.join(bench.BENCHES)} [--json] [options]\n")
                for key, function in bench.BENCHES.items():
                    print(f"  {key:12} {inspect.getdoc(function)}".partition("\n")[0])
                if not rest or rest[0] not in ("-h", "--help"):
                    raise UserError(f"bench what? Name one of {', '.join(bench.BENCHES)}")
                return None
            return call(f"longdream bench {rest[0]}", bench.find(rest[0]), rest[1:])
    from longdream.agent.config import options

    known = ("train", "evaluate", "dream", "envs", "check-env", "collect", "baseline", "doctor", "bench", "demo")
    raise UserError(f"unknown command {name!r}" + options.suggest(name, known, f"there are {', '.join(known)}"))


# -- train ------------------------------------------------------------------------------------------------------------


def train(arguments: list[str]) -> dict[str, Any] | None:
    """Train in a new run or a resumed one; its summary."""
    from longdream.agent.cli import report
    from longdream.agent.config import options, ranges
    from longdream.agent.run import folder as run
    from longdream.agent.train import imagined as dream_loop
    from longdream.agent.train import online as loop
    from longdream.agent.train import video as video_loop

    words, flags = options.split(arguments, lambda flag: str if flag in ("name", "resume") else options.hint(flag))
    if flags is None:
        _train_help(words[0] if words else None)
        return None
    name, resumed = flags.pop("name", None), flags.pop("resume", None)
    settings = options.from_flags(flags)
    if len(words) > (resumed is None):
        hint = "one preset at a time" if resumed is None else "a run that is resumed has its settings already"
        raise UserError(f"unexpected {words[-1]!r}: {hint}; options look like --seed 3")
    if resumed is not None:
        folder = Path(resumed)
        fixed = ["name"] if name else [key for key in settings if not key.startswith(CHANGEABLE)]
        if fixed:
            raise UserError(f"--{fixed[0]} cannot change in a run that goes on: leave it out, or start a new run")
        config = options.update(run.open_run(folder).config, settings)
    elif settings.get("world"):
        if words:
            raise UserError(f"unexpected {words[0]!r}: --world brings the settings of its run")
        source = run.open_run(settings["world"])
        fixed = [key for key in settings if key != "world" and not key.startswith(dream_loop.MAY_DIFFER)]
        if fixed:
            raise UserError(f"--{fixed[0]} cannot change: V and M of {source.folder} stay as they are")
        config = options.update(source.config, settings)
        folder = run.unused(name, f"{source.folder.name}-{config.controller.kind.partition(':')[0]}", config.seed)
    elif words:
        preset = options.load(words[0])
        # the preset's arguments are those of its own environment
        other = settings.get("env.id", preset.env.id) != preset.env.id
        config = options.update(preset, ({"env.kwargs": {}} if other else {}) | settings)
        label = Path(words[0]).parent.name if Path(words[0]).name == "config.yaml" else Path(words[0]).stem
        folder = run.unused(name, label, config.seed)
    else:
        raise UserError(f"train what? Name a preset, one of {', '.join(options.presets())}, or a .yaml file")
    ranges.check(config)
    video_loop.check(config, settings)
    kind = video_loop if config.video.lengths else dream_loop if config.world else loop
    try:
        summary = kind.train(config, folder, resume=resumed is not None)
    except Exception as error:
        if folder.exists() and not isinstance(error, UserError):
            error.add_note(f"go on with: longdream train --resume {folder}")
        raise
    if kind is video_loop:
        video_loop.summary_table(summary | {"run": str(folder)})
        return summary
    report.summary_table(summary | {"run": str(folder)})
    print(f"next: longdream dream {folder}")
    return summary


def _train_help(preset: str | None) -> None:
    import tyro

    from longdream.agent.config import options
    from longdream.agent.config.schema import Config

    described = options.presets()
    width = max(map(len, described))
    print(TRAIN.format(presets="\n".join(f"  {name:{width}}  {text}" for name, text in described.items())))
    print(f"Every option, with its value {f'in {preset}' if preset else 'where a preset does not set it'}:\n")
    config = options.load(preset) if preset else Config()
    # FlagConversionOff: --forcing.ramp true, with a value like every other option
    kind: Any = tyro.conf.FlagConversionOff[Config]
    with contextlib.suppress(SystemExit):
        program = f"longdream train {preset or 'PRESET'}"
        tyro.cli(kind, default=config, args=["--help"], prog=program, use_underscores=True)
    for name, hint in options.fields().items():
        if get_origin(hint) is dict:  # one that is empty is left out above
            print(f"--{name} JSON, as --{name} '{{\"key\": 1}}', or one by one, as --{name}.key 1")


# -- evaluate and envs ------------------------------------------------------------------------------------------------


def evaluate(
    run_folder: Path,
    env: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    workers: Literal["sync", "async"] | None = None,
) -> dict[str, Any]:
    """Play whole real episodes: with the trained agent, greedily; the same without long memory; and at random.

    In place of a run, the name of a scripted policy, oracle, navigator or random, plays in Memory Maze.

    examples
      longdream evaluate runs/quickstart-s0-1 --episodes 100
      longdream evaluate runs/maze-s0-1 --env longdream/MemoryMaze-9x9-v0 --episodes 50 --workers async
      longdream evaluate oracle --env longdream/MemoryMaze-15x15-v0 --episodes 10

    Args:
        run_folder: of the run, or the name of a scripted policy.
        env: another environment, with the same observations and actions (default: the run's own).
        env_kwargs: its arguments, '{"corridor": 24}'.
        episodes: how many (default: the run's evaluate.final_episodes; 10 for a scripted policy).
        seed: of the episodes (default: the run's, for those of its own evaluation).
        device: where the agent computes (default: as in the run).
        workers: copies of the environment in this process, or in one each (default: as in the run).

    Raises:
        UserError: no run, or an environment that does not fit it.
    """
    from longdream.agent.cli import report
    from longdream.agent.config import options, ranges
    from longdream.agent.evaluation.policy import judge
    from longdream.agent.run import folder as run
    from longdream.envs.memory_maze.sizes import references

    if str(run_folder) in ("oracle", "navigator", "random"):
        from longdream.agent.baselines import scripted

        policy: Any = str(run_folder)
        where, episodes = env or "longdream/MemoryMaze-9x9-v0", 10 if episodes is None else episodes
        found = scripted.evaluate(policy, where, env_kwargs, episodes, seed or 0)
        report.summary_table(found)
        return found
    agent, config, _, step = run.load_agent(run_folder, device)
    wanted = {
        "env.id": env,
        "env.kwargs": env_kwargs if env_kwargs is not None else ({} if env else None),
        "env.workers": workers,
        "seed": seed,
    }
    wanted["evaluate.final_episodes"] = episodes
    config = options.update(config, {key: value for key, value in wanted.items() if value is not None})
    ranges.check(config)
    episodes = config.evaluate.final_episodes
    print(f"playing {episodes} episodes of {config.env.id}", file=sys.stderr)
    found = judge(agent, config.env, episodes, config.seed, config.evaluate)
    known = references(config.env.id, config.env.kwargs)
    found |= {"env_steps": step} | ({"references": known} if known else {})
    report.summary_table(found)
    return found


def envs() -> dict[str, Any]:
    """List the environments that can be named. One that another package registers is named module:Id."""
    import gymnasium as gym

    own = sorted(name for name in gym.registry if name.startswith("longdream/"))
    others = sorted(name for name in gym.registry if name not in own)
    print("\n".join([*own, "", "Gymnasium's own (some need packages that it names):", *others]))
    return {"own": own, "others": others}


# -- functions as commands --------------------------------------------------------------------------------------------


def call(program: str, function: Callable[..., dict[str, Any]], arguments: list[str]) -> dict[str, Any] | None:
    """Call a function with parameters from the command line: those without a default are words, the others flags.

    Raises:
        UserError: an unknown flag, a missing word, or a value of another type.
    """
    from longdream.agent.config import options

    hints = get_type_hints(function)
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if k != "console"}
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    optional = [name for name in parameters if name not in needed]

    def hint(flag: str) -> Any:
        if _name(flag) not in optional:
            known = [f"--{name}" for name in optional]
            raise UserError(f"unknown flag --{flag}" + options.suggest(f"--{flag}", known, f"see {program} --help"))
        return hints[_name(flag)]

    words, flags = options.split(arguments, hint)
    if flags is None:
        _help(program, function, parameters)
        return None
    if len(words) < len(needed):
        raise UserError(f"{program} needs {needed[len(words)].replace('run_folder', 'the folder of a run, runs/NAME')}")
    if len(words) > len(needed):
        raise UserError(f"unexpected {words[len(needed)]!r}: see {program} --help")
    given = {name: options.read(name, word, hints[name]) for name, word in zip(needed, words, strict=True)}
    given |= {_name(flag): options.read(f"--{flag}", text, hint(flag)) for flag, text in flags.items()}
    return function(**given)


def _name(flag: str) -> str:
    return flag.replace("-", "_").replace(".", "_")


def _help(program: str, function: Callable, parameters: dict[str, inspect.Parameter]) -> None:
    """Help from a docstring: what stands before its sections, and its Args beside the flags."""
    about, _, rest = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    told: dict[str, str] = {}
    entry = ""
    for line in rest.partition("\n\n")[0].splitlines():
        if not line.startswith("     "):
            entry, _, line = line.strip().partition(": ")
        for name in entry.split(", "):
            told[name] = f"{told.get(name, '')} {line.strip()}".strip()
    words = [name.upper() for name, parameter in parameters.items() if parameter.default is parameter.empty]
    print(
        " ".join(["usage:", program, *words, "[--json] [options]"]) + f"\n\n{about.partition('Returns:')[0].strip()}\n"
    )
    hints = get_type_hints(function)
    for name, parameter in parameters.items():
        flag = name.upper() if parameter.default is parameter.empty else f"--{name} {_kind(hints[name])}"
        default = "" if parameter.default in (parameter.empty, None) else f" (default: {parameter.default})"
        print(textwrap.fill(f"  {flag:24} {told.get(name, '')}{default}".rstrip(), 110, subsequent_indent=" " * 27))


def _kind(hint: Any) -> str:
    """A type in one word."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    inner = [part for part in get_args(hint) if part not in (type(None), ...)]
    if get_origin(hint) is tuple:
        return f"{_kind(inner[0])},..."
    return _kind(inner[0]) if inner and get_origin(hint) is not dict else getattr(hint, "__name__", "JSON").upper()


if __name__ == "__main__":
    sys.exit(main())
