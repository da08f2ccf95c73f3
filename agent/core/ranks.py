"""The ranks of a run: processes that torchrun has started to train together, each with its part of rows and copies.

What they learn is averaged where it is computed (worldmodel/ranks.py). Here they agree on everything else: how far the
run is, when it is saved, that a signal came or that one of them failed.
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed: its stores

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from longdream.agent.config.schema import Config
from longdream.agent.run.signals import Interrupted, Signals
from longdream.envs.contract import EnvError, UserError
from longdream.worldmodel.ranks import RankLost, call

STORE = "LONGDREAM_STORE"
"""Environment variable with the file by which ranks of one machine find each other. `longdream train --gpus` sets it;
without it, they do by what torchrun sets (MASTER_ADDR and MASTER_PORT)."""
TIMEOUT = "LONGDREAM_RANK_TIMEOUT_S"
"""Environment variable: seconds after which a rank that others wait for is given up."""
TIMEOUT_S = 300.0
GRACE_S = 5.0
"""Seconds in which ranks say that they are there, once one of them is lost."""


class RankFailed(RuntimeError):
    """A rank has failed, ended or hung. The message names it."""


@dataclass
class Ranks:
    """The ranks as one of them sees them. By default there is one, which agrees with itself and sends nothing.

    rank: number of this one, from 0. count: of all. local: of those on this machine, from 0.
    """

    rank: int = 0
    count: int = 1
    signals: Signals | None = None
    without_gpu: bool = False
    """Whether this machine has GPUs, and fewer than ranks."""
    hosts: Any = None
    """The process group of what the programs tell each other, on the CPU."""
    store: Any = None
    processes: list[list[Any]] = field(default_factory=list)
    """Machine and process id of each rank."""
    parent: int = field(default_factory=os.getppid)

    # -- shares -------------------------------------------------------------------------------------------------------

    def share(self, config: Config) -> Config:
        """What this rank does of a run whose configuration tells copies, batches and replay for all ranks together.

        Raises:
            UserError: something cannot be shared evenly; the message has numbers that can.
        """
        if self.count == 1:
            return config
        if self.without_gpu and config.device != "cpu":
            raise UserError(
                "this machine has fewer GPUs than ranks: start as many ranks as it has GPUs, or use --device cpu"
            )
        learn = replace(config.learn, encoder_rows=self._part("learn.encoder_rows", config.learn.encoder_rows))
        if config.kind == "video":
            for length in config.video.lengths:
                self._part(f"video.frames / {length} clips", config.video.frames // length)
            return replace(config, learn=learn)
        batch = self._part("replay.batch", config.replay.batch)
        buffer = replace(config.replay, batch=batch, capacity=config.replay.capacity // self.count)
        if config.kind == "online":
            env = replace(config.env, copies=self._part("env.copies", config.env.copies))
            config = replace(config, env=env)
        return replace(config, learn=learn, replay=buffer)

    def _part(self, name: str, value: int) -> int:
        if value % self.count:
            below = value // self.count * self.count
            fits = " or ".join(str(fit) for fit in (below, below + self.count) if fit)
            raise UserError(f"{name} = {value} is for all {self.count} ranks together, which share evenly: use {fits}")
        return value // self.count

    def span(self, total: int) -> range:
        """The part of this rank of `total` things, as even as can be."""
        return range(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def seed(self, *root: int) -> tuple[int, ...]:
        """The root of a random stream of this rank; that of rank 0 is the root of a run of one rank."""
        return (*root, self.rank) if self.rank else root

    # -- agreements ---------------------------------------------------------------------------------------------------

    def numbers(self, *values: float) -> np.ndarray:
        """The numbers that each rank has given, `(ranks, values)` float64.

        Raises (as every method below):
            RankLost: another rank has ended, or does not answer.
        """
        own = torch.tensor(values, dtype=torch.float64)
        if self.count == 1:
            return own[None].numpy()
        out = [torch.empty_like(own) for _ in range(self.count)]
        call(dist.all_gather, out, own, group=self.hosts)
        return torch.stack(out).numpy()

    def gather(self, value: Any) -> list[Any]:
        """What each rank has given, as JSON values."""
        if self.count == 1:
            return [value]
        blob = json.dumps(value).encode()
        sizes = self.numbers(len(blob))[:, 0].astype(int)
        out = [torch.empty(max(sizes), dtype=torch.uint8) for _ in range(self.count)]
        call(dist.all_gather, out, _padded(blob, max(sizes)), group=self.hosts)
        return [json.loads(bytes(each[:size].numpy())) for each, size in zip(out, sizes, strict=True)]

    def to_first(self, blob: bytes) -> list[torch.Tensor]:
        """On rank 0 the bytes that the other ranks have given, in the order of their ranks; elsewhere nothing."""
        if self.count == 1:
            return []
        sizes = self.numbers(len(blob))[:, 0].astype(int)
        most = max(sizes)
        out = [torch.empty(most, dtype=torch.uint8) for _ in range(self.count)] if self.rank == 0 else None
        call(dist.gather, _padded(blob, most), out, dst=0, group=self.hosts)
        return [each[:size].clone() for each, size in list(zip(out or [], sizes, strict=bool(out)))[1:]]

    def total(self, values: dict[str, Any]) -> dict[str, Any]:
        """The sums over ranks of numbers by name."""
        if self.count == 1:
            return values
        parts = self.gather(values)
        return {key: sum(part[key] for part in parts) for key in values}

    @contextmanager
    def together(self, numbers: Callable[[], tuple[float, ...]] = tuple) -> Iterator[list[np.ndarray]]:
        """Around what may fail on one rank: the error of the first that failed is raised on all, with its number.

        Within, the ranks must not exchange anything: one that has failed does not come to it.

        Args:
            numbers: called afterwards. What it gives on each rank, `(ranks, values)`, is put into the list.
        """
        met: list[np.ndarray] = []
        if self.count == 1:
            yield met
            met.append(self.numbers(*numbers()))
            return
        failure: Exception | None = None
        try:
            yield met
        except RankLost:
            raise
        except Exception as error:
            failure = error
        rows = self.numbers(failure is not None, *numbers())
        met.append(rows[:, 1:])
        if not rows[:, 0].any():
            return
        reports = self.gather(None if failure is None else _describe(failure))
        first = next(rank for rank, each in enumerate(reports) if each is not None)
        error = failure if first == self.rank == 0 and failure is not None else _error(reports[first], first)
        error.agreed = True  # type: ignore[attr-defined]
        raise error from failure

    def signal(self, own: int | None) -> int:
        """A signal to the program, 0 without one: `own`, one that came earlier, or that whoever started it is gone."""
        if own is None and self.signals is not None:
            own = self.signals.number
        if own is None and self.count > 1 and os.getppid() != self.parent:
            own = 15
        return own or 0

    # -- a rank that is lost ------------------------------------------------------------------------------------------

    def tell(self, text: str) -> None:
        """Leave word of an error that ends this rank, for those that will miss it."""
        with suppress(RuntimeError):
            self.store.set("error", json.dumps([self.rank, text]))

    def lost(self) -> tuple[str, bool]:
        """Find out which rank is lost. Called on every rank that has noticed.

        Returns:
            what happened, in one line; whether it is for this rank to say so.
        """
        with suppress(RuntimeError):
            self.store.set(f"here/{self.rank}", "")
        deadline = time.monotonic() + GRACE_S
        while True:
            missing = [rank for rank in range(self.count) if rank != self.rank and not self._has(f"here/{rank}")]
            dead = [rank for rank in missing if not self._lives(rank)]
            if self._has("error") or dead or not missing or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        speaker = next(rank for rank in range(self.count) if rank == self.rank or rank not in missing)
        if self._has("error"):
            failed, text = json.loads(self.store.get("error"))
            speaker = speaker if failed else 0  # which has said so itself
            text = f"rank {failed}: {text}"
        elif dead:
            text = f"{self._named(dead)} died"
        elif missing:
            text = f"{self._named(missing)} did not answer within {timeout_s():g} s (it hangs, or ${TIMEOUT} is short)"
        else:
            text = "the ranks have lost each other: look at the network between the machines"
        if speaker == self.rank:
            with suppress(RuntimeError):
                self.store.set("reported", "")
        return text, speaker == self.rank

    def _has(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except RuntimeError:  # whoever kept the store has ended
            return False

    def _lives(self, rank: int) -> bool:
        """Whether a rank's process is there, as far as this machine knows."""
        machine, pid = self.processes[rank]
        if machine != self.processes[self.rank][0]:
            return True
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return not Path("/proc/self/stat").exists()

    def _named(self, ranks: list[int]) -> str:
        named = [f"rank {rank} (process {self.processes[rank][1]} on {self.processes[rank][0]})" for rank in ranks]
        return " and ".join(named)


_here = Ranks()


def here() -> Ranks:
    """The ranks of this program."""
    return _here


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun has started, which this process joins.

    Within, this process sees one GPU, its own, and signals wait until they are asked for.

    Raises:
        RankFailed: the others cannot be found.
    """
    global _here
    with Signals() as signals:
        rank = int(os.environ["RANK"])
        try:
            _here = _join(rank, int(os.environ["WORLD_SIZE"]), signals)
        except RankLost as error:
            raise RankFailed(f"rank {rank} does not find the others: {error}") from error
        try:
            yield _here
            leave()
        finally:
            _here = Ranks()


def leave() -> int:
    """End what the ranks do together: what follows is each one's own. Returns the number that this one had."""
    global _here
    rank = _here.rank
    if _here.count > 1:
        _here.hosts = _here.store = None  # what the group runs on ends with the last reference
        call(dist.destroy_process_group)
        _here = Ranks(rank)
    return rank


def apart() -> None:
    """Let this process, which a rank has started, be none itself."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STORE):
        os.environ.pop(name, None)


def timeout_s() -> float:
    """Seconds after which a rank that others wait for is given up."""
    return float(os.environ.get(TIMEOUT, TIMEOUT_S))


def _join(rank: int, count: int, signals: Signals) -> Ranks:
    local = int(os.environ.get("LOCAL_RANK", rank))
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if on_this_machine == count and sys.platform == "linux":  # nothing has to be reached from outside
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast of NVLink: refused by some machines, and slower here
    without_gpu = _take_gpu(local)
    on_cuda = torch.cuda.is_available()
    limit = timedelta(seconds=timeout_s())
    if path := os.environ.get(STORE):
        store: Any = dist.FileStore(path, -1)
    else:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=limit)))  # type: ignore[attr-defined]
    store = dist.PrefixStore("longdream", store)
    call(
        dist.init_process_group,
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        # on CUDA it is the programs' own agreement that notices first
        timeout=2 * limit if on_cuda else limit,
    )
    hosts = call(dist.new_group, backend="gloo", timeout=limit)
    ranks = Ranks(rank, count, signals, without_gpu, hosts, store)
    ranks.processes = ranks.gather([socket.gethostname(), os.getpid()])
    return ranks


def _take_gpu(local: int) -> bool:
    """Let this process see its own GPU alone; whether there are GPUs, and none for it. Before CUDA is used."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    if local < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]
    return 0 < len(devices) <= local


def _padded(blob: bytes, size: int) -> torch.Tensor:
    out = torch.zeros(size, dtype=torch.uint8)
    out[: len(blob)] = torch.from_numpy(np.frombuffer(blob, np.uint8).copy())
    return out


# -- errors that travel ------------------------------------------------------------------------------------------------


def _describe(error: Exception) -> dict[str, Any]:
    if isinstance(error, Interrupted):
        return {"signal": error.number}
    if isinstance(error, EnvError):
        return {"kind": "EnvError", "text": error.message, "worker": error.worker, "trace": error.trace}
    if isinstance(error, UserError):
        return {"kind": type(error).__name__, "text": str(error)}
    return {"kind": "", "text": f"{type(error).__name__}: {error}"}


def _error(report: dict[str, Any], rank: int) -> Exception:
    """The error of that rank, as it is raised on others."""
    if "signal" in report:
        return Interrupted(report["signal"])
    text = f"rank {rank}: {report['text']}" if rank else report["text"]
    if report["kind"] == "EnvError":
        return EnvError(text, report["worker"], report["trace"])
    kinds: list[type[UserError]] = [UserError]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
    return next((kind(text) for kind in kinds if kind.__name__ == report["kind"]), RankFailed(text))
