"""What really happened, on disk: a bounded, memory-mapped ring of rows that survives kills and damage.

Rows come in streams, one per environment, and share one clock: row `time` of every stream was added by the same call.
A chunk file holds `chunk_rows` consecutive times of all streams, laid out (field, env, time), so that a clip of one
stream is one piece of memory per field. Chunk s covers the times [s * chunk_rows, (s + 1) * chunk_rows).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from longdream.agent.data.segment import Chunk, DamagedChunk, Fields
from longdream.envs.contract import EnvSpec, Row, UserError

MAX_CHUNKS = 128  # each mapping holds a file descriptor
RELEASE_BYTES = 128 << 20  # mapped pages count as resident memory: hand them back after touching this many bytes
FAULT_BYTES = 64 << 10  # what one page fault maps at most


class Replay:
    """Bounded replay of `capacity` rows (all streams together) in `folder`.

    A new object is empty and touches no file: call `restore` to continue a saved one; the first `add` without it
    removes the chunk files that an earlier run left in the folder before its first checkpoint.

    Args:
        spec: what one row of one environment holds. Images stay uint8; categorical actions are stored as uint8.
        chunk_rows: times per chunk file; None chooses it from the capacity. The oldest chunk makes room for a new one.
        around: what makes a row telling, as ReplayConfig says it.
    Raises UserError when the capacity is too small for two chunks.
    """

    def __init__(
        self,
        folder: Path,
        spec: EnvSpec,
        num_envs: int,
        capacity: int,
        chunk_rows: int | None = None,
        around: Literal["surprise", "reward"] = "surprise",
    ):
        per_env = capacity // num_envs
        # At most MAX_CHUNKS files; small replays get eight chunks, so that eviction forgets an eighth at a time.
        self.chunk_rows = chunk_rows or max(-(-per_env // MAX_CHUNKS), min(1024, per_env // 8), 1)
        self.max_chunks = per_env // self.chunk_rows
        if self.max_chunks < 2:
            raise UserError(
                f"replay capacity {capacity:,} is too small for {num_envs} environments with {self.chunk_rows:,} rows "
                f"in a chunk: set it to {2 * num_envs * self.chunk_rows:,} or more"
            )
        if self.max_chunks > 4 * MAX_CHUNKS:
            raise UserError(
                f"{self.max_chunks:,} replay chunks are too many open files: set chunk_rows to "
                f"{-(-per_env // MAX_CHUNKS):,} or more, or leave it out"
            )
        self.folder, self.num_envs, self.capacity, self.around = Path(folder), num_envs, capacity, around
        self.longest_clip = (self.max_chunks - 1) * self.chunk_rows  # that a full replay can always sample
        self.fields: Fields = {f"obs/{key}": (obs.shape, obs.dtype) for key, obs in spec.obs.items()}
        self.fields |= {
            "action": ((spec.action.size,), np.dtype(np.uint8 if spec.action.parts else np.float32)),
            "reward": ((), np.dtype(np.float32)),
            "is_first": ((), np.dtype(bool)),
            "terminated": ((), np.dtype(bool)),
            "truncated": ((), np.dtype(bool)),
            "surprise": ((), np.dtype(np.float32)),
            # Running sum of what makes rows telling along a stream inside the chunk: drawing in proportion to it is a
            # binary search.
            "mass": ((), np.dtype(np.float64)),
        }
        self._chunks: dict[int, Chunk] = {}  # by sequence number, oldest first
        self._head: Chunk | None = None  # the chunk being written
        self._next = 0  # sequence number of the next chunk
        self._evicted: list[Path] = []  # no longer sampled, perhaps still needed by the checkpoint on disk
        self._deletable: list[Path] = []  # evicted before the last state()
        self._fresh = True  # nothing added or restored yet
        self._touched = 0  # bytes of mapped pages used since the last release

    def __len__(self) -> int:
        """Rows that can be sampled, all streams together."""
        return self.num_envs * sum(chunk.rows for chunk in self._chunks.values())

    # -- writing ------------------------------------------------------------------------------------------------------

    def add(self, row: Row, action: np.ndarray, surprise: np.ndarray) -> None:
        """Append one row per environment; action (n, A) encoded and chosen from row.obs, surprise (n,) finite.

        Raises ValueError for anything that does not fit the spec, DiskFull when a new chunk finds no room (the replay
        is unchanged then).
        """
        values: dict[str, np.ndarray] = {f"obs/{key}": value for key, value in row.obs.items()}
        values |= {"action": action, "reward": row.reward, "is_first": row.is_first}
        values |= {"terminated": row.terminated, "truncated": row.truncated, "surprise": surprise}
        self._check(values)
        if self._head is None:
            self._head = self._allocate()
        chunk = self._head
        chunk.append(values, np.maximum(surprise, 0) if self.around == "surprise" else row.reward != 0)
        self._touched += self.num_envs * chunk.row_bytes
        if chunk.rows == self.chunk_rows:
            chunk.checksum()  # sealed
            self._head = None
        self._release()

    def _check(self, values: dict[str, np.ndarray]) -> None:
        if values.keys() != self.fields.keys() - {"mass"}:
            raise ValueError(f"a row holds {sorted(values)}, the spec says {sorted(self.fields.keys() - {'mass'})}")
        for name, value in values.items():
            shape, dtype = self.fields[name]
            if value.shape != (self.num_envs, *shape):
                raise ValueError(f"{name} has shape {value.shape}, the spec says {(self.num_envs, *shape)}")
            if value.dtype != dtype and name != "action":
                raise ValueError(f"{name} is {value.dtype}, the spec says {dtype}")
        if not np.isfinite(values["surprise"]).all():
            raise ValueError(f"surprise is not finite: {values['surprise']}")
        if self.fields["action"][1] == np.uint8 and not np.isin(values["action"], (0, 1)).all():
            raise ValueError("a categorical action is not one-hot")

    def _allocate(self) -> Chunk:
        if self._fresh:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_strays()
        self._fresh = False
        chunk = Chunk.create(self._path(self._next), self._next, self.num_envs, self.chunk_rows, self.fields)
        if len(self._chunks) == self.max_chunks:
            self._forget(min(self._chunks))
        self._chunks[chunk.seq] = chunk
        self._next += 1
        return chunk

    def _forget(self, seq: int) -> None:
        self._chunks.pop(seq).close()
        self._evicted.append(self._path(seq))

    def _path(self, seq: int) -> Path:
        return self.folder / f"chunk_{seq:09d}.bin"

    def _remove_strays(self) -> None:
        """Delete the chunk files that nothing refers to."""
        known = {*map(self._path, self._chunks), *self._evicted}
        for path in self.folder.glob("chunk_*.bin"):
            if re.fullmatch(r"chunk_\d{9,}\.bin", path.name) and path not in known:
                path.unlink()

    # -- saving and restoring -----------------------------------------------------------------------------------------

    def state(self) -> dict:
        """The replay at this moment as small JSON values, its rows synced to disk: goes into a checkpoint."""
        for chunk in self._chunks.values():
            chunk.sync()
        self._release(everything=True)
        self._deletable = list(self._evicted)
        chunks = [[chunk.seq, chunk.rows, chunk.checksum()] for chunk in self._chunks.values()]
        return {"layout": self._layout(), "next": self._next, "chunks": chunks}

    def commit_eviction(self) -> None:
        """Delete what was evicted before the last `state()`. Call it once the checkpoint with that state is on disk."""
        for path in self._deletable:
            path.unlink(missing_ok=True)
        self._evicted = [path for path in self._evicted if path not in self._deletable]
        self._deletable = []

    def restore(self, state: dict) -> list[str]:
        """Put the replay back to `state` exactly; returns a warning for each chunk that had to be dropped.

        Rows added after the state was taken are forgotten. Every chunk is verified; one that is missing, truncated or
        altered is dropped with all of its rows, and leaves a gap that no clip spans. Its file stays until the next
        `commit_eviction`.
        Raises UserError when the state belongs to a replay of another layout.
        """
        layout = self._layout()
        for key, value in layout.items():
            if state["layout"].get(key) != value:
                raise UserError(
                    f"the replay in {self.folder} was written with {key} = {state['layout'].get(key)}, this run has "
                    f"{value}: resume with the settings of the run, or start a new one"
                )
        for chunk in self._chunks.values():
            chunk.close()
        self._chunks, self._head, self._evicted, self._deletable = {}, None, [], []
        self._next, self._fresh = state["next"], False
        self.folder.mkdir(parents=True, exist_ok=True)
        warnings = []
        for seq, rows, checksum in state["chunks"]:
            path = self._path(seq)
            try:
                chunk = Chunk.open(path, seq, self.num_envs, self.chunk_rows, self.fields, rows, checksum)
            except DamagedChunk as error:
                warnings.append(f"replay file {path} {error}: {rows * self.num_envs:,} rows are dropped")
                self._evicted.append(path)
                continue
            self._chunks[seq] = chunk
            self._head = chunk if rows < self.chunk_rows else None
        self._remove_strays()
        return warnings

    def _layout(self) -> dict:
        fields = {name: [list(shape), dtype.str] for name, (shape, dtype) in self.fields.items()}
        return {"num_envs": self.num_envs, "capacity": self.capacity, "chunk_rows": self.chunk_rows, "fields": fields}

    def close(self) -> None:
        """Unmap all files; the replay is unusable afterwards."""
        for chunk in self._chunks.values():
            chunk.close()
        self._chunks, self._head = {}, None

    def _release(self, everything: bool = False) -> None:
        if everything or self._touched > RELEASE_BYTES:
            for chunk in self._chunks.values():
                chunk.release()
            self._touched = 0

    # -- sampling -----------------------------------------------------------------------------------------------------

    def can_sample(self, length: int) -> bool:
        """Whether a clip of `length` rows exists."""
        return any(high - low >= length for low, high in self._spans())

    def sample(
        self, rng: np.random.Generator, batch: int, length: int, starts: float = 0.0, weight: float = 0.0
    ) -> dict:
        """Draw `batch` clips of `length` rows of one stream each: contiguous, across no gap, not past the newest row.

        Returns obs (dict of (B, T, ...)), action (B, T, A) float32, reward and surprise (B, T) float32, is_first,
        terminated and truncated (B, T) bool; fresh arrays, the caller's own.

        Each clip is, with probability `starts`, one that begins at an is_first row; with probability `weight`, one
        around a telling row, drawn in proportion to its surprise (negative surprise counts as 0) or evenly from those
        with a reward, at a random offset; else uniform over all clips. Where no such row exists the uniform draw steps
        in. Clips may span episodes. A clip that begins in mid-episode has is_first False in its first row, as it
        happened: the consumer resets its state at the start of a clip by itself.
        Raises UserError when there is no clip of that length.
        """
        if not (starts >= 0 and weight >= 0 and starts + weight <= 1):
            raise ValueError(f"starts {starts} and weight {weight} are probabilities of exclusive choices")
        spans = [(low, high) for low, high in self._spans() if high - low >= length]
        if not spans:
            raise UserError(
                f"the replay holds no clip of {length} rows: collect more before learning, shorten the clips, or give "
                f"it more capacity (a full one always has clips of {self.longest_clip:,} rows)"
            )
        envs, times = self._uniform(rng, spans, batch, length)
        if starts or weight:
            kind = rng.random(batch)
            self._from_starts(rng, spans, length, envs, times, np.flatnonzero(kind < starts))
            around = np.flatnonzero((kind >= starts) & (kind < starts + weight))
            self._from_telling(rng, spans, length, envs, times, around)
        return self._gather(envs.tolist(), times.tolist(), length)

    def _spans(self) -> list[tuple[int, int]]:
        """The maximal gapless intervals of time, [low, high), oldest first."""
        spans: list[tuple[int, int]] = []
        for chunk in self._chunks.values():
            low, high = chunk.begin, chunk.begin + chunk.rows
            if spans and spans[-1][1] == low:
                spans[-1] = (spans[-1][0], high)
            else:
                spans.append((low, high))
        return spans

    def _chunks_in(self, spans: list[tuple[int, int]]) -> Iterator[tuple[Chunk, tuple[int, int]]]:
        for low, high in spans:
            for seq in range(low // self.chunk_rows, -(-high // self.chunk_rows)):
                yield self._chunks[seq], (low, high)

    def _uniform(self, rng, spans, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum([high - low - length + 1 for low, high in spans])
        draw = rng.integers(ends[-1] * self.num_envs, size=batch)
        envs, place = draw % self.num_envs, draw // self.num_envs
        span = np.searchsorted(ends, place, side="right")
        # The last possible start of a span is `high - length`, at place ends - 1.
        return envs, place - ends[span] + 1 + np.array([high - length for _, high in spans])[span]

    def _from_starts(self, rng, spans, length: int, envs, times, which) -> None:
        pairs = [(chunk, chunk.count_starts(high - length)) for chunk, (_, high) in self._chunks_in(spans)]
        ends = np.cumsum([count for _, count in pairs])
        if not ends[-1]:
            return
        for i, draw in zip(which, rng.integers(ends[-1], size=len(which)), strict=True):
            k = int(np.searchsorted(ends, draw, side="right"))
            chunk, count = pairs[k]
            index = int(draw - ends[k] + count)
            envs[i], times[i] = chunk.start_envs[index], chunk.start_times[index]

    def _from_telling(self, rng, spans, length: int, envs, times, which) -> None:
        pairs = list(self._chunks_in(spans))
        ends = np.cumsum([chunk.totals.sum() for chunk, _ in pairs])
        if not ends[-1] > 0:
            return
        for i, (level, offset) in zip(which, rng.random((len(which), 2)), strict=True):
            k = _pick(ends, level * ends[-1])
            chunk, (low, high) = pairs[k]
            by_env = np.cumsum(chunk.totals)
            rest = level * ends[-1] - (ends[k - 1] if k else 0.0)
            env = _pick(by_env, rest)
            mass = chunk.data["mass"][env, : chunk.rows]
            anchor = chunk.begin + _pick(mass, rest - (by_env[env - 1] if env else 0.0))
            first, last = max(low, anchor - length + 1), min(anchor, high - length)
            envs[i], times[i] = env, first + int(offset * (last - first + 1))

    def _gather(self, envs: list[int], times: list[int], length: int) -> dict:
        out: dict[str, np.ndarray] = {}
        for name, (shape, dtype) in self.fields.items():
            if name != "mass":
                out[name] = np.empty((len(envs), length, *shape), np.float32 if name == "action" else dtype)
        for b, (env, time) in enumerate(zip(envs, times, strict=True)):
            done = 0
            while done < length:
                seq, offset = divmod(time + done, self.chunk_rows)
                count = min(length - done, self.chunk_rows - offset)
                data = self._chunks[seq].data
                self._touched += len(out) * FAULT_BYTES
                for name, target in out.items():
                    target[b, done : done + count] = data[name][env, offset : offset + count]
                done += count
        self._touched += sum(value.nbytes for value in out.values())
        self._release()
        obs = {name[4:]: out.pop(name) for name in list(out) if name.startswith("obs/")}
        return {"obs": obs, **out}


def _pick(ends: np.ndarray, level: float) -> int:
    """First index whose running sum exceeds `level`: one of positive weight, also where rounding left the range."""
    return int(np.searchsorted(ends, min(max(level, 0.0), np.nextafter(ends[-1], 0)), side="right"))
