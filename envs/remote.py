"""longdream/Remote-v0: an environment that runs in another Python interpreter, behind Gymnasium's interface.

The other interpreter runs a copy of envs/remote_server.py, which also documents the protocol.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec as Registration

from longdream.envs import remote_server
from longdream.envs.contract import EnvError, UserError

FAULTS = "remote_faults"
"""Key of an info: the number of faults since the previous info. Its "remote_fault" describes the last one."""
ROOM = 1 << 16  # bytes, initial size of the shared memory; it grows with the messages
LINES = 20  # number of last output lines of the other process that are shown with an error
CLOSE_S = 10.0  # time limit for an environment to close, and then for its processes to end
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME")  # they would make the other interpreter import our packages
BOOT = """import sys
if sys.version_info < (3, 7): sys.exit("Python 3.7 or newer is needed, this is " + sys.version.split()[0])
path = sys.argv.pop(1)
exec(compile(open(path).read(), path, "exec"), {"__name__": "__main__"})"""


class Fault(Exception):
    """The other process raised an exception, did not answer, or died.

    Args:
        message: one line: what happened.
        output: the last lines that the process printed.
    """

    def __init__(self, message: str, output: list[str]) -> None:
        super().__init__(message)
        self.message = message
        self.output = output


class RemoteEnv(gym.Env):
    """An environment in a process of its own, with its own interpreter.

    A *fault* is that the process dies, hangs or raises an exception. A fault within an episode truncates the episode:
    ``step`` returns the last observation again, with reward 0. The next ``reset`` starts a new process. ``info``
    reports the fault, and ``faults`` counts all of them.

    Args:
        python: the interpreter, version 3.7 or newer, with numpy and the environment's dependencies.
        env: "module:callable", "module:Id" or "Id", of old gym or Gymnasium. Modules are imported from the current
            folder or from the interpreter's own path.
        kwargs: arguments of the environment.
        environ: environment variables of its process, in addition to ours (without PYTHONPATH and PYTHONHOME).
        timeout_s: time limit in seconds for a step or for rendering.
        reset_timeout_s: time limit in seconds for starting the process, and for a reset.
        restarts: number of consecutive faults that are tolerated; an episode played to its end resets the count.
        render_mode: None or "rgb_array".

    Raises:
        UserError: the interpreter or the environment does not start, or a space is not supported; the exception's notes
            contain the output of the process.
        EnvError: (reset, step, render) more than `restarts` consecutive faults.
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
        self.python = python
        self.target = env
        self.render_mode = render_mode
        self.timeout_s = timeout_s
        self.reset_timeout_s = reset_timeout_s
        self.restarts = restarts
        self.faults = 0
        self._start = (env, kwargs or {}, render_mode)
        self._environ = environ or {}
        self._consecutive = self._reported = 0
        self._obs: Any = None
        self._playing = False
        self._server: Server | None = None
        try:
            self._server, self.observation_space, self.action_space = self._start_server()
        except Fault as fault:
            output = " | ".join(line.strip() for line in fault.output[-3:] if line.strip() not in fault.message)
            error = UserError(f"{python} cannot serve {env}: it {fault.message}{output and f'; it said: {output}'}")
            for line in fault.output:
                error.add_note(line)
            raise error from None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        while True:
            try:
                if self._server is None:
                    self._server, *_ = self._start_server()
                    if seed is None:  # seed the new process from our generator, so that runs are reproducible
                        seed = int(self.np_random.integers(2**31))
                obs, info = self._server.ask("reset", self.reset_timeout_s, seed, options, read=_read_reset)
            except Fault as fault:
                self._recover(fault)
            else:
                self._obs = obs
                self._playing = True
                return obs, self._with_faults(info)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        if self._server is None and not self._playing:
            raise RuntimeError("RemoteEnv.step after the end of an episode: reset comes first")
        try:
            if self._server is None:  # the process died in render
                self._playing = False
                return copy.deepcopy(self._obs), 0.0, False, True, self._with_faults({})
            obs, reward, terminated, truncated, info = self._server.ask("step", self.timeout_s, action, read=_read_step)
        except Fault as fault:
            self._playing = False
            self._recover(fault)
            return copy.deepcopy(self._obs), 0.0, False, True, self._with_faults({})
        if terminated or truncated:
            self._consecutive = 0
        self._obs = obs
        return obs, reward, terminated, truncated, info

    def render(self) -> Any:
        """The rendered image, (H, W, 3) uint8. None without a render_mode, or if the process has died."""
        if self.render_mode is None or self._server is None:
            return None
        try:
            return self._server.ask("render", self.timeout_s)
        except Fault as fault:
            self._recover(fault)
            return None

    def close(self) -> None:
        """End the process and all its descendants. Repeated calls have no effect."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _start_server(self) -> tuple[Server, spaces.Space, spaces.Space]:
        server = Server(self.python, self._environ, self.reset_timeout_s)
        made = server.ask("make", self.reset_timeout_s, *self._start, read=_read_spaces)
        server.forget_folder()
        return server, *made

    def _recover(self, fault: Fault) -> None:
        """Count a fault and warn of it, or raise EnvError if there were too many. The next reset starts a process."""
        self._server = None
        self.faults += 1
        self._consecutive += 1
        self._last_fault = fault.message
        event = f"{self.target} in {self.python} {fault.message}"
        if self._consecutive > self.restarts:
            raise EnvError(
                f"{event}: fault {self._consecutive} without an episode played to its end,"
                f" and restarts={self.restarts}",
                trace="\n".join(fault.output),
            ) from None
        warnings.warn(f"{event}: fault {self.faults}, the process is started again", stacklevel=3)

    def _with_faults(self, info: dict[str, Any]) -> dict[str, Any]:
        """The info with the faults since the previous one, if there were any."""
        new = self.faults - self._reported
        self._reported = self.faults
        return {**info, FAULTS: new, "remote_fault": self._last_fault} if new else info


class Server:
    """The processes that run one environment, and the channel to them.

    Raises:
        UserError: the interpreter does not exist.
        Fault: (also in `ask`) the process failed. All processes have then ended.
    """

    def __init__(self, python: str, environ: dict[str, str], timeout_s: float) -> None:
        interpreter = shutil.which(os.path.expanduser(python))
        if interpreter is None:
            raise UserError(f"there is no interpreter {python!r}: give the path of one, such as /usr/bin/python3")
        shared_memory = Path("/dev/shm")
        self.folder = tempfile.mkdtemp(
            prefix=f"longdream-{os.getpid()}-", dir=shared_memory if os.access(shared_memory, os.W_OK) else "/tmp"
        )
        source = os.path.join(self.folder, "server.py")
        frames = os.path.join(self.folder, remote_server.FRAMES)
        shutil.copyfile(remote_server.__file__, source)
        handle = os.open(frames, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        remote_server.grow(handle, ROOM)
        self.channel: remote_server.Channel | None = None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(self.folder, remote_server.SOCKET))
            listener.listen(1)
            variables = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
            self.process = subprocess.Popen(
                [interpreter, "-u", "-c", BOOT, source, self.folder],
                stdin=subprocess.PIPE,  # never written to: it closes when this process ends, which the other side sees
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=variables | environ,
                start_new_session=True,  # Ctrl-C must only reach this process
            )
            try:
                connection = self._accepted(listener, timeout_s)
            except BaseException:
                os.close(handle)
                raise
        self.channel = remote_server.Channel(connection, handle)

    def ask(
        self, name: str, timeout_s: float, *arguments: Any, read: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        """Send a request, the call of a method of remote_server.Served, and return its result.

        Args:
            timeout_s: for the whole answer.
            read: turns the result into what is returned; any exception of it means that there was no proper result.
        """
        if self.channel is None:
            raise Fault(f"was interrupted before {name}", [])
        deadline = time.monotonic() + timeout_s
        try:
            self.channel.connection.settimeout(timeout_s)
            self.channel.send([name, list(arguments)])
            answer = self._receive(deadline, read)
        except _Unreadable as error:
            _, output = self._end()
            raise Fault(f"gave an answer to {name} that cannot be read ({error})", output) from None
        except TimeoutError:
            _, output = self._end()
            raise Fault(f"gave no answer to {name} within {timeout_s:g} s", output) from None
        except (EOFError, OSError):
            code, output = self._end()
            raise Fault(f"died in {name} ({_describe_exit(code)})", output) from None
        except (KeyboardInterrupt, SystemExit):  # a late answer would be taken for that of the next request
            self._end()
            raise
        if answer[0] == "ok":
            return answer[1]
        output = self.close()
        raise Fault(f"raised in {name}: {answer[1]}", [*output, *answer[2].splitlines()][-LINES:])

    def _receive(self, deadline: float, read: Callable[[Any], Any]) -> tuple[str, ...]:
        """The answer: ("ok", result) or ("raised", message, traceback). Raises _Unreadable for anything else."""
        assert self.channel is not None
        try:
            kind, *rest = self.channel.receive(deadline - time.monotonic())
            if kind == "ok":
                (result,) = rest
                return kind, read(result)
            message, trace = rest
            if kind != "raised" or not isinstance(message, str) or not isinstance(trace, str):
                raise ValueError(f"an answer {str(kind)[:40]!r}")
            return kind, message, trace
        except (EOFError, OSError):
            raise
        except Exception as error:  # whatever the other side sends is no failure of this one
            raise _Unreadable(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from None

    def forget_folder(self) -> None:
        """Delete the folder of the socket and the shared memory. Both processes keep them open."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> list[str]:
        """Close the environment and end its processes. Returns the last lines of output."""
        if self.channel is None:
            return []
        with contextlib.suppress(Exception):  # (an answer that cannot be read is as good as any)
            self.channel.connection.settimeout(CLOSE_S)
            self.channel.send(["close", []])
            self.channel.receive(CLOSE_S)
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
                code, output = self._end()
                raise Fault(f"ended at its start ({_describe_exit(code)})", output)
            if time.monotonic() > deadline:
                _, output = self._end()
                raise Fault(f"did not start within {timeout_s:g} s", output)

    def _end(self) -> tuple[int, list[str]]:
        """End every process. Returns the exit code and the last lines of output."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None
        try:
            output, _ = self.process.communicate(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            output, _ = self.process.communicate()
        self.forget_folder()
        return self.process.returncode, output.decode(errors="replace").splitlines()[-LINES:]


class _Unreadable(Exception):
    """The other side sent what is no answer."""


def _read_spaces(described: Any) -> tuple[spaces.Space, spaces.Space]:
    observation_space, action_space = described
    return space_of(observation_space), space_of(action_space)


def _read_reset(result: Any) -> tuple[Any, dict[str, Any]]:
    obs, info = result
    return obs, {**info}


def _read_step(result: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
    obs, reward, terminated, truncated, info = result
    return obs, reward, bool(terminated), bool(truncated), {**info}


def _describe_exit(code: int) -> str:
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(number).name}"
    return f"exit code {code}"


# -- spaces ------------------------------------------------------------------------------------------------------------


class Enum(spaces.Discrete):
    """MineRL's Enum, a choice of several words. Here a value is the index of its word; the other side translates it."""

    def __init__(self, values: list[str]) -> None:
        super().__init__(len(values))
        self.values = tuple(values)

    def __repr__(self) -> str:
        return f"Enum({', '.join(self.values)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Enum) and self.values == other.values


def space_of(described: Any) -> spaces.Space:
    """The Gymnasium space of a description by remote_server.describe."""
    kind, arguments = described
    match kind:
        case "Box":
            return spaces.Box(arguments["low"], arguments["high"], dtype=np.dtype(arguments["dtype"]).type)
        case "Enum":
            return Enum(arguments["values"])
        case "Discrete":
            return spaces.Discrete(arguments["n"], start=arguments["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(
                arguments["nvec"], dtype=np.dtype(arguments["dtype"]).type, start=arguments["start"]
            )
        case "MultiBinary":
            return spaces.MultiBinary(arguments["n"])
        case "Dict":  # Gymnasium sorts the keys of a dict, but not those of an OrderedDict
            return spaces.Dict(OrderedDict((key, space_of(inner)) for key, inner in arguments.items()))
        case "Tuple":
            return spaces.Tuple([space_of(inner) for inner in arguments])
        case _:
            letters = string.printable if arguments["letters"] is None else arguments["letters"]
            return spaces.Text(arguments["max_length"], min_length=arguments["min_length"], charset=letters)


# -- ids of the form remote:PYTHON:ENV ---------------------------------------------------------------------------------


def registration(env_id: str) -> Registration:
    """longdream/Remote-v0 with the interpreter and environment of "remote:PYTHON:ENV" as its arguments.

    Raises:
        UserError: the id does not have this form.
    """
    _, _, rest = env_id.partition(":")
    python, _, env = rest.partition(":")
    if not python or not env:
        raise UserError(f"{env_id!r} is not remote:PYTHON:ENV, such as remote:/usr/bin/python3.9:module:Id")
    base = gym.registry["longdream/Remote-v0"]
    return dataclasses.replace(base, kwargs={**base.kwargs, "python": python, "env": env})
