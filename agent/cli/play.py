"""`longdream play` and `longdream watch`."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longdream.envs.contract import UserError

if TYPE_CHECKING:
    from longdream.agent.run.folder import Run

HOST = "127.0.0.1"
PORT = 8600


def play(
    what: str,
    port: int = PORT,
    host: str = HOST,
    open: bool = True,
    env_kwargs: dict[str, Any] | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
) -> dict[str, Any]:
    """Step into the dream of a run in a browser, beside reality under the same keys; or play an environment.

    The page is on this machine alone, unless --host says otherwise: then its address has a token in it. Over SSH:
    `ssh -L 8600:localhost:8600 MACHINE`, and open http://localhost:8600 here (docs/play.md).

    examples
      longdream play runs/demo
      longdream play runs/demo --env.kwargs.corridor 24
      longdream play longdream/FastMemoryMaze-9x9-v0 --no-open
      longdream play runs/maze --host 0.0.0.0 --port 9000 --device cuda

    Args:
        what: the folder of a run, or the name of an environment, ID or module:ID
        port: where the page is; 0 for any that is free
        host: the interface to listen at
        open: open the page in a browser; --no-open does not
        env_kwargs: arguments of the environment, one by one as --env.kwargs.corridor 24, or all as JSON
        device: where the agent computes (default: as in the run, on the CPU where there is no GPU)

    Raises:
        UserError: there is no such run or environment, it cannot be used, or the port is in use.
    """
    _check(port)
    from longdream.agent.play import server

    run = find_run(what)

    def load() -> Any:
        from longdream.agent.play.source import open_source  # imported here: the page need not wait for it

        return open_source(what, run, env_kwargs, device)

    async def main() -> None:
        await server.serve(server.PlayService(load), host, port, open)

    asyncio.run(main())
    return {}


def find_run(what: str) -> Run | None:
    """The run that is meant; None if an environment is.

    Raises:
        UserError: neither of them, or a run that has no agent, or that is not trusted.
    """
    from longdream.agent.run.folder import open_run, pretrained
    from longdream.envs.make import find

    if Path(what).is_dir() or what in pretrained():
        run = open_run(what)
        if run.config.kind == "video":
            raise UserError(f"{what} was trained on video: there is nobody in it who acts; see its videos/")
        return run
    try:
        find(what)
    except UserError as error:
        kind = "there is no such run, and " if "/" in what or what.startswith("runs") else ""
        raise UserError(f"{what}: {kind}{error}") from None
    return None


def watch(what: Path, port: int = PORT + 1, host: str = HOST, open: bool = True) -> dict[str, Any]:
    """Follow one run or all runs of a folder in a browser while they train.

    Curves, the newest dreams beside reality, surprise by episode, and what the machine does. Nothing in the runs is
    changed, and no code that they name is executed.

    examples
      longdream watch runs/demo
      longdream watch runs/ --no-open

    Args:
        what: the folder of a run, or a folder of runs
        port: where the page is; 0 for any that is free
        host: the interface to listen at
        open: open the page in a browser; --no-open does not

    Raises:
        UserError: there is no such folder, or the port is in use.
    """
    _check(port)
    from longdream.agent.play import server
    from longdream.agent.play.watch import WatchService

    service = WatchService(what)
    asyncio.run(server.serve(service, host, port, open))
    return {}


def _check(port: int) -> None:
    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: must be at least 0 and at most 65535")
    require("aiohttp")
    require("av", "PyAV")
    require("PIL", "pillow")


def require(module: str, package: str = "") -> None:
    """Raise UserError where a package of the extra `play` is not installed."""
    if find_spec(module) is None:
        raise UserError(f"this needs {package or module}: pip install 'longdream[play]'")
