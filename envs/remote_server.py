"""The server of `longdream/Remote-v0`: a single file that another interpreter runs, to host an environment there.

It runs on Python 3.7 and newer, needs numpy and the environment's dependencies, and imports nothing of this project.
There are two processes. The *client*, the process of RemoteEnv, starts the *supervisor*. The supervisor holds one end
of a pipe to the client, keeps the last lines that were printed, and ends all its descendants when the client is gone.
Its child, the *server*, makes the environment and answers requests.

A message is a length and a JSON text on a Unix socket. Arrays are in shared memory, and the text holds their positions.
Requests and answers alternate, so both directions use the same region. Nothing is pickled.
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

SOCKET = "socket"
FRAMES = "frames"
LAST_BYTES = 16384  # bytes of output that are kept: less than a pipe holds, so writing them never blocks
TRACEBACK_S = 0.5  # time for an aborted server to print where it hung, before it is killed
# options of Linux's prctl
DEATH_SIGNAL = 1
SUBREAPER = 36


# -- supervisor --------------------------------------------------------------------------------------------------------


def supervise(folder):
    """Fork the server and return in the server. The supervisor stays here until the server or the client has ended.

    The supervisor's exit code is the server's, or 128 + n if signal n ended the server. Its output is the last part of
    the server's output.
    """
    _prctl(SUBREAPER, 1)  # orphaned descendants become children of this process, so that _descendants finds them
    output_read, output_write = os.pipe()
    wakeup_read, wakeup_write = os.pipe()  # becomes readable when a child ends
    os.set_blocking(wakeup_read, False)
    os.set_blocking(wakeup_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_write)
    client = os.getppid()
    supervisor = os.getpid()
    server = os.fork()
    if server == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _prctl(DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output_write, 1), (output_write, 2)):
            os.dup2(source, target)
        for handle in (null, output_read, output_write, wakeup_read, wakeup_write):
            os.close(handle)
        return
    os.close(output_write)
    os.set_blocking(output_read, False)
    output = b""
    code = None
    aborted = 0.0  # when SIGABRT was sent
    while code is None:
        inputs = [output_read, wakeup_read] if aborted else [0, output_read, wakeup_read]
        ready = select.select(inputs, [], [], 0.05 if aborted else 1.0)[0]
        output = _read_output(output_read, output)
        code = _reap(server)
        if wakeup_read in ready:
            os.read(wakeup_read, 4096)
        if code is None and aborted and time.monotonic() > aborted + TRACEBACK_S:
            os.kill(server, signal.SIGKILL)
        elif code is None and not aborted and (0 in ready or os.getppid() != client):
            aborted = time.monotonic()
            os.kill(server, signal.SIGABRT)  # faulthandler then prints the server's traceback
    descendants = _descendants(supervisor)
    while descendants:
        for process in descendants:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        _reap(server)
        time.sleep(0.005)
        descendants = _descendants(supervisor)
    shutil.rmtree(folder, ignore_errors=True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the client may be gone: end silently in that case
    os.write(1, _read_output(output_read, output))
    os._exit(code)


def _prctl(option, value):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _read_output(pipe, output):
    """The last LAST_BYTES bytes of the output so far and of what the pipe holds now."""
    while True:
        try:
            data = os.read(pipe, 65536)
        except BlockingIOError:
            return output
        if not data:
            return output
        output = (output + data)[-LAST_BYTES:]


def _reap(server):
    """Wait for every child that has ended. Returns the server's exit code if it is among them, else None."""
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
    """All descendants of a process, in any session or process group. Needs /proc (Linux); elsewhere it finds none."""
    children = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):  # the process may have ended
            with open(f"/proc/{name}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    descendants = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(), [])
        descendants += below
        pending += below
    return descendants


if __name__ == "__main__":
    supervise(sys.argv[1])

try:  # imported after the fork: the supervisor does not need numpy, and forking with numpy's threads is unsafe
    import numpy as np
except ImportError as error:
    sys.exit(f"numpy is missing here ({error}): {sys.executable} -m pip install numpy")

# -- messages ----------------------------------------------------------------------------------------------------------

LENGTH = struct.Struct("<I")
LONGEST = 1 << 26  # bytes of a message's text, in which there are no arrays
KINDS = "biufcSUmM"  # dtype kinds whose arrays are plain bytes; an array of objects would hold pointers
ENCODE = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


class Channel:
    """Messages over a connected socket, with their arrays in a file that both processes map.

    A message is None, a bool, int, float, str, numpy array or numpy scalar, or a list, tuple or dict (with str keys) of
    these. Types are preserved. Requests and answers alternate.
    """

    def __init__(self, connection, handle):
        self.connection = connection
        self.handle = handle
        self.memory = mmap.mmap(handle, os.fstat(handle).st_size)
        self.used = 0

    def send(self, message):
        """Send a message. Raises TypeError for a value of another type or a text that is too long, and OSError."""
        self.used = 0
        text = ENCODE(self._pack(message)).encode()
        if len(text) > LONGEST:
            raise TypeError(f"a message of {len(text)} bytes cannot travel between interpreters: use arrays")
        self.connection.sendall(LENGTH.pack(len(text)) + text)

    def receive(self, timeout_s=None) -> Any:
        """Wait for a message, however it is split, for `timeout_s` altogether.

        Raises EOFError if the other process is gone, OSError (a timeout too), and any other exception for bytes that
        are no message: one that is too long, no JSON, or refers to memory that is not there."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        data = bytearray()
        size = LENGTH.size
        while len(data) < size:
            if deadline is not None:
                self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            data += self._receive_bytes()
            if deadline is not None and len(data) < size and time.monotonic() > deadline:
                raise socket.timeout
            if size == LENGTH.size and len(data) >= size:
                size += LENGTH.unpack_from(data)[0]
                if size > LONGEST + LENGTH.size:
                    raise ValueError(f"it would be {size} bytes long")
        return self._unpack(json.loads(data[LENGTH.size :].decode()))

    def close(self):
        self.connection.close()
        self.memory.close()
        os.close(self.handle)

    def _receive_bytes(self):
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
            return {"array": self._write_array(np.asarray(value))}
        if isinstance(value, list):
            return [self._pack(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self._pack(item) for item in value]}
        if hasattr(value, "items") and all(isinstance(key, str) for key in value):
            return {"dict": {str(key): self._pack(item) for key, item in value.items()}}
        raise TypeError(f"{_short(value)}, a {kind.__name__}, cannot travel between interpreters")

    def _write_array(self, array):
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
            return self._read_array(*inner)
        if kind == "scalar":
            return np.dtype(inner[0]).type(inner[1])
        if kind == "tuple":
            return tuple([self._unpack(item) for item in inner])
        return {key: self._unpack(item) for key, item in inner.items()}

    def _read_array(self, kind, shape, start):
        dtype = np.dtype(kind)
        if dtype.kind not in KINDS:
            raise ValueError(f"an array of dtype {dtype} in a message")
        end = start + dtype.itemsize
        for length in shape:
            end = start + (end - start) * length
        size = os.fstat(self.handle).st_size
        if start < 0 or min(shape, default=0) < 0 or end > size:  # reading there would end this process
            raise ValueError("an array outside the shared memory")
        if end > len(self.memory):
            self.memory = mmap.mmap(self.handle, size)  # the other process enlarged the file
        return np.ndarray(shape, dtype, self.memory, start).copy()


def grow(handle, size):
    """Enlarge a file to this many bytes, reserved if possible: writing to an unbacked page would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def plain(value):
    """Convert an info to a message. A value of an unsupported type is replaced by its repr."""
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
    """The kind of a space, by the names of its classes, from any package. For an unknown space, its own class name."""
    names = [kind.__name__ for kind in type(space).__mro__]
    known = ("Enum", "Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple", "Text")
    return next((name for name in names if name in known), names[0])


def describe(space: Any, where):
    """Describe a space as a message: [kind, its arguments]. Raises TypeError if it is unsupported, naming `where`."""
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
        # MineRL's own Text space has neither bounds nor a set of letters
        most = getattr(space, "max_length", 4096)
        least = getattr(space, "min_length", 0)
        letters = getattr(space, "characters", None)
        return [kind, {"max_length": int(most), "min_length": int(least), "letters": letters}]
    raise TypeError(f"the {where} space is a {kind} ({space}), which cannot travel")


def has_enum(space):
    inner: Any = getattr(space, "spaces", ())
    inner = inner.values() if hasattr(inner, "values") else inner
    return kind_of(space) == "Enum" or any(has_enum(each) for each in inner)


def translate(space: Any, value, inward):
    """Translate a value of a space that contains an Enum, whose values are words here and indices in the client.

    inward: from the client's form to the environment's; else the other way."""
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
    """A uniform interface to an environment of old gym or of Gymnasium. Its methods are the requests."""

    env: Any = None

    def make(self, target, kwargs, render_mode):
        """Make the environment "module:callable", "module:Id" or "Id". Returns its two spaces as `describe` does."""
        self.render_mode = render_mode
        self.env = create(target, kwargs, render_mode)
        innermost = getattr(self.env, "unwrapped", self.env)
        self.takes_seed = "seed" in inspect.signature(innermost.reset).parameters
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space
        self.observation_has_enum = has_enum(self.observation_space)
        self.action_has_enum = has_enum(self.action_space)
        return [describe(self.observation_space, "observation"), describe(self.action_space, "action")]

    def reset(self, seed, options):
        if seed is not None:  # the environment may draw from the global generators
            random.seed(seed)
            np.random.seed(seed % 2**32)
        if self.takes_seed:
            result = self.env.reset(seed=seed, options=options) if options else self.env.reset(seed=seed)
        else:
            if options:
                raise TypeError("its reset takes no options")
            if seed is not None and callable(getattr(self.env, "seed", None)):
                self.env.seed(seed)
            result = self.env.reset()
        is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        if is_pair and not self._is_observation(result):
            return [self._outward(result[0]), plain(result[1])]
        return [self._outward(result), {}]

    def step(self, action):
        result = self.env.step(translate(self.action_space, action, True) if self.action_has_enum else action)
        if len(result) == 5:
            obs, reward, terminated, truncated, info = result
        else:
            obs, reward, done, info = result
            truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
            terminated = bool(done) and not truncated
        return [self._outward(obs), reward, terminated, truncated, plain(info) if info else {}]

    def render(self):
        if getattr(self.env, "render_mode", None) == self.render_mode:
            return self.env.render()
        return self.env.render(mode=self.render_mode)

    def close(self):
        self.env.close()

    def _is_observation(self, pair):
        """Whether a pair returned by reset is an observation of a Tuple space, not (observation, info)."""
        return kind_of(self.observation_space) == "Tuple" and self.observation_space.contains(pair)

    def _outward(self, obs):
        return translate(self.observation_space, obs, False) if self.observation_has_enum else obs


def create(target, kwargs, render_mode):
    """Make the environment "module:callable", "module:Id" or "Id". Raises LookupError if it does not exist."""
    module, _, name = target.rpartition(":")
    if module:
        entry: Any = importlib.import_module(module)
        for part in name.split("."):
            entry = getattr(entry, part, None)
        if callable(entry):
            return entry(**_with_mode(entry, kwargs, render_mode))
    known = []
    import_errors = []
    for package in ("gymnasium", "gym"):
        try:
            gym: Any = importlib.import_module(package)
            registry = importlib.import_module(package + ".envs.registration").registry
        except ImportError as error:
            import_errors.append(str(error))
            continue
        ids = getattr(registry, "env_specs", registry)  # gym before 0.26
        if name in ids:
            # older versions of gym.make accept neither render_mode nor disable_env_checker
            modern = "disable_env_checker" in inspect.signature(gym.make).parameters
            extra = dict({"render_mode": render_mode} if render_mode else {}, disable_env_checker=True)
            return gym.make(name, **(dict(kwargs, **extra) if modern else kwargs))
        known += list(ids)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    places = f"{module} has no callable {name} and " if module else ""
    hint = f"did you mean {' or '.join(close)}?" if close else "; ".join(import_errors)
    raise LookupError(f"{places}no environment {name} is registered there{': ' + hint if hint else ''}")


def _with_mode(entry, kwargs, render_mode):
    try:
        takes = "render_mode" in inspect.signature(entry).parameters
    except ValueError:  # a callable without a signature
        takes = False
    return dict(kwargs, render_mode=render_mode) if render_mode and takes else kwargs


def serve(folder):
    """Answer requests [name, arguments] with ["ok", value] or ["raised", message, traceback] until `close`."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, SOCKET))
    channel = Channel(connection, os.open(os.path.join(folder, FRAMES), os.O_RDWR))
    served = Served()
    name = ""
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
                trace = trace.tb_next  # skip the frames of this file
            text = "".join(traceback.format_exception(type(error), error, trace))
            channel.send(["raised", " ".join(f"{type(error).__name__}: {error}".split()), text])


if __name__ == "__main__":
    serve(sys.argv[1])
