"""Collecting experience in a process of its own, beside learning (`--collect.async`)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from queue import SimpleQueue
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector.utils import CloudpickleWrapper

from longdream.agent.config.schema import Config
from longdream.agent.core.actor import Actor
from longdream.agent.core.agent import Agent
from longdream.agent.core.device import resolve_device, set_precision
from longdream.agent.core.ranks import apart
from longdream.agent.data.replay import Replay
from longdream.agent.evaluation.policy import make_world
from longdream.agent.run.checkpoint import from_bytes, to_bytes
from longdream.agent.run.signals import Signals, end_with_parent
from longdream.agent.train.collector import EPISODE, Collector
from longdream.agent.train.weights import SharedWeights
from longdream.envs.contract import EnvError, EnvSpec, Row, UserError, check_form
from longdream.envs.copies import one_line
from longdream.envs.make import World, find
from longdream.envs.workers import START_S, Workers

AHEAD = 8
"""Steps of every copy that are ordered before they are learned from, at most."""
OWN_S = 60.0
"""Seconds that the process may need for a step beside its environment's."""


@dataclass(frozen=True)
class Order:
    """What a collecting process is to do.

    Args:
        config: of the run, or of the rank's share of it.
        seed: root of the environment's seeds.
        first: number of the first copy.
        root: of the random stream of acting.
        registration: of the environment, which may be registered in the program alone.
    """

    config: Config
    seed: int
    first: int
    root: tuple[int, ...]
    registration: CloudpickleWrapper


@dataclass(frozen=True)
class Made:
    """What a collecting process says of its environment. workers: process ids of its copies."""

    spec: EnvSpec
    num_envs: int
    reading: str
    workers: list[int]


class CollectorProcess:
    """The process, as the learner sees it. It has the environment, and stands in for its `World`.

    Raises:
        UserError: (also in `receive`) the environment cannot be made, or no process be started.
        EnvError: (also in `receive`) the environment failed; or the process died, or did not answer in time.
    """

    def __init__(self, config: Config, seed: int, first: int, root: tuple[int, ...], signals: Signals):
        self.env_id = config.env.id
        self.timeout_s = config.env.timeout_s
        self.workers: list[int] = []
        self.closed = False
        registration: Any = find(config.env.id)
        order = Order(config, seed, first, root, CloudpickleWrapper(registration))
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=collect, args=(theirs, order), name="longdream-collector", daemon=True)
        try:
            with theirs, signals.hidden():
                self.process.start()
        except OSError as error:
            raise UserError(
                f"no collecting process can be started ({one_line(error)}): use --env.workers async"
            ) from error
        try:
            self.receive("started", START_S)
            made: Made = self.receive("made")
        except BaseException:
            self.close()
            raise
        self.spec = made.spec
        self.num_envs = made.num_envs
        self.workers = made.workers
        self._reading = made.reading
        self.faults = 0

    def reading(self) -> str:
        """How observations and actions are read, and how they are collected."""
        return (
            f"{self._reading}\ncollecting in a process of its own, {AHEAD} steps ahead at most: a run that is resumed "
            f"loses nothing, but does not repeat itself bit for bit"
        )

    def begin(self, weights: int) -> None:
        """Let it make its actor and reset its environment.

        Args:
            weights: file of the `SharedWeights` that it acts with.
        """
        self.send("begin", None)
        with suppress(OSError):  # it has died, which `receive` sees
            send_handle(self.pipe, weights, self.process.pid)
        self.faults += self.receive("began")

    def send(self, name: str, value: Any) -> None:
        with suppress(OSError):
            self.pipe.send((name, value))

    def receive(self, name: str, limit: float | None = None) -> Any:
        """The value of the next message, which is of that name.

        Args:
            limit: seconds after which the process is given up; None for what the environment's own limits bound.

        Raises:
            Exception: what was raised there, with its traceback if it is none of an environment.
        """
        if not wait([self.pipe, self.process.sentinel], limit):
            self.kill()
            raise EnvError(
                f"the collecting process of {self.env_id} gave no answer within {limit:g} s: it hangs, or "
                f"env.timeout_s is too short"
            )
        try:
            if not self.pipe.poll():  # it has ended, and one that it has started holds the pipe
                raise EOFError
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1.0)  # the pipe closes before the process
            code = self.process.exitcode
            self.kill()
            raise EnvError(f"the collecting process of {self.env_id} died (exit code {code})") from None
        if kind == "error":
            error, trace = value
            raise error from (_Elsewhere(trace) if trace else None)
        assert kind == name, f"{kind} came instead of {name}"
        return value

    def close(self) -> None:
        """Let the environment close within its time, and then end what is left. Repeated calls have no effect."""
        if self.closed:
            return
        self.pipe.close()  # by which it ends
        self.process.join(self.timeout_s + OWN_S)
        self.kill()

    def kill(self) -> None:
        """End the process and its environment's, without waiting for an answer."""
        self.closed = True
        for pid in [self.process.pid, *self.workers] if self.process.exitcode != 0 else []:
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Elsewhere(Exception):
    """The traceback of an error in the collecting process, as the cause of the same error here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class AsyncCollector:
    """A `RowCollector` whose steps are taken in a process of its own, up to AHEAD of them before they are asked for.

    The process steps when it has an order to, with the newest weights. So neither waits for the other, as long as the
    one is not AHEAD steps faster; and as many steps are taken as are asked for, but for those ahead.
    """

    def __init__(self, process: CollectorProcess, agent: Agent, replay: Replay):
        self.process = process
        self.agent = agent
        self.replay = replay
        self.weights = SharedWeights(agent)
        process.begin(self.weights.file)
        self.ordered = 0
        """Steps that were ordered and not yet taken."""
        self.finished: deque[tuple[tuple[Row, np.ndarray, np.ndarray], dict[str, Any]]] = deque()
        """Of these, those that were fetched for a checkpoint: row, action and surprise, and what came of the action."""
        self.env_steps = 0
        self.episodes = 0
        self.reward = 0.0
        self._restart()

    def _restart(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.stale: list[int] = []

    def step(self, random: bool) -> list[dict[str, float]]:
        self.weights.publish(self.agent.updates)
        while self.ordered < AHEAD:
            self.process.send("step", random)
            self.ordered += 1
        if self.finished:
            row, outcome = self.finished.popleft()
            self.replay.add(*row)
        else:
            began = time.perf_counter()
            row = self._receive("row")
            self.replay.add(*row)  # if the environment fails now, this row is its last one
            outcome = self._receive("outcome")
            self.waited += time.perf_counter() - began
        self.ordered -= 1
        self.env_steps += outcome["steps"]
        self.episodes += len(outcome["ended"])
        self.reward += outcome["reward"]
        self.process.faults += outcome["faults"]
        if not outcome["random"]:
            self.stale.append(self.agent.updates - outcome["updates"])
        return outcome["ended"]

    def _receive(self, name: str) -> Any:
        return self.process.receive(name, self.process.timeout_s + OWN_S)

    def take_reward(self) -> float:
        reward = self.reward
        self.reward = 0.0
        return reward

    def take_metrics(self) -> dict[str, float]:
        """stale: updates since those whose weights chose an action, when its row is learned from for the first time.
        waited: share of the time in which the learner waited for rows."""
        metrics = {"collect/waited": self.waited / (time.perf_counter() - self.began)}
        if self.stale:
            metrics["collect/stale"] = sum(self.stale) / len(self.stale)
        self._restart()
        return metrics

    def get_state(self) -> dict[str, Any]:
        self.process.send("get_state", None)
        while len(self.finished) < self.ordered:
            self.finished.append((self._receive("row"), self._receive("outcome")))
        state = from_bytes(torch.frombuffer(bytearray(self._receive("state")), dtype=torch.uint8))
        finished = [
            {"row": dict(vars(row)), "action": action, "surprise": surprise, "outcome": outcome}
            for (row, action, surprise), outcome in self.finished
        ]
        return {"process": state, "finished": finished, "reward": self.reward}

    def set_state(self, tree: dict[str, Any]) -> None:
        for step in tree["finished"]:
            self._check(step)
        self.process.send("set_state", to_bytes(tree["process"]))
        self.process.receive("went_on")
        self.finished.clear()
        for step in tree["finished"]:
            self.finished.append(((Row(**step["row"]), step["action"], step["surprise"]), step["outcome"]))
        self.ordered = len(self.finished)
        self.reward = tree["reward"]

    def _check(self, step: dict[str, Any]) -> None:
        """Raise ValueError for what is no finished step."""
        form = {key: np.zeros((self.replay.num_envs, *shape), t) for key, (shape, t) in self.replay.fields.items()}
        obs = {key[4:]: form[key] for key in form if key.startswith("obs/")}
        row = {"obs": obs, **{key: form[key] for key in ("is_first", "reward", "terminated", "truncated")}}
        ended = [dict.fromkeys(EPISODE, 0.0)] * len(step["outcome"]["ended"])
        outcome = {"steps": 0, "faults": 0, "random": False, "updates": 0, "ended": ended, "reward": 0.0}
        action = form["action"].astype(np.float32)
        check_form(step, {"row": row, "action": action, "surprise": form["surprise"], "outcome": outcome}, "finished")


# -- the process ------------------------------------------------------------------------------------------------------


def collect(pipe: Connection, order: Order) -> None:
    """The process: makes the environment, and answers the learner until that closes the pipe or has ended."""
    multiprocessing.current_process().daemon = False  # its environment's copies are processes, too
    os.setpgid(0, 0)  # what a terminal sends, it sends to the learner alone
    apart()
    end_with_parent()
    torch.set_num_threads(1)  # the others are the learner's
    outbox = Outbox(pipe)
    world: World | None = None
    try:
        outbox.put("started", None)
        env = order.config.env
        registration: Any = order.registration.fn
        if registration.id == env.id:  # else there is a module that registers it
            gym.registry.setdefault(registration.id, registration)
        world = make_world(World, env, env.copies, order.seed, first=order.first)
        workers = [process.pid for process in world.vector.processes] if isinstance(world.vector, Workers) else []
        outbox.put("made", Made(world.spec, world.num_envs, world.reading(), workers))
        if _next(pipe) is not None:
            collecting = Collecting(world, order, outbox, recv_handle(pipe))
            while (message := _next(pipe)) is not None:
                name, value = message
                getattr(collecting, name)(value)
    except BaseException as error:
        outbox.put_error(error)
    outbox.close()
    if world is not None:
        world.close()


def _next(pipe: Connection) -> tuple[str, Any] | None:
    """The next message of the learner; None if there will be none."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


class Outbox:
    """Sends messages to the learner without waiting until it reads them. Collects rows, each in a message."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.queue: SimpleQueue[bytes | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._send, daemon=True)
        self.thread.start()

    def put(self, name: str, value: Any) -> None:
        # packed here: an environment may use the memory of a row again
        self.queue.put(bytes(ForkingPickler.dumps((name, value))))

    def put_error(self, error: BaseException) -> None:
        """An exception, with its traceback where that is not an environment's or a user's affair."""
        expected = isinstance(error, EnvError | UserError)
        trace = "" if expected else traceback.format_exc()
        try:
            self.put("error", (error, trace))
        except Exception:  # it cannot travel
            self.put("error", (RuntimeError(one_line(error)), trace))

    def add(self, row: Row, action: np.ndarray, surprise: np.ndarray) -> None:
        self.put("row", (row, action, surprise))

    def close(self) -> None:
        """Return once all is sent, or the learner is gone."""
        self.queue.put(None)
        self.thread.join()

    def _send(self) -> None:
        with suppress(OSError):
            while (message := self.queue.get()) is not None:
                self.pipe.send_bytes(message)


class Collecting:
    """What goes on in the process: each method answers the message of its name."""

    def __init__(self, world: World, order: Order, outbox: Outbox, weights: int):
        config = order.config
        device = torch.device(resolve_device(config.device))
        set_precision(config.precision, device)
        seeds = np.random.SeedSequence(order.root)
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        self.outbox = outbox
        actor = Actor.built(config, world.spec, device)
        self.weights = SharedWeights(actor, weights)
        self.collector = Collector(world, actor, outbox, np.random.default_rng(seeds))
        outbox.put("began", world.faults)

    def step(self, random: bool) -> None:
        updates = self.weights.take()
        collector = self.collector
        steps = collector.env_steps
        faults = collector.world.faults
        ended = collector.step(random)
        outcome = {"steps": collector.env_steps - steps, "faults": collector.world.faults - faults, "random": random}
        self.outbox.put("outcome", outcome | {"updates": updates, "ended": ended, "reward": collector.take_reward()})

    def get_state(self, _: None) -> None:
        cuda = torch.cuda.get_rng_state_all() if self.collector.agent.device.type == "cuda" else []
        random = {"numpy": self.collector.rng.bit_generator.state, "torch": torch.get_rng_state(), "cuda": cuda}
        self.outbox.put("state", to_bytes({"collector": self.collector.get_state(), "random": random}))

    def set_state(self, blob: bytes) -> None:
        tree = from_bytes(torch.frombuffer(bytearray(blob), dtype=torch.uint8))
        self.collector.set_state(tree["collector"])
        random = tree["random"]
        self.collector.rng.bit_generator.state = random["numpy"]
        torch.set_rng_state(random["torch"])
        if random["cuda"]:
            torch.cuda.set_rng_state_all(random["cuda"])
        self.outbox.put("went_on", None)
