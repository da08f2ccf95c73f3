"""longdream/Remote-v0: an environment that lives in another Python interpreter, behind the plain Gymnasium interface.

The other interpreter runs envs/remote_server.py, which is sent to it and says how the two talk.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import shutil
import signal
import socket
import string
import subprocess
import tempfile
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec as Registration

from longdream.envs import remote_server
from longdream.envs.contract import EnvError, UserError

FAULTS = "remote_faults"
"""Key of an info: how many faults this call has survived; "remote_fault" beside it tells of the last."""
ROOM = 1 << 16  # bytes of shared memory to begin with; it grows with what is sent
LINES = 20  # of what the other side said last, shown with an error
CLOSE_S = 10.0  # for an environment to close, and for the processes of one that does not to be ended
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME")  # of this interpreter: they would send the other one to our packages
BOOT = """import sys
if sys.version_info < (3, 7): sys.exit("Python 3.7 or newer is needed, this is " + sys.version.split()[0])
path = sys.argv.pop(1)
exec(compile(open(path).read(), path, "exec"), {"__name__": "__main__"})"""


class Fault(Exception):
    """The other side did not answer as it should.

    Args:
        message: one line: what it did.
        said: the last lines that came from it.
    """

    def __init__(self, message: str, said: list[str]) -> None:
        super().__init__(message)
        self.message, self.said = message, said


class RemoteEnv(gym.Env):
    """An environment in an interpreter of its own.

    Where its process dies, hangs or raises within an episode, that episode ends as truncated, with the last observation
    again and reward 0, and ``reset`` starts another process; ``info`` tells of it, and ``faults`` counts.

    Args:
        python: the interpreter, 3.7 or newer, with numpy and what the environment needs.
        env: "module:callable" or "module:Id" or "Id", of old gym or Gymnasium. Modules are found in the current folder
            and where that interpreter finds them.
        kwargs: arguments of the environment.
        environ: variables of its process, beside those of ours (of which PYTHONPATH and PYTHONHOME are left out).
        timeout_s: seconds for a step or a picture.
        reset_timeout_s: seconds for a start, and for a reset.
        restarts: faults that are survived one after another without an episode played to its end between them.
        render_mode: None or "rgb_array".

    Raises:
        UserError: the interpreter or the environment does not start, or a space cannot travel; a note has what it said.
        EnvError: (reset, step, render) a fault too many.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(
        self,
        python: str,
        env: str,
        kwargs: dict[str, Any] | None = None,
        environ: dict[str, str] | None = None,
        timeout_s: float = 30.0,
        reset_timeout_s: float = 300.0,
        restarts: int = 5,
        render_mode: str | None = None,
    ) -> None:
        if timeout_s <= 0 or reset_timeout_s <= 0 or restarts < 0:
            raise UserError(
                f"timeout_s={timeout_s}, reset_timeout_s={reset_timeout_s}, restarts={restarts}: times must be above 0"
                " and restarts at least 0"
            )
        self.python, self.target, self.render_mode = python, env, render_mode
        self.timeout_s, self.reset_timeout_s, self.restarts = timeout_s, reset_timeout_s, restarts
        self.faults = 0
        self._start = (env, kwargs or {}, render_mode)
        self._environ = environ or {}
        self._in_a_row = self._told = 0
        self._obs: Any = None
        self._playing = False
        self._server: Server | None = None
        try:
            self._server, self.observation_space, self.action_space = self._started()
        except Fault as fault:
            said = " | ".join(line.strip() for line in fault.said[-3:] if line.strip() not in fault.message)
            error = UserError(f"{python} cannot serve {env}: it {fault.message}{said and f'; it said: {said}'}")
            for line in fault.said:
                error.add_note(line)
            raise error from None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        while True:
            try:
                if self._server is None:
                    self._server, *_ = self._started()
                    if seed is None:  # a process that begins anew goes on by our seed, not by chance
                        seed = int(self.np_random.integers(2**31))
                obs, info = self._server.ask("reset", self.reset_timeout_s, seed, options)
            except Fault as fault:
                self._survive(fault)
            else:
                self._obs, self._playing = obs, True
                return obs, self._noted(info)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        if self._server is None and not self._playing:
            raise RuntimeError("RemoteEnv.step after the end of an episode: reset comes first")
        try:
            if self._server is None:  # it was lost in render
                self._playing = False
                return copy.deepcopy(self._obs), 0.0, False, True, self._noted({})
            obs, reward, terminated, truncated, info = self._server.ask("step", self.timeout_s, action)
        except Fault as fault:
            self._playing = False
            self._survive(fault)
            return copy.deepcopy(self._obs), 0.0, False, True, self._noted({})
        if terminated or truncated:
            self._in_a_row = 0
        self._obs = obs
        return obs, reward, terminated, truncated, info

    def render(self) -> Any:
        """The picture (H, W, 3) uint8; None without a render_mode, or where the process has gone."""
        if self.render_mode is None or self._server is None:
            return None
        try:
            return self._server.ask("render", self.timeout_s)
        except Fault as fault:
            self._survive(fault)
            return None

    def close(self) -> None:
        """End the process and everything below it; harmless when done already."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _started(self) -> tuple[Server, spaces.Space, spaces.Space]:
        server = Server(self.python, self._environ, self.reset_timeout_s)
        sees, does = server.ask("make", self.reset_timeout_s, *self._start)
        server.forget_folder()
        return server, space_of(sees), space_of(does)

    def _survive(self, fault: Fault) -> None:
        self._server = None
        self.faults += 1
        self._in_a_row += 1
        self._last_fault = fault.message
        told = f"{self.target} in {self.python} {fault.message}"
        if self._in_a_row > self.restarts:
            raise EnvError(
                f"{told}: fault {self._in_a_row} without an episode played to its end, and restarts={self.restarts}",
                trace="\n".join(fault.said),
            ) from None
        warnings.warn(f"{told}: fault {self.faults}, the process is started again", stacklevel=3)

    def _noted(self, info: dict[str, Any]) -> dict[str, Any]:
        new, self._told = self.faults - self._told, self.faults
        return {**info, FAULTS: new, "remote_fault": self._last_fault} if new else info


class Server:
    """The processes that serve one environment, and the channel to them.

    Raises:
        UserError: there is no such interpreter.
        Fault: here and from `ask`. All processes have ended then.
    """

    def __init__(self, python: str, environ: dict[str, str], timeout_s: float) -> None:
        found = shutil.which(os.path.expanduser(python))
        if found is None:
            raise UserError(f"there is no interpreter {python!r}: give the path of one, such as /usr/bin/python3")
        memory = Path("/dev/shm")
        self.folder = tempfile.mkdtemp(
            prefix=f"longdream-{os.getpid()}-", dir=memory if os.access(memory, os.W_OK) else "/tmp"
        )
        source, frames = (os.path.join(self.folder, name) for name in ("server.py", remote_server.FRAMES))
        shutil.copyfile(remote_server.__file__, source)
        handle = os.open(frames, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        remote_server.grow(handle, ROOM)
        self.channel: remote_server.Channel | None = None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(self.folder, remote_server.SOCKET))
            listener.listen(1)
            variables = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
            self.process = subprocess.Popen(
                [found, "-u", "-c", BOOT, source, self.folder],
                stdin=subprocess.PIPE,  # never written to: its end is how the other side knows of ours
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=variables | environ,
                start_new_session=True,  # Ctrl-C is for us
            )
            try:
                connection = self._accepted(listener, timeout_s)
            except BaseException:
                os.close(handle)
                raise
        self.channel = remote_server.Channel(connection, handle)

    def ask(self, name: str, timeout_s: float, *arguments: Any) -> Any:
        if self.channel is None:
            raise Fault(f"was interrupted before {name}", [])
        try:
            self.channel.connection.settimeout(timeout_s)
            self.channel.send([name, list(arguments)])
            answer = self.channel.receive()
        except TimeoutError:
            _, said = self._end()
            raise Fault(f"gave no answer to {name} within {timeout_s:g} s", said) from None
        except (EOFError, OSError):
            code, said = self._end()
            raise Fault(f"died in {name} ({_how(code)})", said) from None
        except (KeyboardInterrupt, SystemExit):  # an answer may still come, to a request that nobody remembers
            self._end()
            raise
        if answer[0] == "ok":
            return answer[1]
        said = self.close()
        raise Fault(f"raised in {name}: {answer[1]}", [*said, *answer[2].splitlines()][-LINES:])

    def forget_folder(self) -> None:
        """Remove the names of the socket and the shared memory: both sides have them open."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> list[str]:
        """Close the environment and end; the last lines that it said."""
        if self.channel is None:
            return []
        with contextlib.suppress(OSError, EOFError):
            self.channel.connection.settimeout(CLOSE_S)
            self.channel.send(["close", []])
            self.channel.receive()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(CLOSE_S)
        return self._end()[1]

    def _accepted(self, listener: socket.socket, timeout_s: float) -> socket.socket:
        deadline = time.monotonic() + timeout_s
        listener.settimeout(0.05)
        while True:
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            if self.process.poll() is not None:
                code, said = self._end()
                raise Fault(f"ended at its start ({_how(code)})", said)
            if time.monotonic() > deadline:
                _, said = self._end()
                raise Fault(f"did not start within {timeout_s:g} s", said)

    def _end(self) -> tuple[int, list[str]]:
        """End every process; the exit code, and the last lines that were said."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None
        try:
            said, _ = self.process.communicate(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            said, _ = self.process.communicate()
        self.forget_folder()
        return self.process.returncode, said.decode(errors="replace").splitlines()[-LINES:]


def _how(code: int) -> str:
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(number).name}"
    return f"exit code {code}"


# -- spaces ------------------------------------------------------------------------------------------------------------


class Enum(spaces.Discrete):
    """MineRL's Enum: one of several words. Here a value is the number of its word; the other side translates."""

    def __init__(self, values: list[str]) -> None:
        super().__init__(len(values))
        self.values = tuple(values)

    def __repr__(self) -> str:
        return f"Enum({', '.join(self.values)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Enum) and self.values == other.values


def space_of(described: Any) -> spaces.Space:
    """The Gymnasium space that remote_server.describe has described."""
    kind, told = described
    match kind:
        case "Box":
            return spaces.Box(told["low"], told["high"], dtype=np.dtype(told["dtype"]).type)
        case "Enum":
            return Enum(told["values"])
        case "Discrete":
            return spaces.Discrete(told["n"], start=told["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(told["nvec"], dtype=np.dtype(told["dtype"]).type, start=told["start"])
        case "MultiBinary":
            return spaces.MultiBinary(told["n"])
        case "Dict":  # an OrderedDict stays in its order
            return spaces.Dict(OrderedDict((key, space_of(inner)) for key, inner in told.items()))
        case "Tuple":
            return spaces.Tuple([space_of(inner) for inner in told])
        case _:
            letters = string.printable if told["letters"] is None else told["letters"]
            return spaces.Text(told["max_length"], min_length=told["min_length"], charset=letters)


# -- by name -----------------------------------------------------------------------------------------------------------


def registration(env_id: str) -> Registration:
    """longdream/Remote-v0 with the interpreter and environment of "remote:PYTHON:ENV" as its arguments.

    Raises:
        UserError: there is no such interpreter, or something is missing.
    """
    _, _, rest = env_id.partition(":")
    python, _, env = rest.partition(":")
    if not python or not env:
        raise UserError(f"{env_id!r} is not remote:PYTHON:ENV, such as remote:/usr/bin/python3.9:module:Id")
    base = gym.registry["longdream/Remote-v0"]
    return dataclasses.replace(base, kwargs={**base.kwargs, "python": python, "env": env})
