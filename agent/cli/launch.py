"""`longdream train --gpus N`: the ranks of one machine, started by torchrun's own engine; and how a rank ends."""

# pyright: reportPrivateImportUsage=false
# torch.distributed: its stores

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from longdream.agent.cli import output
from longdream.envs.contract import UserError

FOLDER = "folder"
"""Key of the ranks' store: the folder of their run."""
SHUTDOWN_S = 300
"""Seconds that ranks have to save after a signal, before they are killed."""


def gpus_of(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """The N of `longdream train ... --gpus N`, or of `bench world-model`, 0 without one that can be read; and the
    arguments without it."""
    rest = list(arguments)
    if (rest[:1] != ["train"] and rest[:2] != ["bench", "world-model"]) or "RANK" in os.environ:
        return 0, rest
    for i, argument in enumerate(rest):
        flag, equals, value = argument.partition("=")
        if flag == "--gpus":
            value = value if equals else "".join(rest[i + 1 : i + 2])
            del rest[i : i + (1 if equals else 2)]
            return (int(value) if value.isdecimal() else 0), rest
    return 0, rest


def check_gpus(value: str) -> None:
    """Raise UserError for a number of ranks that is none."""
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--gpus {value}: give the number of GPUs, and so of ranks, that train together, such as 2")


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m longdream` with these arguments as so many ranks on this machine; the exit code of the run.

    As `torchrun --standalone --nproc-per-node` does, but the ranks find each other by a file: no port is opened beyond
    the loopback interface. Their consoles are this one's; rank 0 alone uses it.
    """
    return launched(ranks, [sys.executable, "-m", "longdream", *arguments])


def launched(ranks: int, command: Sequence[str]) -> int:
    """As `launch`, for any command."""
    # imported here: it takes seconds, and is needed by nobody else
    from torch.distributed import FileStore, PrefixStore
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from longdream.agent.core.ranks import STORE

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what happened is said in one line
    with tempfile.TemporaryDirectory(prefix="longdream-ranks-") as folder:
        os.environ[STORE] = str(Path(folder) / "store")
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # which would listen to the network
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="longdream",
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder) / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=SHUTDOWN_S,
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            store = PrefixStore("longdream", FileStore(os.environ[STORE], -1))
            if all(code < 0 for code in codes.values()) and not store.check(["reported"]):
                # the others were ended before they could say so
                rank, failure = next(iter(error.failures.items()))
                folder = store.get(FOLDER).decode() if store.check([FOLDER]) else ""
                died = f"longdream: rank {rank} (process {failure.pid} on {socket.gethostname()}) died"
                print(died + (f"; go on with: longdream train --resume {folder}" if folder else ""), file=sys.stderr)
            return next((code for code in codes.values() if code > 0), 1)
        finally:
            del os.environ[STORE]
    return 0


def is_rank() -> bool:
    """Whether torchrun has started this process, with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def agreed(folder: Path) -> Path:
    """The folder of the run, which is the one that rank 0 has chosen."""
    if not is_rank():
        return folder
    from longdream.agent.core.ranks import here

    folder = Path(here().gather(str(folder))[0])
    here().store.set(FOLDER, str(folder))
    return folder


@contextmanager
def as_rank() -> Iterator[int]:
    """Within, this process is one of the ranks that torchrun has started, if it was started so; its number, or 0.

    Rank 0 has the console, and the last word: an error of another rank is raised there, with its number. The others
    print what is theirs alone, and end.

    The threads of a process group must not outlive Python, which they may need when they let go of a tensor: such a
    process is aborted. So a rank either leaves the group, as long as the others do, or ends at once.
    """
    if not is_rank():
        yield 0
        return
    from longdream.agent.core.ranks import RankFailed, joined, leave
    from longdream.worldmodel.ranks import RankLost

    with joined() as ranks:
        if ranks.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
            warnings.showwarning = lambda message, *_: output.print_warning(f"rank {ranks.rank}: {message}")
        try:
            yield ranks.rank
        except RankLost as error:
            text, mine = ranks.lost()
            atexit.register(os._exit, 1)  # the device may wait for the lost rank for ever
            if not mine:
                raise SystemExit(1) from None
            failed = RankFailed(text)
            for note in getattr(error, "__notes__", ()):
                failed.add_note(note)
            raise failed from None
        except KeyboardInterrupt:  # a second one: the others are not waited for
            atexit.register(os._exit, 130)
            raise
        except Exception as error:
            code, message = output.explain(error) or (1, f"{type(error).__name__}: {error}")
            if getattr(error, "agreed", False):
                leave()
            else:
                atexit.register(os._exit, code)
                ranks.tell(message.partition("\n")[0].partition("; go on with: ")[0])
                if ranks.rank and output.explain(error) is None:
                    traceback.print_exc()
            if ranks.rank:
                raise SystemExit(code) from None
            raise
