"""One page that plays a session: its commands, the clock, and the frames that are sent to it.

A message to the page is binary for a moment (a header of JSON behind its length, then the pictures), and JSON text
otherwise. A message from the page is one JSON object; what it may hold is checked here.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np

from longdream.agent.play.frames import cannot_be_uploaded
from longdream.agent.play.recording import Recording
from longdream.agent.play.session import Moment, Session
from longdream.agent.play.source import Source
from longdream.envs.contract import EnvError, UserError

WINDOW = 3
"""Frames that the page has not confirmed yet, at most: a slow connection slows the clock instead of filling buffers."""
FASTEST = 60.0
SLOWEST = 0.5
MOST_HELD = 8
"""Keys that count as held together."""
MOST_STEPS = 64
"""Denoising steps, at most."""

Blocking = Callable[..., Awaitable[Any]]
"""Runs a function with its arguments in the thread that computes."""


class Socket(Protocol):
    """What a player needs of a connection."""

    async def send_bytes(self, data: bytes) -> None: ...
    async def send_str(self, data: str) -> None: ...


class Player:
    """A session and the page that plays it; the page may be lost and come back.

    Args:
        source: that the session is of. blocking: where it computes. written: told of every file that is written, by its
            address for the page.
    """

    def __init__(self, source: Source, session: Session, blocking: Blocking, written: dict[str, Any]) -> None:
        self.source = source
        self.session = session
        self.blocking = blocking
        self.written = written
        self.socket: Socket | None = None
        self.wake = asyncio.Event()
        self.turn = asyncio.Lock()
        self.playing = not source.keys.idle
        """Whether time goes on: by itself, or as long as a key is held where no action does nothing."""
        self.speed = min(max(source.fps, SLOWEST), FASTEST)
        self.held: list[str] = []
        self.tapped: list[str] = []
        """Keys that were pressed since the last step: a tap that is shorter than a step counts too."""
        self.mouse: tuple[float, float] | None = None
        self.pressed = 0
        """Number of the last message of keys, which frames repeat: so a page measures from key to picture."""
        self.unconfirmed = 0
        self.recording: Recording | None = None

    # -- the connection -----------------------------------------------------------------------------------------------

    async def run(self, socket: Socket, messages: Any) -> None:
        """Play with this page until it goes: an async iterator of its messages, as text."""
        self.socket = socket
        self.unconfirmed = 0
        self.held = []
        self.tapped = []
        await self.send(self.hello())
        await self.show()
        clock = asyncio.create_task(self._clock())
        try:
            async for text in messages:
                await self._take(text)
        finally:
            clock.cancel()
            await asyncio.gather(clock, return_exceptions=True)
            if self.socket is socket:
                self.socket = None

    async def _take(self, text: str) -> None:
        try:
            message = json.loads(text)
            if not isinstance(message, dict):
                raise UserError("a message is one JSON object")
            await self.obey(message)
        except (UserError, EnvError) as error:
            await self.send({"error": str(error).partition("\n")[0]})
        except (ValueError, RecursionError):
            await self.send({"error": "a message is one JSON object"})

    async def send(self, message: dict[str, Any]) -> None:
        if self.socket is not None:
            await self.socket.send_str(json.dumps(message))

    def hello(self) -> dict[str, Any]:
        """What a page has to know that has just opened."""
        source = self.source
        upload = cannot_be_uploaded(source.spec) if source.mind else "without an agent there is no dream"
        return {
            "hello": source.title,
            "agent": source.mind is not None,
            "environment": source.real,
            "replay": source.moments is not None,
            "memories": sorted(source.mind.memories) if source.mind else [],
            "upload": upload,
            "keys": source.keys.to_json(),
            "labels": source.keys.labels(),
            "notes": source.notes,
            "fastest": FASTEST,
        }

    # -- the clock ----------------------------------------------------------------------------------------------------

    async def _clock(self) -> None:
        """Step when it is due: the time of each step is counted from the first one, so that the clock does not
        drift."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        steps = 0
        speed = self.speed
        while True:
            if not self._due() or self.unconfirmed >= WINDOW:
                self.wake.clear()
                await self.wake.wait()
                if self._due() and loop.time() > began + steps / speed:
                    began = loop.time()
                    steps = 0
                continue
            now = loop.time()
            if speed != self.speed or now > began + (steps + 1) / speed:  # another speed, or it could not keep up
                began = now
                steps = 0
                speed = self.speed
            if (wait := began + steps / speed - now) > 0:
                await asyncio.sleep(wait)
            steps += 1
            try:
                await self._step()
            except (UserError, EnvError) as error:
                self.playing = False
                self.tapped = []
                self.held = []
                await self.send({"error": str(error).partition("\n")[0]})

    def _due(self) -> bool:
        """Whether there is a step to take: time goes on by itself, or a key was pressed."""
        if self.session.settings.agent:
            return self.playing
        if self.playing and (self.source.keys.idle or self._action() is not None):
            return True
        return bool(self.tapped) and self._action() is not None

    def _action(self) -> np.ndarray | None:
        held = [key for key in self.held if key not in self.tapped]
        return self.source.keys.action([*held, *self.tapped], self.mouse)

    async def _step(self) -> None:
        async with self.turn:
            action = None if self.session.settings.agent else self._action()
            due = self._due()  # a command that had the turn before may have paused
            self.tapped = []
            if not due or (action is None and not self.session.settings.agent):
                return
            await self.blocking(self.session.step, action)
        await self.show()

    async def show(self) -> None:
        """Send the moment that is shown."""
        if self.recording is not None:
            self.recording.add(self.session)
            if self.recording.full:
                await self._record(False, "mp4")
        self.unconfirmed += 1
        if self.socket is not None:
            await self.socket.send_bytes(self.frame())

    def frame(self) -> bytes:
        """The moment that is shown, as a message."""
        session = self.session
        now = session.now
        other = session.counterpart
        pictures = {
            "real": now.real.picture if now.real and session.settings.mode != "dream" else None,
            "dream": now.dream if session.settings.mode != "reality" else None,
            "other": _side(other, session.settings.mode) if other else None,
        }
        parts = {name: data for name, data in pictures.items() if data is not None}
        header = json.dumps(self._header(now, other) | {"pictures": {name: len(data) for name, data in parts.items()}})
        encoded = header.encode()
        return b"".join([struct.pack("<I", len(encoded)), encoded, *parts.values()])

    def _header(self, now: Moment, other: Moment | None) -> dict[str, Any]:
        session = self.session
        keys = self.source.keys
        real = now.real if session.settings.mode != "dream" else None
        settings = session.settings
        header: dict[str, Any] = {
            "number": now.number,
            "kept": [session.history[0].number, session.history[-1].number],
            "mode": settings.mode,
            "eyes": settings.eyes,
            "driver": "agent" if settings.agent else "you",
            "greedy": settings.greedy,
            "temperature": settings.temperature,
            "steps": settings.steps,
            "playing": self.playing,
            "speed": self.speed,
            "seq": self.pressed,
            "action": None if now.action is None else keys.label(now.action),
            "dreamt": round(now.dreamt, 4),
            "over": "end" if now.over else "",
            "recording": None if self.recording is None else len(self.recording),
            "branch": [session.other[0].number, session.other[-1].number] if session.other else None,
        }
        if real is not None:
            row = real.row
            header |= {"reward": round(float(row.reward[0]), 4), "total": round(real.total, 4)}
            header["over"] = "end" if row.terminated[0] else "time limit" if row.truncated[0] else ""
            map_now = session.map()
            if map_now is not None:
                header["map"] = map_now
        if now.expected is not None:
            header["expected"] = {"reward": round(now.expected.reward, 4), "end": round(now.expected.end, 4)}
        if now.surprise is not None:
            header["surprise"] = [round(value, 5) for value in now.surprise]
        if now.judgement.value is not None:
            header["value"] = round(now.judgement.value, 4)
            header["probs"] = [[round(p, 4) for p in part] for part in now.judgement.probs]
        if other is not None:
            header["other"] = {
                "dreamt": round(other.dreamt, 4),
                "total": round(other.real.total, 4) if other.real else 0,
            }
        return header

    # -- commands -----------------------------------------------------------------------------------------------------

    async def obey(self, message: dict[str, Any]) -> None:
        """One command of the page.

        Raises:
            UserError: it is none, its values are out of their ranges, or it cannot be done.
        """
        command = message.get("do")
        if command == "seen":
            self.unconfirmed = max(0, self.unconfirmed - 1)
            self.wake.set()
            return
        if command == "keys":
            self._keys(message)
            self.wake.set()
            return
        handler = self._handlers().get(command if isinstance(command, str) else "")
        if handler is None:
            raise UserError(f"unknown command {str(command)[:40]!r}")
        async with self.turn:
            shown = await handler(message)
        if shown:
            await self.show()
        self.wake.set()

    def _handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[bool]]]:
        return {
            "play": self._do_play,
            "step": self._do_step,
            "go": self._do_go,
            "swap": self._do_swap,
            "start": self._do_start,
            "forget": self._do_forget,
            "set": self._do_set,
            "record": self._do_record,
        }

    def _keys(self, message: dict[str, Any]) -> None:
        held = message.get("held")
        if not isinstance(held, list) or not all(isinstance(key, str) and len(key) <= 20 for key in held):
            raise UserError("keys are a list of their names")
        held = held[:MOST_HELD]
        self.tapped += [key for key in held if key not in self.held and key not in self.tapped]
        self.tapped = self.tapped[-MOST_HELD:]
        self.held = held
        mouse = message.get("mouse")
        self.mouse = None
        if isinstance(mouse, list) and len(mouse) == 2:
            x, y = (_number(value, -1, 1, "mouse") for value in mouse)
            self.mouse = (x, y)
        self.pressed = int(_number(message.get("seq", 0), 0, 2**53, "seq"))

    async def _do_play(self, message: dict[str, Any]) -> bool:
        self.playing = bool(message.get("on"))
        return True

    async def _do_step(self, message: dict[str, Any]) -> bool:
        """A single step: the agent's, that of the keys that are held, or that of no key."""
        self.playing = False
        action = None if self.session.settings.agent else self._action()
        if action is None and not self.session.settings.agent:
            raise UserError("press the key of an action: this environment has none for doing nothing")
        self.tapped = []
        await self.blocking(self.session.step, action)
        return True

    async def _do_go(self, message: dict[str, Any]) -> bool:
        self.playing = False
        self.session.go(int(_number(message.get("to"), 0, 2**53, "to")))
        return True

    async def _do_swap(self, message: dict[str, Any]) -> bool:
        self.playing = False
        await self.blocking(self.session.swap)
        return True

    async def _do_start(self, message: dict[str, Any]) -> bool:
        start = _word(message.get("at"), ("episode", "replay", "picture"), "start")
        picture = b""
        if start == "picture":
            try:
                picture = base64.b64decode(str(message.get("picture", "")), validate=True)
            except (binascii.Error, ValueError):
                raise UserError("the picture cannot be read: send a PNG, JPEG or WebP") from None
        await self.blocking(self.session.begin, start, picture)
        return True

    async def _do_forget(self, message: dict[str, Any]) -> bool:
        what = _word(message.get("what"), ("scan", "attention", "both"), "forget")
        await self.blocking(self.session.forget, what)
        await self.send({"note": f"forgotten: {'scan and attention' if what == 'both' else what}"})
        return True

    async def _do_set(self, message: dict[str, Any]) -> bool:
        settings = self.session.settings
        for key, value in message.items():
            if key == "mode":
                await self.blocking(self.session.set_mode, _word(value, ("both", "dream", "reality"), key))
            elif key in ("eyes", "greedy", "agent"):
                if key == "agent" and value and self.source.mind is None:
                    raise UserError("there is no agent that could act: play a run instead of an environment")
                setattr(settings, key, bool(value))
            elif key == "speed":
                self.speed = _number(value, SLOWEST, FASTEST, key)
            elif key == "temperature":
                settings.temperature = _number(value, 0.05, 4.0, key)
            elif key == "steps":
                settings.steps = int(_number(value, 1, MOST_STEPS, key))
            elif key != "do":
                raise UserError(f"unknown setting {key[:40]!r}")
        return True

    async def _do_record(self, message: dict[str, Any]) -> bool:
        await self._record(bool(message.get("on")), _word(message.get("form", "mp4"), ("mp4", "gif"), "form"))
        return True

    async def _record(self, on: bool, form: Any) -> None:
        if on:
            self.recording = self.recording or Recording(self.source.spec)
            self.recording.add(self.session)
            await self.send({"note": "recording"})
            return
        recording = self.recording
        self.recording = None
        if recording is None:
            raise UserError("nothing is being recorded")
        try:
            paths = await self.blocking(recording.save, self.source.root, form, self.speed)
        except OSError as error:
            raise UserError(f"the recording cannot be written to {self.source.root} ({error.strerror})") from None
        names = []
        for path in paths:
            name = f"{len(self.written)}{path.suffix}"
            self.written[name] = path
            names.append({"path": str(path), "address": f"recordings/{name}"})
        await self.send({"recorded": names})


def _side(moment: Moment, mode: str) -> bytes | None:
    """The picture of another future: of the dream, where one is shown."""
    if mode == "reality" or moment.dream is None:
        return moment.real.picture if moment.real else None
    return moment.dream


def _number(value: Any, low: float, high: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}")
    return float(value)


def _word(value: Any, known: tuple[str, ...], name: str) -> Any:
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}")
    return value
