"""The web server of `longdream play` and `longdream watch`: pages, sockets, and who may open them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import secrets
import sys
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from aiohttp import WSMsgType, web

from longdream.envs.contract import UserError
from longdream.envs.copies import one_line

PAGE = Path(__file__).parent / "page"
FILES = {
    "icon.svg": "image/svg+xml",
    "look.css": "text/css",
    "play.js": "text/javascript",
    "watch.js": "text/javascript",
}
"""Files of both pages, which hold nothing of a run, by their types."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "media-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MESSAGE_BYTES = 4 << 20
"""Of a message from a page, at most: an uploaded picture is the largest."""
HEARTBEAT_S = 20.0
"""Seconds between signs of life of a socket; one that is lost is closed after half as many more."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service(Protocol):
    """What a server shows: a page, routes of its own, and what is to be done beside serving."""

    page: str

    def routes(self) -> list[web.RouteDef]: ...

    async def work(self) -> None:
        """Runs while the server does. Returning or raising ends the server."""
        ...


class Guard:
    """Who may open what: on the loopback interface pages of this server alone; elsewhere those who know the token.

    A page of another site can send requests here, too, and by a name that leads here (DNS rebinding) even read the
    answers. So the name in a request has to be one of the loopback interface, unless a token is asked for, and whatever
    is more than a file of the page has to come from a page of the same origin.
    """

    def __init__(self, host: str) -> None:
        self.token = "" if is_loopback(host) else secrets.token_urlsafe(24)

    def refusal(self, request: web.Request) -> str:
        """Why this request is not answered; empty if it is."""
        origin = request.headers.get("Origin")
        try:
            name = urlsplit(f"//{request.host}").hostname or ""
            page = request.host if origin is None else urlsplit(origin).netloc
        except ValueError:
            return "the address cannot be read"
        if not self.token and not is_loopback(name):
            return f"this server answers to localhost, not to {name[:100]!r}"
        if page != request.host:
            return "this page is of another origin"
        if origin is None and request.headers.get("Upgrade", "").lower() == "websocket":
            return "a socket needs an Origin"
        if self.token and request.path.rpartition("/")[2] not in FILES:
            given = request.query.get("token", "")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return "the token is missing or wrong: open the address that the command printed"
        return ""

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = self.refusal(request)
        if refusal:
            return web.Response(status=403, text=refusal + "\n", headers=HEADERS)
        return await handler(request)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is of the loopback interface."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def serve(service: Service, host: str, port: int, show: bool, ready: Callable[[str], None] | None = None) -> None:
    """Serve until `service.work` ends, or for ever.

    Args:
        port: 0 for a free one. show: open the page in a browser. ready: called with the address.

    Raises:
        UserError: the port or the host cannot be used.
    """
    guard = Guard(host)
    app = web.Application(middlewares=[guard.middleware], client_max_size=1 << 16)

    async def file(request: web.Request) -> web.Response:
        name = request.path[1:] or service.page
        text = await asyncio.to_thread((PAGE / name).read_text, encoding="utf-8")
        return web.Response(text=text, content_type=FILES.get(name, "text/html"), charset="utf-8")

    app.add_routes([web.get(f"/{name}", file) for name in ("", *FILES)])
    app.add_routes(service.routes())
    app.on_response_prepare.append(_add_headers)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use: name another one, or 0 for any that is free") from None
        problem = error.strerror or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({problem})") from None
    except (OverflowError, UnicodeError) as error:
        await runner.cleanup()
        raise UserError(f"--host {host} --port {port}: {error}") from None
    address = _address(host, runner.addresses[0][1], guard.token)
    print(f"open {address}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if ready is not None:
        ready(address)
    if show:
        # not waited for: a browser in a terminal returns when it is quit
        threading.Thread(target=_show, args=(address,), daemon=True).start()
    try:
        await service.work()
    finally:
        await runner.cleanup()


def _show(address: str) -> None:
    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(address)


def _address(host: str, port: int, token: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


# -- play -------------------------------------------------------------------------------------------------------------


MOST_SESSIONS = 8
"""Pages that play at the same time."""
KEPT_S = 600.0
"""Seconds for which the session of a page that is gone waits for it to come back."""


class PlayService:
    """Sessions of one source, one for each page. All compute in one thread, one step after another.

    load: opens the source; called in that thread, so that the page is there at once.
    """

    page = "play.html"

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="play")
        self.source: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.players: dict[str, Any] = {}
        self.left: dict[str, float] = {}
        """When the page of a session was lost, by session."""
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.opening = asyncio.Lock()
        self.written: dict[str, Path] = {}
        """Files that were recorded, by the names under which they are served."""

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/socket", self.socket), web.get("/recordings/{name}", self.recording)]

    async def work(self) -> None:
        """Load, then look after sessions that nobody comes back to.

        Raises:
            UserError: what is to be played cannot be.
        """
        try:
            try:
                source = await self.blocking(self.load)
            except Exception as error:
                self.source.set_exception(error)  # pages that wait are told
                self.source.exception()  # and there may be none
                raise
            self.source.set_result(source)
            for note in source.notes:
                print(f"note: {note}", file=sys.stderr)
            while True:
                await asyncio.sleep(KEPT_S / 10)
                for name in [name for name, since in self.left.items() if time.monotonic() > since + KEPT_S]:
                    await self._end(name)
        finally:
            for name in list(self.players):
                await self._end(name)
            self.pool.shutdown()

    async def blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the computing thread. It is waited for even if the caller is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    async def socket(self, request: web.Request) -> web.StreamResponse:
        """The socket of a page. With `?session=NAME` it goes on with a session that it had."""
        socket = web.WebSocketResponse(max_msg_size=MESSAGE_BYTES, heartbeat=HEARTBEAT_S, compress=False)
        await socket.prepare(request)
        try:
            await asyncio.shield(self.source)
            async with self.opening:
                name, player = await self._player(request.query.get("session", ""))
        except Exception as error:
            meant = isinstance(error, UserError)
            await socket.send_str(json.dumps({"error": str(error) if meant else one_line(error), "final": True}))
            await socket.close()
            if not meant:  # the page shows it; the terminal of the server shows where
                raise
            return socket
        before = self.sockets.get(name)
        self.sockets[name] = socket
        if before is not None:  # the same session in another page: that one ends
            with contextlib.suppress(ConnectionError):
                await before.send_str(json.dumps({"error": "another page goes on with this", "final": True}))
            await before.close()
        self.left.pop(name, None)
        try:
            await socket.send_str(json.dumps({"session": name}))
            await player.run(socket, _texts(socket))
        except ConnectionError:  # the page is gone
            pass
        finally:
            if self.sockets.get(name) is socket:
                del self.sockets[name]
                self.left[name] = time.monotonic()
        return socket

    async def _player(self, name: str) -> tuple[str, Any]:
        """The session of that name, or a new one."""
        from longdream.agent.play.player import Player

        if name in self.players:
            return name, self.players[name]
        if len(self.players) >= MOST_SESSIONS:
            if not self.left:
                raise UserError(f"{MOST_SESSIONS} pages play already: close one of them")
            await self._end(min(self.left, key=lambda other: self.left[other]))
        source = self.source.result()
        session = await self.blocking(source.session)
        name = secrets.token_urlsafe(12)
        self.players[name] = Player(source, session, self.blocking, self.written)
        return name, self.players[name]

    async def _end(self, name: str) -> None:
        player = self.players.pop(name)
        self.left.pop(name, None)
        await self.blocking(player.session.close)

    async def recording(self, request: web.Request) -> web.StreamResponse:
        """A file that was recorded here; no other is served."""
        path = self.written.get(request.match_info["name"])
        if path is None:
            return web.Response(status=404, text="there is no such recording\n")
        return web.FileResponse(path)


async def _texts(socket: web.WebSocketResponse) -> AsyncIterator[str]:
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            yield message.data
        else:  # it was too large, or is none of ours
            break
