"""`longdream` and `python -m longdream`: the command line."""

import atexit
import gc
import sys

from longdream.agent.cli.main import main


def run() -> int:
    """Run the command that the program was called with.

    Python looks for cyclic garbage less often, and not at the program's end. What importing torch makes is none, and
    searching it again and again took a fifth of the processor's time of `longdream train tiny`.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    return main()


if __name__ == "__main__":
    sys.exit(run())
