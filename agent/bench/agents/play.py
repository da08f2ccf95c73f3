"""`longdream bench play`: frames per second, from key to picture, and what a long session of `longdream play` costs."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from longdream.agent.bench.common import MB
from longdream.agent.cli.play import require
from longdream.agent.config.schema import Device
from longdream.agent.play.session import KEPT
from longdream.envs.contract import UserError

RECONNECT_S = 60.0
"""Seconds of a long session after which its connection is lost and comes back."""
WARM_S = 60.0
"""Seconds of a long session after which memory is measured first, if the history is full by then."""


def measure(
    run_folder: Path,
    seconds: float = 10.0,
    keys: int = 100,
    long: float = 0.0,
    speed: float = 30.0,
    steps: tuple[int, ...] = (1, 4),
    modes: tuple[Literal["dream", "both", "reality"], ...] = ("dream", "both"),
    device: Device | None = None,
) -> dict[str, Any]:
    """Frames per second and key to picture of `longdream play`, at the server, over a real socket.

    The command runs in a process of its own. A client confirms each frame as a page does. Frames are counted with the
    clock set to 60 a second while a key is held. From key to picture is the time from sending a key at a random moment
    to the frame that it led to. A long session holds simulated keys and loses its connection once a minute. Its clock
    falls behind where the machine cannot make so many steps a second.

    examples
      longdream bench play runs/demo
      longdream bench play memory-maze-9x9 --seconds 20
      longdream bench play runs/demo --long 3600 --seconds 1 --keys 10

    Args:
        run_folder: of the run, or the name of an agent that comes with the program
        seconds: for each count of frames
        keys: how many are timed
        long: seconds of the long session; 0 for none
        speed: steps per second of the long session and of the keys that are timed
        steps: denoising steps per frame
        modes: dream, both or reality
        device: where the agent computes (default: as in the run)

    Returns:
        first_page_s: from the command to its page; first_frame_s: to the first picture. rows: mode, steps, fps, cpu_ms
        (processor time of the server for a frame, which other work on the machine hardly changes), and key_ms: median
        and 95th percentile. load: of the machine, over a minute. long: seconds, frames, drift_s: how far the clock is
        behind at the end; memory in MB and open files of the server, early and at the end.
    """
    require("aiohttp")
    if seconds <= 0 or keys < 1 or long < 0 or min(steps, default=0) < 1 or not modes:
        raise UserError(f"--seconds {seconds:g}, --keys {keys}, --long {long:g}, --steps {steps}: must be more than 0")
    if not 0.5 <= speed <= 60:
        raise UserError(f"--speed {speed:g}: must be at least 0.5 and at most 60")
    return asyncio.run(_measure(run_folder, seconds, keys, long, speed, steps, modes, device))


async def _measure(
    run: Path,
    seconds: float,
    keys: int,
    long: float,
    speed: float,
    steps: tuple[int, ...],
    modes: tuple[str, ...],
    device: Any,
) -> dict[str, Any]:
    began = time.perf_counter()
    command = [sys.executable, "-m", "longdream", "play", str(run), "--no-open", "--port", "0"]
    command += ["--device", device] if device else []
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        address = ""
        said = []
        while not address:
            line = (await process.stderr.readline()).decode()
            if not line:
                raise UserError(said[-1].removeprefix("longdream: ") if said else "longdream play ended")
            said.append(line.strip())
            address = line.split()[1] if line.startswith("open http") else ""
        page = await _first_page(address)
        result: dict[str, Any] = {"run": str(run), "first_page_s": round(page - began, 2)}
        drain = asyncio.create_task(process.stderr.read())  # so that it never waits for somebody who reads
        async with _client(address) as client:
            result["first_frame_s"] = round(time.perf_counter() - began, 2)
            print(f"page after {result['first_page_s']} s, picture after {result['first_frame_s']} s")
            pid = process.pid
            result["rows"] = [await _row(client, pid, mode, n, seconds, keys, speed) for mode in modes for n in steps]
            result["load"] = round(os.getloadavg()[0], 2)
            print(f"load of the machine: {result['load']}")
        if long:
            result["long"] = await _long(address, process.pid, long, speed, modes[0])
        drain.cancel()
        return result
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _first_page(address: str) -> float:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(address) as response:
        await response.text()
    return time.perf_counter()


class Client:
    """A page without a browser: it confirms each frame."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.seq = 0
        self.name = ""
        self.bindings: list[list[str]] = []

    async def send(self, **message: Any) -> None:
        await self.socket.send_str(json.dumps(message))

    async def frame(self) -> dict[str, Any]:
        """The header of the next frame.

        Raises:
            UserError: the server sent an error instead.
        """
        from aiohttp import WSMsgType

        while True:
            message = await self.socket.receive(timeout=60)
            if message.type is WSMsgType.BINARY:
                (length,) = struct.unpack_from("<I", message.data)
                await self.send(do="seen")
                return json.loads(bytes(message.data[4 : 4 + length]))
            if message.type is not WSMsgType.TEXT:
                raise UserError(f"longdream play closed the socket ({message.type.name}: {message.data})")
            answer = json.loads(message.data)
            if "error" in answer:
                raise UserError(answer["error"])
            self.name = answer.get("session", self.name)
            if "keys" in answer:
                self.bindings = [binding["keys"] for binding in answer["keys"]["bindings"]]

    async def hold(self, keys: list[str]) -> int:
        """Hold these keys from now on; the number of this message."""
        self.seq += 1
        await self.send(do="keys", held=keys, seq=self.seq)
        return self.seq


@asynccontextmanager
async def _client(address: str, name: str = "") -> AsyncIterator[Client]:
    import aiohttp

    async with aiohttp.ClientSession(headers={"Origin": address.rstrip("/")}) as session:
        where = f"{address}socket?session={name}"
        async with session.ws_connect(where, max_msg_size=0, compress=0) as socket:
            client = Client(socket)
            await client.frame()
            yield client


async def _row(
    client: Client, pid: int, mode: str, steps: int, seconds: float, keys: int, speed: float
) -> dict[str, Any]:
    await client.send(do="set", mode=mode, steps=steps, speed=60)
    await client.send(do="play", on=True)
    await client.hold(client.bindings[0])
    for _ in range(10):
        await client.frame()
    began = time.perf_counter()
    used = _cpu_s(pid)
    frames = 0
    while time.perf_counter() - began < seconds:
        await client.frame()
        frames += 1
    fps = frames / (time.perf_counter() - began)
    cpu_ms = 1e3 * (_cpu_s(pid) - used) / frames
    times = await _key_times(client, keys, speed)
    centiles = statistics.quantiles(times, n=20) if len(times) > 1 else times * 20
    row = {"mode": mode, "steps": steps, "fps": round(fps, 1), "cpu_ms": round(cpu_ms, 1)}
    row |= {"key_ms": [round(statistics.median(times), 1), round(centiles[-1], 1)]}
    print(
        f"{mode}, {steps} denoising steps: {fps:.1f} frames/s, {cpu_ms:.1f} ms of processor time each, key to picture "
        f"{row['key_ms'][0]} ms (median)"
    )
    return row


async def _key_times(client: Client, keys: int, speed: float) -> list[float]:
    """Milliseconds from a key to the first frame that it led to, while time goes on."""
    await client.send(do="set", speed=speed)
    rng = random.Random(0)
    times = []
    for i in range(keys):
        until = time.perf_counter() + rng.uniform(0.05, 0.15)
        while time.perf_counter() < until:
            await client.frame()
        sent = time.perf_counter()
        seq = await client.hold(client.bindings[i % len(client.bindings)])
        while (await client.frame())["seq"] < seq:
            pass
        times.append(1e3 * (time.perf_counter() - sent))
    return times


async def _long(address: str, pid: int, seconds: float, speed: float, mode: str) -> dict[str, Any]:
    """A session of simulated keys, whose connection is lost now and then."""
    rng = random.Random(0)
    name = ""
    began = time.perf_counter()
    frames = late = 0.0
    first: tuple[float, int] | None = None
    while (left := began + seconds - time.perf_counter()) > 0:
        async with _client(address, name) as client:
            name = client.name
            await client.send(do="set", mode=mode, steps=1, speed=speed)
            await client.send(do="play", on=True)
            await client.hold(rng.choice(client.bindings))
            for _ in range(int(speed)):
                await client.frame()
            start = time.perf_counter()
            count = 0
            while time.perf_counter() - start < min(RECONNECT_S, left):
                await client.frame()
                count += 1
                if rng.random() < 0.1:
                    await client.hold(rng.choice(client.bindings))
            late += time.perf_counter() - start - count / speed
            frames += count
        lasted = time.perf_counter() - began
        if first is None and (lasted >= seconds / 2 or (lasted >= WARM_S and frames >= KEPT)):
            first = await _cost(pid)
    last = await _cost(pid)
    first = first or last
    result = {"seconds": round(time.perf_counter() - began, 1), "mode": mode, "frames": int(frames)}
    result |= {"drift_s": round(late, 3), "memory_mb": [round(first[0], 1), round(last[0], 1)]}
    result |= {"open_files": [first[1], last[1]]}
    print(
        f"{result['seconds']} s of simulated keys: {int(frames):,} frames, clock {late:+.3f} s, memory "
        f"{first[0]:.0f} to {last[0]:.0f} MB, open files {first[1]} to {last[1]}"
    )
    return result


def _cpu_s(pid: int) -> float:
    """Processor time that a process has used, of all its threads, in seconds."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _cost(pid: int) -> tuple[float, int]:
    """Resident memory in MB and open files of a process, once it has closed the connection that was just lost."""
    await asyncio.sleep(0.5)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB, len(os.listdir(f"/proc/{pid}/fd"))
