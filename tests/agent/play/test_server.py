"""The server as its pages see it: who may open it, what it refuses, lost connections, and how it ends."""

import asyncio
import json
import re
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from socket import socket
from typing import Any

import aiohttp
import pytest

from longdream.agent.bench.agents.play import measure
from longdream.agent.cli import main as cli
from longdream.agent.play.server import MESSAGE_BYTES, Guard, PlayService, is_loopback, serve
from longdream.agent.play.watch import WatchedRun, WatchService
from longdream.envs.contract import UserError


@pytest.fixture(scope="module")
def server(served, dream_runs):
    with served("play", dream_runs("images"), "--port", "0") as server:
        yield server


def fetch(address: str, **headers: str) -> tuple[int, str, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


class Page:
    """A page without a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.told: list[dict] = []
        self.pictures: dict[str, bytes] = {}

    async def do(self, command: str, **values: Any) -> None:
        await self.socket.send_str(json.dumps({"do": command, **values}))

    async def frame(self) -> dict:
        """The next frame's header; what was told before it is in `told`."""
        while True:
            message = await self.socket.receive(timeout=20)
            if isinstance(message.data, bytes):
                (length,) = struct.unpack_from("<I", message.data)
                header = json.loads(message.data[4 : 4 + length])
                offset = 4 + length
                for name, size in header["pictures"].items():
                    self.pictures[name] = message.data[offset : offset + size]
                    offset += size
                assert offset == len(message.data)
                await self.do("seen")
                return header
            assert isinstance(message.data, str), message
            self.told.append(json.loads(message.data))

    async def error(self) -> str:
        """The text of the next error."""
        while True:
            message = await self.socket.receive(timeout=20)
            if isinstance(message.data, str) and "error" in message.data:
                return json.loads(message.data)["error"]

    @property
    def session(self) -> str:
        return next(told["session"] for told in self.told if "session" in told)


@asynccontextmanager
async def page(address: str, session: str = "", **headers: str) -> AsyncIterator[Page]:
    headers = headers or {"Origin": address.rstrip("/")}
    async with (
        aiohttp.ClientSession(headers=headers) as client,
        client.ws_connect(f"{address}socket?session={session}", max_msg_size=0) as socket,
    ):
        yield Page(socket)


def test_the_page_comes_with_its_policy(server) -> None:
    for path, kind in (("", "text/html"), ("play.js", "text/javascript"), ("look.css", "text/css")):
        status, text, headers = fetch(server.address + path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and text
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert not re.findall(r"https?://(?!www\.w3\.org)", text)  # nothing comes from another host
    assert fetch(server.address + "recordings/0.mp4")[0] == 404
    for path in ("config.yaml", "../config.yaml", "recordings/../../config.yaml", "recordings/%2e%2e%2fconfig.yaml"):
        assert fetch(server.address + path)[0] == 404


def test_other_names_and_origins_are_refused(server) -> None:
    assert fetch(server.address, Host="evil.example:80")[0] == 403  # a name that leads here
    assert fetch(server.address, Origin="http://evil.example")[0] == 403
    port = server.address.rstrip("/").rpartition(":")[2]
    assert fetch(server.address, Host="localhost:9999")[0] == 200  # as through a tunnel

    async def main(**headers: str) -> int:
        try:
            async with page(server.address, **headers):
                return 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status

    for origin in ("http://evil.example", f"http://evil.example:{port}", "null", f"http://127.0.0.1:{int(port) + 1}"):
        assert asyncio.run(main(Origin=origin)) == 403
    assert asyncio.run(main(Accept="*/*")) == 403  # no origin at all


def test_an_address_that_is_none_is_refused(server) -> None:
    assert fetch(server.address, Host="[::1")[0] == 403
    assert fetch(server.address, Origin="http://[")[0] == 403


def test_hosts() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "192.168.0.1", "localhost.evil.example", "1270.0.0.1")))
    assert not Guard("127.0.0.1").token and len(Guard("0.0.0.0").token) > 20
    assert Guard("0.0.0.0").token != Guard("0.0.0.0").token


def test_elsewhere_a_token_is_needed(served) -> None:
    with served("play", "longdream/Recall-v0", "--host", "0.0.0.0", "--port", "0") as server:
        token = re.fullmatch(r"http://0\.0\.0\.0:\d+/\?token=([\w-]{20,})", server.address)
        assert token
        base = server.address.partition("?")[0].replace("0.0.0.0", "127.0.0.1")
        assert fetch(base)[0] == 403 and fetch(base + "?token=x")[0] == 403
        assert fetch(base + "?token=" + token[1])[0] == 200 and fetch(base + "play.js")[0] == 200

        async def main(query: str) -> int:
            headers = {"Origin": base.rstrip("/")}
            try:
                async with aiohttp.ClientSession(headers=headers) as client, client.ws_connect(f"{base}socket{query}"):
                    return 101
            except aiohttp.WSServerHandshakeError as error:
                return error.status

        assert asyncio.run(main("")) == 403 and asyncio.run(main("?token=" + token[1])) == 101


WRONG = [
    ({"do": "nothing"}, "unknown command 'nothing'"),
    ({"do": ["set"]}, "unknown command"),
    ({"do": "keys", "held": "ArrowUp"}, "keys are a list"),
    ({"do": "keys", "held": ["x" * 100]}, "keys are a list"),
    ({"do": "set", "speed": 1e9}, "speed must be a number from 0.5 to 60"),
    ({"do": "set", "temperature": "hot"}, "temperature must be a number"),
    ({"do": "set", "steps": True}, "steps must be a number from 1 to 64"),
    ({"do": "set", "mode": "nightmare"}, "mode must be one of both, dream, reality"),
    ({"do": "set", "anything": 1}, "unknown setting 'anything'"),
    ({"do": "go", "to": None}, "to must be a number"),
    ({"do": "start", "at": "picture", "picture": "!!"}, "the picture cannot be read"),
    ({"do": "start", "at": "picture", "picture": "AAAA"}, "the picture cannot be read"),
    ({"do": "forget", "what": "everything"}, "forget must be one of"),
    ({"do": "record", "on": False}, "nothing is being recorded"),
    ({"do": "record", "on": True, "form": "../x"}, "form must be one of mp4, gif"),
    ({"do": "swap"}, "there is no other future"),
    ({"do": "step"}, "press the key of an action"),
]


def test_wrong_messages_are_answered_in_one_line(server) -> None:
    async def main() -> None:
        async with page(server.address) as one:
            await one.frame()
            for message, part in WRONG:
                await one.socket.send_str(json.dumps(message))
                error = await one.error()
                assert part in error and "\n" not in error, message
            for text in ("", "[]", "{", "[" * 100_000, "7"):
                await one.socket.send_str(text)
                assert "one JSON object" in await one.error()
            await one.do("keys", held=["ArrowUp"])  # and it plays on
            assert (await one.frame())["number"] == 1
            with suppress(ConnectionError):  # closed before it has arrived
                await one.socket.send_str(json.dumps({"do": "seen", "x": "x" * (MESSAGE_BYTES + 1)}))
            ended = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
            while (message := await one.socket.receive(timeout=20)).type not in ended:
                assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT)

    asyncio.run(main())


def test_a_lost_page_comes_back_to_its_session(server) -> None:
    async def main() -> None:
        async with page(server.address) as one:
            assert (await one.frame())["number"] == 0
            for _ in range(3):
                await one.do("keys", held=["ArrowUp"])
                await one.do("keys", held=[])
                number = (await one.frame())["number"]
            name = one.session
            assert number == 3
        async with page(server.address, name) as again, page(server.address) as other:
            assert (await again.frame())["number"] == 3 and again.session == name
            assert (await other.frame())["number"] == 0 and other.session != name
            async with page(server.address, name) as newer:  # the same session in another page: the first one ends
                assert (await newer.frame())["number"] == 3
                assert "another page goes on" in await again.error()

    asyncio.run(main())


def test_a_page_that_confirms_nothing_gets_no_more(server) -> None:
    async def main() -> None:
        async with page(server.address) as one:
            await one.frame()
            await one.do("set", speed=60)
            await one.frame()
            await one.do("keys", held=["ArrowUp"])
            frames = 0
            with pytest.raises(asyncio.TimeoutError):
                while True:
                    message = await one.socket.receive(timeout=1)
                    frames += isinstance(message.data, bytes)
            assert 1 <= frames <= 4

    asyncio.run(main())


def test_an_error_that_nobody_meant_is_told(caplog) -> None:
    """On the page in one line, and in the server's terminal with its place."""

    class Broken:
        notes = ()

        def session(self) -> None:
            raise ModuleNotFoundError("No module named 'av'")

    async def main() -> None:
        addresses: asyncio.Queue[str] = asyncio.Queue()
        serving = asyncio.create_task(serve(PlayService(Broken), "127.0.0.1", 0, False, addresses.put_nowait))
        async with page(await addresses.get()) as one:
            assert await one.error() == "ModuleNotFoundError: No module named 'av'"
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(main())
    assert "in session" in caplog.text


def test_a_page_that_waits_is_told_why_nothing_can_be_played() -> None:
    opened = threading.Event()

    def load() -> None:
        opened.wait(20)
        raise UserError("runs/broken has no checkpoint")

    async def main() -> None:
        addresses: asyncio.Queue[str] = asyncio.Queue()
        serving = asyncio.create_task(serve(PlayService(load), "127.0.0.1", 0, False, addresses.put_nowait))
        async with page(await addresses.get()) as one:
            opened.set()
            assert await one.error() == "runs/broken has no checkpoint"
        with pytest.raises(UserError, match="no checkpoint"):
            await serving

    asyncio.run(main())


def test_a_browser_that_stays_open_is_not_waited_for(monkeypatch) -> None:
    closed = threading.Event()
    monkeypatch.setattr("webbrowser.open", lambda address: closed.wait(20))

    class Nothing:
        page = "watch.html"

        def routes(self) -> list:
            return []

        async def work(self) -> None:
            return

    async def main() -> None:
        await asyncio.wait_for(serve(Nothing(), "127.0.0.1", 0, True), 10)

    asyncio.run(main())
    closed.set()


def test_what_a_run_does_is_told_though_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("preset: tiny\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/reward": 0.5}\n')
    run = WatchedRun(folder)

    def state() -> tuple[str, bool]:
        version = run.version
        run.poll()
        return run.to_json()["state"], run.version != version

    assert state() == ("training", True) and state() == ("training", False)
    monkeypatch.setattr("longdream.agent.play.watch.QUIET_S", -1.0)
    assert state() == ("quiet", True)
    (folder / "summary.json").write_text("{}")
    assert state() == ("finished", True)
    monkeypatch.chdir(folder)
    assert set(json.loads(WatchService(Path("."))._poll({}))["runs"]) == {"run"}


def test_too_many_pages(server) -> None:
    async def main() -> None:
        pages = [page(server.address) for _ in range(9)]
        opened = [await one.__aenter__() for one in pages]
        for one in opened[:8]:
            await one.frame()
        assert "8 pages play already" in await opened[8].error()
        for one in pages:
            await one.__aexit__(None, None, None)
        async with page(server.address) as one:  # those that were left make room
            await one.frame()

    asyncio.run(main())


MISTAKES: list[tuple[list[str], str]] = [
    (["play", "runs/nothing"], "there is no such run"),
    (["play", "longdream/Recal-v0"], "did you mean longdream/Recall-v0"),
    (["play", "."], "is no run"),
    (["play"], "longdream play needs"),
    (["play", "longdream/Recall-v0", "--port", "70000"], "--port 70000: must be at least 0 and at most 65535"),
    (["play", "longdream/Recall-v0", "--env.kwargs.doors", "9"], "Recall has corridor=12, doors=9"),
    (["play", "longdream/Recall-v0", "--no-port", "1"], "unknown flag --no-port"),
    (["watch", "nothing"], "there is no such folder"),
    (["watch", "."], "holds no run"),
]


@pytest.mark.parametrize(("words", "part"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes(words: list[str], part: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--port", "0"] if "--port" not in words else []
    assert cli.main([*words, *flags, "--no-open"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("open http")]
    assert len(lines) == 1 and lines[0].startswith("longdream: ") and part in lines[0]


def test_a_busy_port(capsys) -> None:
    with closing(socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["play", "longdream/Recall-v0", "--port", port, "--no-open"]) == 2
    said = f"longdream: --port {port} is in use: name another one, or 0 for any that is free\n"
    assert capsys.readouterr().err == said


def test_a_run_with_foreign_code_is_not_opened(dream_runs, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    text = (dream_runs("images") / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("id: longdream/Recall-v0", "id: somewhere:Else-v0"))
    assert cli.main(["play", str(folder), "--no-open"]) == 2
    assert "add --trust" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("aiohttp", "aiohttp"), ("av", "PyAV"), ("PIL", "pillow")])
def test_a_missing_extra_is_named(module: str, package: str, monkeypatch, capsys) -> None:
    from longdream.agent.cli import play

    real = play.find_spec
    monkeypatch.setattr(play, "find_spec", lambda name: None if name == module else real(name))
    for command in ("play", "watch"):
        assert cli.main([command, "runs"]) == 2
        assert f"this needs {package}: pip install 'longdream[play]'" in capsys.readouterr().err


def test_a_long_session_costs_nothing_more(dream_runs: Callable[[str], Path], capsys) -> None:
    """Memory and open files stay where they are, and the clock keeps time, over connections that are lost."""
    result = measure(dream_runs("images"), 0.5, 3, long=6, speed=2, steps=(1,), modes=("both",), device="cpu")
    assert result["first_page_s"] > 0 and result["rows"][0]["fps"] > 1
    long = result["long"]
    assert long["frames"] > 8 and abs(long["drift_s"]) < 2  # two steps a second are made on a machine that is full, too
    assert long["open_files"][0] == long["open_files"][1]
    assert long["memory_mb"][1] < long["memory_mb"][0] + 60
