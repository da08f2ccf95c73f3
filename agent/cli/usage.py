"""What `longdream --help` and `longdream train --help` print."""

from __future__ import annotations

import contextlib
from typing import Any

USAGE = """longdream: agents that learn inside a learned world model with long-term memory

  longdream train PRESET|FILE.yaml [options]   train, evaluate, write runs/NAME
  longdream train --env ID [--size SIZE]       the same for any environment, by one recipe
  longdream train PRESET --seeds 1,2,3         a run per seed; --jobs 2 trains two at a time
  longdream train --resume runs/NAME           go on where a run stopped
  longdream train --world runs/NAME [options]  another controller, in the dreams of an existing run
  longdream train video-NAME --data DIR        V and M alone, on recorded video
  longdream evaluate runs/NAME                 play real episodes with a trained agent
  longdream diagnose runs/NAME                 why it is weak: what V sees, M dreams, C does; and what to try
  longdream evaluate oracle|random --env ID    the same with a scripted policy
  longdream baseline --env ID                  a model-free algorithm in the real environment, to compare with
  longdream compare runs/a* runs/b*            returns at equal steps and at equal time, with intervals
  longdream plot runs/a* runs/b* --out F.pdf   learning curves, seeds as bands
  longdream list                               what runs there are, and what has become of them
  longdream sweep FILE.yaml                    search for settings
  longdream dream runs/NAME                    a dream beside reality, as video
  longdream export runs/NAME [--out FOLDER]    an agent to hand on: settings, card, weights in one file
  longdream play runs/NAME|ENV                 step into the dream beside reality, in a browser
  longdream watch runs/NAME|runs/              follow runs in a browser while they train
  longdream envs                               environments that can be named
  longdream check-env ID|module:ID             what is wrong with an environment, and how to fix it
  longdream collect --env ID --out DIR         episodes of a scripted policy as NPZ files
  longdream doctor                             what of the install works on this machine
  longdream bench NAME                         measure costs
  longdream demo                               train, evaluate and dream, in some minutes
  longdream --version                          which version this is

A trained agent comes with the program: memory-maze-9x9 is its name wherever runs/NAME is asked for.
longdream COMMAND --help explains a command. Every command takes --json and then ends stdout with one JSON object.
--trust lets a run that somebody else made execute the code that it names (docs/security.md).
LONGDREAM_DEBUG=1 shows where in the program an error came from."""

TRAIN = """usage: longdream train PRESET|FILE.yaml [--name NAME] [--json] [--OPTION VALUE ...]
       longdream train --env ID [--size SIZE] [--OPTION VALUE ...]
       longdream train video-NAME --data DIR [--name NAME] [--OPTION VALUE ...]
       longdream train PRESET --seeds 1,2,3 [--jobs 2] [--name NAME] [--OPTION VALUE ...]
       longdream train --resume runs/NAME [--json] [--steps N]
       longdream train [PRESET] --init runs/NAME [--name NAME] [--OPTION VALUE ...]
       longdream train --world runs/NAME [--controller.kind KIND] [--learn.updates N] [--OPTION VALUE ...]

Train V, M and C in a new run, or go on with one. All that comes of it goes into runs/NAME.

presets
{presets}

examples
  longdream train quickstart --seed 3
  longdream train quickstart --seeds 1,2,3 --jobs 2 --name hybrid
  longdream train quickstart --steps 20000 --worldmodel.layers 4 --env.kwargs.corridor 24
  longdream train --env LunarLander-v3 --steps 50000 --name lander
  longdream train quickstart --env my_envs:Slow-v0 --env.copies 16 --collect.async
  longdream train quickstart --env remote:/opt/old/bin/python:their_package:Their-v0
  longdream train my_preset.yaml --controller.kind my_package.my_module:MyController
  longdream train video-memory-maze --data recordings/maze --video.lengths 64,128
  longdream train --resume runs/quickstart-s3-1
  longdream train --init runs/quickstart-s3-1 --env.kwargs.corridor 24 --steps 20000
  longdream train --world runs/quickstart-s3-1 --controller.kind evolution --learn.updates 300

  --name NAME    folder below runs/ (default: PRESET-sSEED-1, or -2, ...)
  --seeds 1,2,3  a run per seed, each in a process of its own and in NAME-sSEED
  --jobs N       how many of them at a time (default: 1)
  --resume RUN   go on with this run, under its own settings; --steps, --learn.updates, --evaluate.*, --device and
                 --threads may change
  --init RUN     begin with the weights of this run and, without a PRESET, with its settings
  --world RUN    keep V and M of this run; a new C learns in their dreams alone, from moments of its replay
  --gpus N       N ranks on this machine train together, each with a GPU (docs/scale.md); torchrun starts more
  --size SIZE    of V, M and C: tiny, small, medium or large (with --env alone: as device and observations allow)
  --collect.async  short for --env.workers beside: the agent acts in a process of its own while it learns
  --data DIR     short for --video.data: recordings for V and M to learn from, without an environment and without C
  --env ID       short for --env.id
  --steps N      short for --learn.steps
"""


def train_help(preset: str | None) -> None:
    """Print the presets, and every option with its value in `preset`, or else its default."""
    import tyro

    from longdream.agent.config import flags, options
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
    for name, setting in options.fields().items():
        if flags.holds(setting.hint, dict):  # an empty one is left out above
            print(f"--{name} JSON, as --{name} '{{\"key\": 1}}', or one by one, as --{name}.key 1")
