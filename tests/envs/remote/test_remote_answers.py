"""Whatever the other side sends, and however slowly: a bad answer is a fault of the environment, found in time."""

import sys
import time

import pytest

from longdream.envs import remote_server
from longdream.envs.contract import EnvError, UserError

# An environment that takes over the server's socket: an action is an index of ANSWERS.
NONSENSE = """
import gc, json, os, socket, struct, sys, time
import gymnasium as gym
import numpy as np

def frame(text):
    return struct.pack("<I", len(text)) + text

def frames():
    # the descriptor of the shared memory
    links = {int(fd): os.readlink("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd") if fd.isdigit() and
             os.path.islink("/proc/self/fd/" + fd)}
    return next(fd for fd, link in links.items() if "frames" in link)

def answer(value):
    return frame(json.dumps(value).encode())

ANSWERS = {
    "huge": struct.pack("<I", 2**32 - 1) + b"x" * 100,
    "bytes": frame(b"\\xff\\xfe\\xfd"),
    "no JSON": frame(b"[1, 2"),
    "empty": frame(b""),
    "two": answer(["ok", None]) + answer(["ok", None]),
    "a number": answer(3),
    "a dict": answer({"a": 1, "b": 2}),
    "null": answer(None),
    "no value": answer(["ok"]),
    "four values": answer(["ok", [0, 0.0, False, False]]),
    "no info": answer(["ok", [0, 0.0, False, False, 7]]),
    "an unknown word": answer(["maybe", "a", "b"]),
    "a message that is none": answer(["raised", 3, None]),
    "deep": frame(b"[" * 100000 + b"]" * 100000),
    "an array elsewhere": answer(["ok", [{"array": ["<f4", [3], 2**40]}, 0.0, False, False, {"dict": {}}]]),
    "an array before": answer(["ok", [{"array": ["<f4", [3], -64]}, 0.0, False, False, {"dict": {}}]]),
    "an array in a file cut short": "cut",
    "an array of objects": answer(["ok", [{"array": ["|O", [3], 0]}, 0.0, False, False, {"dict": {}}]]),
    "a long array": answer(["ok", [{"array": ["<f4", [2**62, 9], 0]}, 0.0, False, False, {"dict": {}}]]),
}

class Nonsense(gym.Env):
    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(99)

    def __init__(self, when="step", what=""):
        self.when, self.what = when, what
        if when == "make":
            self.say()

    def say(self):
        (connection,) = [each for each in gc.get_objects() if isinstance(each, socket.socket)]
        if self.what == "slowly":
            connection.sendall(struct.pack("<I", 4000))
            while True:
                connection.sendall(b" ")
                time.sleep(0.1)
        if self.what == "an array in a file cut short":
            os.truncate(os.open("/proc/self/fd/%d" % frames(), os.O_RDWR), 0)
            connection.sendall(answer(["ok", [{"array": ["<f4", [3], 64]}, 0.0, False, False, {"dict": {}}]]))
        else:
            connection.sendall(ANSWERS[self.what])
        time.sleep(600)

    def reset(self, *, seed=None, options=None):
        if self.when == "reset" and seed == 9:
            self.say()
        return 0, {}

    def step(self, action):
        if self.when == "step":
            self.say()
        return 1, 0.0, False, False, {}

    def close(self):
        if self.when == "close":
            self.say()
"""
ANSWERS = [
    "huge", "bytes", "no JSON", "empty", "two", "a number", "a dict", "null", "no value", "four values", "no info",
    "an unknown word", "a message that is none", "deep", "an array elsewhere", "an array before",
    "an array in a file cut short", "an array of objects", "a long array",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nonsense(far_folder) -> None:
    (far_folder / "nonsense.py").write_text(NONSENSE)


@pytest.mark.parametrize("what", ANSWERS)
def test_answers_that_are_none_are_faults(remote, what):
    env = remote("nonsense:Nonsense", kwargs={"what": what}, timeout_s=30.0)
    env.reset(seed=0)
    began = time.monotonic()
    with pytest.warns(UserWarning, match=r"gave an answer to step that cannot be read \("):
        row = env.step(0)
    assert row[1:4] == (0.0, False, True) and row[4]["remote_faults"] == 1
    assert time.monotonic() - began < 25
    env.reset(seed=1)


def test_an_answer_that_trickles_is_too_late(remote):
    env = remote("nonsense:Nonsense", kwargs={"what": "slowly"}, timeout_s=2.0)
    env.reset(seed=0)
    began = time.monotonic()
    with pytest.warns(UserWarning, match="gave no answer to step within 2 s"):
        assert env.step(0)[3]
    assert 1.5 < time.monotonic() - began < 20


def test_nonsense_in_reset_and_in_close(remote):
    env = remote("nonsense:Nonsense", kwargs={"when": "reset", "what": "a number"}, restarts=0)
    with pytest.raises(EnvError, match="gave an answer to reset that cannot be read"):
        env.reset(seed=9)
    env = remote("nonsense:Nonsense", kwargs={"when": "close", "what": "bytes"})
    env.reset(seed=0)
    env.close()


@pytest.mark.parametrize("what", ["a number", "four values", "deep"])
def test_nonsense_at_the_start(remote, what):
    with pytest.raises(UserError, match="gave an answer to make that cannot be read") as error:
        remote("nonsense:Nonsense", python=sys.executable, kwargs={"when": "make", "what": what})
    assert "\n" not in str(error.value)


def test_messages_that_are_too_long_are_refused_where_they_are_sent(monkeypatch, remote):
    env = remote()
    env.reset(seed=0)
    monkeypatch.setattr(remote_server, "LONGEST", 1000)
    with pytest.raises(TypeError, match=r"a message of .* bytes cannot travel between interpreters"):
        env.reset(seed=0, options={"long": "x" * 2000})
