"""Tampering with bytes and with trees of values, as disks, editors and attackers do. All is drawn from a generator."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

INTERESTING = (
    None, True, False, 0, 1, -1, 2, 7, 255, 65536, 2**31, -(2**31), 2**53 + 1, 2**63, 10**40,
    0.0, -0.0, 0.5, 1e-30, 1e308, math.inf, -math.inf, math.nan,
    "", " ", "0", "1e-3", "12:30", "yes", "null", "auto", "../outside", "/etc/passwd", "~", "outside", "os:system",
    "evil:Evil-v0", "evil:Evil", "longdream/Remote-v0", "remote:/bin/sh:x", "x" * 3000, "\x00", "\x1b[31m", "é",
    "\ud800", [], [[]], {}, {"": 0}, [1, 2, 3], [None], {"a": {"b": {}}}, {"$": "tensor"},
)  # fmt: skip
"""Values that programs get wrong."""
TOKENS = (
    b"", b"\x00", b"\xff" * 4, b"\n", b"\r\n", b"\t", b"{", b"}", b"[" * 200, b"&a [*a]", b"*a", b": ", b"- ", b"NaN",
    b"1e999", b"-1", b"99999999999999999999", b"0x", b"~", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"'", b'"', b"#",
    b"!!python/object", b"!!python/object/apply:os.system ['touch ../outside/PWNED']",
    b"PK\x03\x04", b"\x93NUMPY", b"|O", b"cos\nsystem\n(S'touch ../outside/PWNED'\ntR.",
    b"moov", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00",
)  # fmt: skip
"""Pieces of files that programs get wrong."""


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to four changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _change(rng, data)
    return data


def _change(rng: random.Random, data: bytes) -> bytes:
    size = len(data)
    at = rng.randrange(size + 1)
    span = min(size - at, rng.choice((1, 1, 2, 4, 16, 200)))
    how = rng.randrange(8)
    if how == 0 and size:  # a bit
        at %= size
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == 1:  # cut short
        return data[:at]
    if how == 2:  # a piece is lost
        return data[:at] + data[at + span :]
    if how == 3:  # a piece is there twice
        return data[: at + span] + data[at:]
    if how == 4:  # another piece is in its place
        return data[:at] + rng.randbytes(span) + data[at + span :]
    if how == 5:
        return data[:at] + rng.choice(TOKENS) + data[at:]
    if how == 6:
        return data[:at] + rng.choice(TOKENS) + data[at + span :]
    return data[:at] + bytes(span) + data[at + span :]


def tree_of(rng: random.Random, tree: Any) -> Any:
    """A copy of nested dicts and lists with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return rng.choice(INTERESTING)
        node, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node[str(rng.choice(INTERESTING))] = node.pop(key)
        elif how == 2:
            other, from_key = rng.choice(places)
            node[key] = copy.deepcopy(other[from_key])
        elif how == 3 and isinstance(node[key], int | float):
            node[key] = rng.choice((-node[key], node[key] * 1000, node[key] + 1, str(node[key]), [node[key]]))
        else:
            node[key] = copy.deepcopy(rng.choice(INTERESTING))
    return tree


def _places(tree: Any) -> Any:
    """(container, key) of everything in a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)
