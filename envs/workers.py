"""Copies of an environment in a process of their own each, none of which is waited for longer than agreed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from longdream.envs.contract import EnvError, UserError
from longdream.envs.copies import Copy, name_workers, one_line
from longdream.envs.remote import FAULTS

START_S = 120.0
"""Seconds for a process to start and to import this project, before its environment is made."""


class Workers(VectorEnv):
    """n copies with one process each, whose steps are rows as `Copy` makes them.

    A worker may start processes of its own; all of them are in its process group and end with it. Ctrl-C in a terminal
    does not reach them.

    Args:
        makers: make the copies; each is called in its worker's process.
        env_id: name of the environment, for messages.
        timeout_s: time limit in seconds for a copy to be made, and for all to close.
        first: number of the first copy, for messages.

    Raises:
        UserError: the environment cannot be made, or no process can be started.
        EnvError: (also in `ask`) a worker died, did not answer in time, or raised.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(self, makers: Sequence[Callable[[], Copy]], env_id: str, timeout_s: float, first: int = 0) -> None:
        self.env_id = env_id
        self.first = first
        self.num_envs = len(makers)
        self.timeout_s = timeout_s
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.pending = False  # whether answers are due
        try:
            self._start()
            made = self._make(makers)
            self._take_spaces(made)
        except BaseException:
            self.kill()
            raise

    def call_within(self, timeout_s: float, name: str, **kwargs: Any) -> Any:
        """`reset(seed=...)` or `step(actions=...)` as of any vector environment, or another method of every copy, of
        which it returns the results in a list."""
        if name == "reset":
            seeds = kwargs.get("seed") or [None] * self.num_envs
            answers = self.ask(name, timeout_s, [{"seed": seed} for seed in seeds])
            obs, infos = zip(*answers, strict=True)
            return self._stack(obs), _sum_faults(infos)
        if name == "step":
            answers = self.ask(name, timeout_s, [{"action": action} for action in kwargs["actions"]])
            obs, reward, terminated, truncated, infos = zip(*answers, strict=True)
            return self._stack(obs), np.array(reward), np.array(terminated), np.array(truncated), _sum_faults(infos)
        return self.ask(name, timeout_s, [kwargs] * self.num_envs)

    def ask(self, name: str, timeout_s: float, each: Sequence[dict[str, Any]]) -> list[Any]:
        """Call a method of every copy, with these keyword arguments. Returns the results."""
        self.send(name, each)
        answers = self._gather(name, timeout_s)
        self.pending = False
        return answers

    def send(self, name: str, each: Sequence[dict[str, Any]]) -> None:
        self.pending = True
        for pipe, arguments in zip(self.pipes, each, strict=True):
            with contextlib.suppress(OSError):  # it has died, which _gather sees
                pipe.send((name, arguments))

    def close_extras(self, **kwargs: Any) -> None:
        """Let every copy close within `timeout_s`, and then end what is left of the processes."""
        if not self.pending:
            for pipe in self.pipes:
                with contextlib.suppress(OSError):
                    pipe.send(("close", {}))
            deadline = time.monotonic() + self.timeout_s
            while (running := self._running()) and (left := deadline - time.monotonic()) > 0:
                wait([self.processes[i].sentinel for i in running], left)
            if running:
                which = f"environment {self._named(running)} of {self.env_id}"
                warnings.warn(f"{which} did not close within {self.timeout_s:g} s and was ended", stacklevel=2)
        self.kill()

    def kill(self) -> None:
        """End every worker, and the processes that it has started, without waiting for an answer."""
        self.closed = True
        for process in self.processes:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # a worker that hangs may ignore SIGTERM
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        for i in range(self.num_envs):
            try:
                ours, theirs = context.Pipe()
                self.pipes.append(ours)
                process = context.Process(target=_work, args=(theirs,), name=f"{self.env_id} {i}", daemon=True)
                with theirs:
                    process.start()
            except (EOFError, OSError) as error:
                raise _cannot_start(self.env_id, error) from error
            self.processes.append(process)

    def _make(self, makers: Sequence[Callable[[], Copy]]) -> list[Any]:
        """Let every worker make its copy. A copy's time begins when its process runs."""
        self.pending = True
        self._gather("start", START_S)
        for pipe, maker in zip(self.pipes, makers, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(CloudpickleWrapper(maker))
        made = self._gather("make", self.timeout_s)
        self.pending = False
        return made

    def _take_spaces(self, made: list[Any]) -> None:
        first, *others = made
        for i, other in enumerate(others, 1):
            for name in ("observation", "action"):
                if other[name] != first[name]:
                    raise UserError(
                        f"the {name} space of {self.env_id} is {first[name]} in one copy and {other[name]} in"
                        f" {self._named([i])}: all copies must have the same"
                    )
        self.single_observation_space = first["observation"]
        self.single_action_space = first["action"]
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.render_mode = first["render_mode"]

    def _gather(self, name: str, timeout_s: float) -> list[Any]:
        """The workers' answers to `name`, all within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        errors: dict[int, Exception] = {}
        dead: list[int] = []
        waiting = {pipe: i for i, pipe in enumerate(self.pipes)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                i = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    answer = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    dead.append(i)
                    continue
                except Exception as error:  # of a class that exists in the worker only
                    which = f"environment {self._named([i])} of {self.env_id}"
                    answer = EnvError(f"{which} sent what cannot be read in {name}: {one_line(error)}", i)
                if isinstance(answer, Exception):
                    errors[i] = answer
                else:
                    answers[i] = answer
        self._raise_errors(name, errors, sorted(dead), sorted(waiting.values()), timeout_s)
        return [answers[i] for i in range(self.num_envs)]

    def _raise_errors(
        self, name: str, errors: dict[int, Exception], dead: list[int], silent: list[int], timeout_s: float
    ) -> None:
        if errors:
            raise errors[min(errors)] from None
        if dead:
            self.processes[dead[0]].join(1.0)  # the pipe closes before the process
            code = self.processes[dead[0]].exitcode
            message = f"environment {self._named(dead)} of {self.env_id} died in {name} (exit code {code})"
            raise EnvError(message, dead[0])
        if silent:
            message = (
                f"environment {self._named(silent)} of {self.env_id} gave no answer to {name} within {timeout_s:g} s"
            )
            raise EnvError(f"{message}: it hangs, or env.timeout_s is too short", silent[0])

    def _named(self, places: list[int]) -> str:
        return name_workers([self.first + place for place in places])

    def _running(self) -> list[int]:
        return [i for i, process in enumerate(self.processes) if process.is_alive()]

    def _stack(self, observations: Sequence[Any]) -> Any:
        if isinstance(self.single_observation_space, spaces.Dict):
            keys = self.single_observation_space.spaces
            return {key: np.stack([obs[key] for obs in observations]) for key in keys}
        return np.stack(observations)


def _work(pipe: Connection) -> None:
    """A worker's process: make a copy, and answer requests until it is to close or the program has ended."""
    multiprocessing.current_process().daemon = False  # its environment may start processes of its own
    os.setpgid(0, 0)  # which then end with it
    pipe.send(None)
    try:
        copy: Copy = pipe.recv().fn()
    except (UserError, EnvError) as error:
        pipe.send(error)
        return
    except BaseException as error:  # its module cannot be imported
        pipe.send(UserError(f"an environment worker cannot be made: {one_line(error)}"))
        return
    parts = {"observation": copy.observation_space, "action": copy.action_space, "render_mode": copy.render_mode}
    _answer(pipe, copy, parts)
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError):
            break
        if name == "close":
            break
        try:
            result = getattr(copy, name)(**arguments)
        except EnvError as error:
            result = error
        _answer(pipe, copy, result)
    copy.close()


def _answer(pipe: Connection, copy: Copy, result: Any) -> None:
    try:
        pipe.send(result)
    except OSError:  # the program has ended
        return
    except Exception as error:  # it cannot travel: a picture that is no array, a space of a local class
        message = f"environment worker {copy.index} of {copy.env_id} returned what cannot travel: {one_line(error)}"
        pipe.send(EnvError(message, copy.index, traceback.format_exc()))


def _cannot_start(env_id: str, error: BaseException) -> UserError:
    folder = tempfile.gettempdir()
    if "AF_UNIX" in str(error):
        return UserError(
            f"TMPDIR = {folder} is too long ({len(folder)} characters) for the sockets of worker processes: set it to a"
            " short folder such as /tmp, or use --env.workers sync"
        )
    return UserError(
        f"no worker process of {env_id} can be started ({one_line(error)}): lower --env.copies, or use --env.workers"
        " sync"
    )


def _sum_faults(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {FAULTS: sum(info.get(FAULTS, 0) for info in infos)}
