"""The far side of `longdream/Remote-v0`: one file that is sent to another interpreter and serves an environment there.

It runs on Python 3.7 and newer, needs numpy and whatever the environment needs, and imports nothing of ours. Two
processes come of it. The *keeper* is the one that we start: it holds one end of a pipe whose other end is ours alone,
keeps the last lines that were printed, and ends everything below it when we are gone. The *server*, its child, makes
the environment and answers requests.

A request or an answer is a length and a JSON text on a Unix socket; arrays lie in shared memory, and the text says
where. Either side writes only while it is its turn, so both share one region. Nothing is pickled.
"""

import contextlib
import ctypes
import difflib
import faulthandler
import importlib
import inspect
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any

SOCKET, FRAMES = "socket", "frames"
LAST_BYTES = 16384  # of what is printed: less than a pipe holds, so that writing them never waits for a reader
LAST_WORDS_S = 0.5  # for a server that hangs to say where, once it is aborted
DEATH_SIGNAL, SUBREAPER = 1, 36  # options of Linux's prctl


# -- the keeper --------------------------------------------------------------------------------------------------------


def keep(folder):
    """Fork the server and return in it. The keeper stays in here until the server has ended, or whoever started us.

    Its exit code is the server's, 128 + n for one that signal n ended; its output is the last that the server printed.
    """
    _prctl(SUBREAPER, 1)  # what loses its parent below becomes our child, and is found
    reads, writes = os.pipe()
    woken, wakes = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    above, keeper, server = os.getppid(), os.getpid(), os.fork()
    if server == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _prctl(DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (writes, 1), (writes, 2)):
            os.dup2(source, target)
        for handle in (nothing, reads, writes, woken, wakes):
            os.close(handle)
        return
    os.close(writes)
    os.set_blocking(reads, False)
    said, code, killed = b"", None, 0.0
    while code is None:
        open_ends = [reads, woken] if killed else [0, reads, woken]
        ready = select.select(open_ends, [], [], 0.05 if killed else 1.0)[0]
        said, code = _listen(reads, said), _reap(server)
        if woken in ready:
            os.read(woken, 4096)
        if code is None and killed and time.monotonic() > killed + LAST_WORDS_S:
            os.kill(server, signal.SIGKILL)
        elif code is None and not killed and (0 in ready or os.getppid() != above):
            killed = time.monotonic()
            os.kill(server, signal.SIGABRT)  # faulthandler prints where it was
    descendants = _descendants(keeper)
    while descendants:
        for process in descendants:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        _reap(server)
        time.sleep(0.005)
        descendants = _descendants(keeper)
    shutil.rmtree(folder, ignore_errors=True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody may be left to read
    os.write(1, _listen(reads, said))
    os._exit(code)


def _prctl(option, value):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _listen(pipe, said):
    """The last bytes of what was said and of what is in the pipe now."""
    while True:
        try:
            more = os.read(pipe, 65536)
        except BlockingIOError:
            return said
        if not more:
            return said
        said = (said + more)[-LAST_BYTES:]


def _reap(server):
    """Collect every child that has ended; the exit code of the server if it is among them."""
    code = None
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if process == 0:
            return code
        if process == server:
            code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _descendants(root):
    """Processes below this one, in whatever session or process group they are (Linux; elsewhere none are found)."""
    children = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):  # gone since
            with open(f"/proc/{name}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found, grey = [], [root]
    while grey:
        below = children.get(grey.pop(), [])
        found += below
        grey += below
    return found


if __name__ == "__main__":
    keep(sys.argv[1])

try:  # here, as the keeper needs none of it, and a process with threads of numpy's should not fork
    import numpy as np
except ImportError as error:
    sys.exit(f"numpy is missing here ({error}): {sys.executable} -m pip install numpy")

# -- messages ----------------------------------------------------------------------------------------------------------

LENGTH = struct.Struct("<I")
KINDS = "biufcSUmM"  # of arrays that are bytes alone; an array of objects would be pointers
ENCODE = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


class Channel:
    """Messages over a connected socket, their arrays in a file that both sides have mapped.

    Messages are None, bool, int, float, str, arrays, numpy's scalars, and lists, tuples and dicts (by str) of these,
    and arrive as such. Requests and answers alternate.
    """

    def __init__(self, connection, handle):
        self.connection, self.handle = connection, handle
        self.memory = mmap.mmap(handle, os.fstat(handle).st_size)
        self.used = 0

    def send(self, message):
        """Raises TypeError for a value that is none of these, and OSError."""
        self.used = 0
        text = ENCODE(self._pack(message)).encode()
        self.connection.sendall(LENGTH.pack(len(text)) + text)

    def receive(self) -> Any:
        """Raises EOFError when the other side is gone, and OSError."""
        data = self._more()
        while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
            data += self._more()
        return self._unpack(json.loads(data[LENGTH.size :].decode()))

    def close(self):
        self.connection.close()
        self.memory.close()
        os.close(self.handle)

    def _more(self):
        data = self.connection.recv(1 << 18)
        if not data:
            raise EOFError
        return data

    def _pack(self, value):
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
            return {"scalar": [value.dtype.str, value.item()]}
        if isinstance(value, (np.ndarray, np.generic)):
            return {"array": self._put(np.asarray(value))}
        if isinstance(value, list):
            return [self._pack(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self._pack(item) for item in value]}
        if hasattr(value, "items") and all(isinstance(key, str) for key in value):
            return {"dict": {str(key): self._pack(item) for key, item in value.items()}}
        raise TypeError(f"{_short(value)}, a {kind.__name__}, cannot travel between interpreters")

    def _put(self, array):
        if array.dtype.kind not in KINDS:
            raise TypeError(f"an array of dtype {array.dtype} cannot travel between interpreters")
        start = -(-self.used // 64) * 64
        self.used = start + array.nbytes
        if self.used >= len(self.memory):
            grow(self.handle, 2 * self.used)
            self.memory = mmap.mmap(self.handle, 2 * self.used)
        np.ndarray(array.shape, array.dtype, self.memory, start)[...] = array
        return [array.dtype.str, array.shape, start]

    def _unpack(self, value):
        if isinstance(value, list):
            return [self._unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "array":
            return self._take(*inner)
        if kind == "scalar":
            return np.dtype(inner[0]).type(inner[1])
        if kind == "tuple":
            return tuple([self._unpack(item) for item in inner])
        return {key: self._unpack(item) for key, item in inner.items()}

    def _take(self, kind, shape, start):
        dtype = np.dtype(kind)
        if dtype.kind not in KINDS:
            raise ValueError(f"an array of dtype {dtype} in a message")
        if start + dtype.itemsize * int(np.prod(shape, dtype=np.int64)) > len(self.memory):
            self.memory = mmap.mmap(self.handle, os.fstat(self.handle).st_size)  # the other side made it larger
        return np.ndarray(shape, dtype, self.memory, start).copy()


def grow(handle, size):
    """Give a file this many bytes, reserved where that can be done: a write to memory that is not there would kill."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def plain(value):
    """An info as something that travels: of what does not, its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([plain(item) for item in value]) if type(value) in (list, tuple) else list(map(plain, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value if value.dtype.kind in KINDS else _short(value)
    return value if value is None or type(value) in (bool, int, float, str) else _short(value)


def _short(value):
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


# -- spaces ------------------------------------------------------------------------------------------------------------


def kind_of(space: Any):
    """What it is by the names of its classes, whichever package they are from; of an unknown one its own name."""
    names = [kind.__name__ for kind in type(space).__mro__]
    known = ("Enum", "Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple", "Text")
    return next((name for name in names if name in known), names[0])


def describe(space: Any, where):
    """A space as a message: [kind, its arguments]. Raises TypeError for one that cannot travel, naming where it is."""
    kind = kind_of(space)
    if kind == "Box":
        return [kind, {"low": space.low, "high": space.high, "dtype": np.dtype(space.dtype).str}]
    if kind == "Enum":
        return [kind, {"values": [str(value) for value in space.values]}]
    if kind == "Discrete":
        return [kind, {"n": int(space.n), "start": int(getattr(space, "start", getattr(space, "begin", 0)))}]
    if kind == "MultiDiscrete":
        counts = np.asarray(space.nvec)
        start = np.asarray(getattr(space, "start", np.zeros_like(counts)))
        return [kind, {"nvec": counts, "start": start, "dtype": np.dtype(space.dtype).str}]
    if kind == "MultiBinary":
        return [kind, {"n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}]
    if kind == "Dict":
        return [kind, {str(key): describe(inner, f"{where}.{key}") for key, inner in space.spaces.items()}]
    if kind == "Tuple":
        return [kind, [describe(inner, f"{where}[{i}]") for i, inner in enumerate(space.spaces)]]
    if kind == "Text":
        # MineRL's own has neither bounds nor letters
        most, least = getattr(space, "max_length", 4096), getattr(space, "min_length", 0)
        letters = getattr(space, "characters", None)
        return [kind, {"max_length": int(most), "min_length": int(least), "letters": letters}]
    raise TypeError(f"the {where} space is a {kind} ({space}), which cannot travel")


def has_enum(space):
    inner: Any = getattr(space, "spaces", ())
    inner = inner.values() if hasattr(inner, "values") else inner
    return kind_of(space) == "Enum" or any(has_enum(each) for each in inner)


def translate(space: Any, value, inward):
    """A value of a space with an Enum somewhere in it. Here its values are words, on our side their numbers."""
    kind = kind_of(space)
    if kind == "Enum":
        words = [str(word) for word in space.values]
        if inward:
            return space.values[int(value)]
        return np.int64(words.index(str(value)) if str(value) in words else value)
    if kind == "Dict":
        spaces = space.spaces
        return {key: translate(spaces[key], item, inward) if key in spaces else item for key, item in value.items()}
    if kind == "Tuple":
        return tuple([translate(inner, item, inward) for inner, item in zip(space.spaces, value)])
    return value


# -- the environment ---------------------------------------------------------------------------------------------------


class Served:
    """An environment of old gym or of Gymnasium, asked in one way. Its methods are the requests."""

    env: Any = None

    def make(self, target, kwargs, render_mode):
        """Make it: "module:callable", "module:Id" or "Id". Returns its two spaces, described."""
        self.render_mode = render_mode
        self.env = create(target, kwargs, render_mode)
        innermost = getattr(self.env, "unwrapped", self.env)
        self.takes_seed = "seed" in inspect.signature(innermost.reset).parameters
        self.sees, self.does = self.env.observation_space, self.env.action_space
        self.sees_words, self.does_words = has_enum(self.sees), has_enum(self.does)
        return [describe(self.sees, "observation"), describe(self.does, "action")]

    def reset(self, seed, options):
        if seed is not None:  # what an environment draws from these is its own business here
            random.seed(seed)
            np.random.seed(seed % 2**32)
        if self.takes_seed:
            found = self.env.reset(seed=seed, options=options) if options else self.env.reset(seed=seed)
        else:
            if options:
                raise TypeError("its reset takes no options")
            if seed is not None and callable(getattr(self.env, "seed", None)):
                self.env.seed(seed)
            found = self.env.reset()
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict) and not self._observed(found):
            return [self._outward(found[0]), plain(found[1])]
        return [self._outward(found), {}]

    def step(self, action):
        found = self.env.step(translate(self.does, action, True) if self.does_words else action)
        if len(found) == 5:
            obs, reward, terminated, truncated, info = found
        else:
            obs, reward, done, info = found
            truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
            terminated = bool(done) and not truncated
        return [self._outward(obs), reward, terminated, truncated, plain(info) if info else {}]

    def render(self):
        if getattr(self.env, "render_mode", None) == self.render_mode:
            return self.env.render()
        return self.env.render(mode=self.render_mode)

    def close(self):
        self.env.close()

    def _observed(self, pair):
        """Whether a pair out of reset is an observation: one of a Tuple space that ends in a Dict."""
        return kind_of(self.sees) == "Tuple" and self.sees.contains(pair)

    def _outward(self, obs):
        return translate(self.sees, obs, False) if self.sees_words else obs


def create(target, kwargs, render_mode):
    """The environment that "module:callable", "module:Id" or "Id" names. Raises LookupError when nothing does."""
    module, _, name = target.rpartition(":")
    if module:
        entry: Any = importlib.import_module(module)
        for part in name.split("."):
            entry = getattr(entry, part, None)
        if callable(entry):
            return entry(**_with_mode(entry, kwargs, render_mode))
    known, troubles = [], []
    for package in ("gymnasium", "gym"):
        try:
            gym: Any = importlib.import_module(package)
            registry = importlib.import_module(package + ".envs.registration").registry
        except ImportError as error:
            troubles.append(str(error))
            continue
        ids = getattr(registry, "env_specs", registry)  # gym before 0.26
        if name in ids:
            # made with a mode and without checks where it knows of either
            modern = "disable_env_checker" in inspect.signature(gym.make).parameters
            extra = dict({"render_mode": render_mode} if render_mode else {}, disable_env_checker=True)
            return gym.make(name, **(dict(kwargs, **extra) if modern else kwargs))
        known += list(ids)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    places = f"{module} has no callable {name} and " if module else ""
    hint = f"did you mean {' or '.join(close)}?" if close else "; ".join(troubles)
    raise LookupError(f"{places}no environment {name} is registered there{': ' + hint if hint else ''}")


def _with_mode(entry, kwargs, render_mode):
    try:
        takes = "render_mode" in inspect.signature(entry).parameters
    except ValueError:  # a callable without a signature
        takes = False
    return dict(kwargs, render_mode=render_mode) if render_mode and takes else kwargs


def serve(folder):
    """Answer requests, [name, arguments], with ["ok", value] or ["raised", in one line, traceback], until none come."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, SOCKET))
    channel = Channel(connection, os.open(os.path.join(folder, FRAMES), os.O_RDWR))
    served, name = Served(), ""
    while name != "close":
        try:
            name, arguments = channel.receive()
        except (EOFError, OSError):
            return
        try:
            channel.send(["ok", getattr(served, name)(*arguments)])
        except Exception as error:
            trace = error.__traceback__
            while trace and trace.tb_frame.f_code.co_filename == serve.__code__.co_filename:
                trace = trace.tb_next  # of no interest to whoever wrote the environment
            told = "".join(traceback.format_exception(type(error), error, trace))
            channel.send(["raised", " ".join(f"{type(error).__name__}: {error}".split()), told])


if __name__ == "__main__":
    serve(sys.argv[1])
