"""The replay buffer on disk: a bounded, memory-mapped ring of rows that survives a killed process and damaged files.

Rows come in streams, one per environment. All streams share one clock: row `time` of every stream was added by the same
call. A segment file holds `segment_rows` consecutive times of all streams, laid out (field, env, time), so that a clip
of one stream is contiguous in memory per field. Segment s covers the times [s * segment_rows, (s + 1) * segment_rows).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from longdream.agent.data.segment import DamagedSegment, Fields, Segment
from longdream.envs.contract import EnvSpec, Row, UserError

MAX_SEGMENTS = 128  # each mapping holds a file descriptor
RELEASE_BYTES = 128 << 20  # mapped pages count as resident memory: release them after touching this many bytes
FAULT_BYTES = 64 << 10  # the most that one page fault maps


class Replay:
    """Bounded replay of `capacity` rows (all streams together) in `folder`.

    A new object is empty and touches no file. Call `restore` to continue a saved replay. Without it, the first `add`
    removes segment files that an earlier run left in the folder before its first checkpoint.

    Args:
        spec: observations and actions of one environment. Images stay uint8; categorical actions are stored as uint8.
        segment_rows: times per segment file; None chooses it from the capacity. A new segment replaces the oldest.
        priority: what gives a row its priority, see ReplayConfig.

    Raises:
        UserError: the capacity is too small for two segments, or there would be too many segments.
    """

    def __init__(
        self,
        folder: Path,
        spec: EnvSpec,
        num_envs: int,
        capacity: int,
        segment_rows: int | None = None,
        priority: Literal["surprise", "reward"] = "surprise",
    ):
        per_env = capacity // num_envs
        # At most MAX_SEGMENTS files. Small replays get eight segments, so that eviction drops an eighth at a time.
        self.segment_rows = segment_rows or max(-(-per_env // MAX_SEGMENTS), min(1024, per_env // 8), 1)
        self.max_segments = per_env // self.segment_rows
        if self.max_segments < 2:
            raise UserError(
                f"replay capacity {capacity:,} is too small for {num_envs} environments with {self.segment_rows:,} "
                f"rows in a segment: set it to {2 * num_envs * self.segment_rows:,} or more"
            )
        if self.max_segments > 4 * MAX_SEGMENTS:
            raise UserError(
                f"{self.max_segments:,} replay segments are too many open files: set segment_rows to "
                f"{-(-per_env // MAX_SEGMENTS):,} or more, or leave it out"
            )
        self.folder = Path(folder)
        self.num_envs = num_envs
        self.capacity = capacity
        self.priority = priority
        self.longest_clip = (self.max_segments - 1) * self.segment_rows  # a full replay can always sample it
        self.fields: Fields = {f"obs/{key}": (obs.shape, obs.dtype) for key, obs in spec.obs.items()}
        self.fields |= {
            "action": ((spec.action.size,), np.dtype(np.uint8 if spec.action.parts else np.float32)),
            "reward": ((), np.dtype(np.float32)),
            "is_first": ((), np.dtype(bool)),
            "terminated": ((), np.dtype(bool)),
            "truncated": ((), np.dtype(bool)),
            "surprise": ((), np.dtype(np.float32)),
            # Cumulative sum of priority along a stream within the segment: sampling by priority is a binary search.
            "mass": ((), np.dtype(np.float64)),
        }
        self._segments: dict[int, Segment] = {}  # by sequence number, oldest first
        self._head: Segment | None = None  # the segment being written
        self._next = 0  # sequence number of the next segment
        self._evicted: list[Path] = []  # no longer sampled, but the checkpoint on disk may still need them
        self._deletable: list[Path] = []  # evicted before the last state()
        self._fresh = True  # nothing added or restored yet
        self._touched = 0  # bytes of mapped pages used since the last release

    def __len__(self) -> int:
        """Rows that can be sampled, all streams together."""
        return self.num_envs * sum(segment.rows for segment in self._segments.values())

    # -- writing ------------------------------------------------------------------------------------------------------

    def add(self, row: Row, action: np.ndarray, surprise: np.ndarray) -> None:
        """Append one row per environment.

        Args:
            action: `(n, A)`, encoded, chosen from row.obs.
            surprise: `(n,)`, finite.

        Raises:
            ValueError: something does not fit the spec.
            DiskFull: no room for a new segment; the replay is unchanged then.
        """
        values: dict[str, np.ndarray] = {f"obs/{key}": value for key, value in row.obs.items()}
        values |= {"action": action, "reward": row.reward, "is_first": row.is_first}
        values |= {"terminated": row.terminated, "truncated": row.truncated, "surprise": surprise}
        self._check(values)
        if self._head is None:
            self._head = self._allocate()
        segment = self._head
        segment.append(values, np.maximum(surprise, 0) if self.priority == "surprise" else row.reward != 0)
        self._touched += self.num_envs * segment.row_bytes
        if segment.rows == self.segment_rows:
            segment.checksum()  # sealed
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

    def _allocate(self) -> Segment:
        if self._fresh:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_strays()
        self._fresh = False
        segment = Segment.create(self._path(self._next), self._next, self.num_envs, self.segment_rows, self.fields)
        if len(self._segments) == self.max_segments:
            self._forget(min(self._segments))
        self._segments[segment.seq] = segment
        self._next += 1
        return segment

    def _forget(self, seq: int) -> None:
        self._segments.pop(seq).close()
        self._evicted.append(self._path(seq))

    def _path(self, seq: int) -> Path:
        return self.folder / f"segment_{seq:09d}.bin"

    def _remove_strays(self) -> None:
        """Delete the segment files that nothing refers to."""
        known = {*map(self._path, self._segments), *self._evicted}
        for path in self.folder.glob("segment_*.bin"):
            if re.fullmatch(r"segment_\d{9,}\.bin", path.name) and path not in known:
                path.unlink()

    # -- saving and restoring -----------------------------------------------------------------------------------------

    def state(self) -> dict:
        """The state for a checkpoint, as small JSON values. All rows are synced to disk first."""
        for segment in self._segments.values():
            segment.sync()
        self._release(everything=True)
        self._deletable = list(self._evicted)
        segments = [[segment.seq, segment.rows, segment.checksum()] for segment in self._segments.values()]
        return {"layout": self._layout(), "next": self._next, "segments": segments}

    def commit_eviction(self) -> None:
        """Delete files evicted before the last `state()`. Call it once the checkpoint with that state is on disk."""
        for path in self._deletable:
            path.unlink(missing_ok=True)
        self._evicted = [path for path in self._evicted if path not in self._deletable]
        self._deletable = []

    def restore(self, state: dict) -> list[str]:
        """Restore `state` exactly. Returns a warning for each segment that had to be dropped.

        Rows added after the state was taken are dropped. Every segment is verified. One that is missing, truncated or
        altered is dropped with all of its rows and leaves a gap that no clip spans. Its file stays until the next
        `commit_eviction`.

        Raises:
            UserError: the state belongs to a replay of another layout.
        """
        for key, value in self._layout().items():
            if state["layout"].get(key) != value:
                raise UserError(
                    f"the replay in {self.folder} was written with {key} = {state['layout'].get(key)}, this run has "
                    f"{value}: resume with the settings of the run, or start a new one"
                )
        for segment in self._segments.values():
            segment.close()
        self._segments = {}
        self._head = None
        self._evicted = []
        self._deletable = []
        self._next = state["next"]
        self._fresh = False
        self.folder.mkdir(parents=True, exist_ok=True)
        warnings = []
        for seq, rows, checksum in state["segments"]:
            path = self._path(seq)
            try:
                segment = Segment.open(path, seq, self.num_envs, self.segment_rows, self.fields, rows, checksum)
            except DamagedSegment as error:
                warnings.append(f"replay file {path} {error}: {rows * self.num_envs:,} rows are dropped")
                self._evicted.append(path)
                continue
            self._segments[seq] = segment
            self._head = segment if rows < self.segment_rows else None
        self._remove_strays()
        return warnings

    def _layout(self) -> dict:
        fields = {name: [list(shape), dtype.str] for name, (shape, dtype) in self.fields.items()}
        return {
            "num_envs": self.num_envs,
            "capacity": self.capacity,
            "segment_rows": self.segment_rows,
            "fields": fields,
        }

    def close(self) -> None:
        """Unmap all files; the replay is unusable afterwards."""
        for segment in self._segments.values():
            segment.close()
        self._segments = {}
        self._head = None

    def _release(self, everything: bool = False) -> None:
        if everything or self._touched > RELEASE_BYTES:
            for segment in self._segments.values():
                segment.release()
            self._touched = 0

    # -- sampling -----------------------------------------------------------------------------------------------------

    def can_sample(self, length: int) -> bool:
        """Whether a clip of `length` rows exists."""
        return any(high - low >= length for low, high in self._spans())

    def sample(
        self,
        rng: np.random.Generator,
        batch: int,
        length: int,
        episode_start_fraction: float = 0.0,
        priority_fraction: float = 0.0,
    ) -> dict:
        """Sample `batch` clips of `length` contiguous rows, each of one stream.

        With probability `episode_start_fraction`, a clip begins at an is_first row. With probability
        `priority_fraction`, it contains, at a random offset, a row that is sampled in proportion to its priority. The
        priority is its surprise (negative surprise counts as 0), or 1 for rows with a reward. All other clips are
        uniform over all clips, and so are those for which no such row exists. Clips may span episodes. A clip that
        begins within an episode has is_first False in its first row; the caller resets M's state where a clip starts.

        Returns:
            obs (dict of (B, T, ...)), action (B, T, A) float32, reward and surprise (B, T) float32, is_first,
            terminated and truncated (B, T) bool. The arrays belong to the caller.

        Raises:
            UserError: the replay holds no clip of that length.
        """
        special = episode_start_fraction + priority_fraction
        if not (episode_start_fraction >= 0 and priority_fraction >= 0 and special <= 1):
            raise ValueError(
                f"episode_start_fraction {episode_start_fraction} and priority_fraction {priority_fraction} are "
                f"probabilities of exclusive choices"
            )
        spans = [(low, high) for low, high in self._spans() if high - low >= length]
        if not spans:
            raise UserError(
                f"the replay holds no clip of {length} rows: collect more before learning, shorten the clips, or give "
                f"it more capacity (a full one always has clips of {self.longest_clip:,} rows)"
            )
        envs, times = self._uniform(rng, spans, batch, length)
        if special:
            kind = rng.random(batch)
            at_starts = kind < episode_start_fraction
            self._from_episode_starts(rng, spans, length, envs, times, np.flatnonzero(at_starts))
            by_priority = ~at_starts & (kind < special)
            self._from_priority(rng, spans, length, envs, times, np.flatnonzero(by_priority))
        return self._gather(envs.tolist(), times.tolist(), length)

    def _spans(self) -> list[tuple[int, int]]:
        """The maximal gapless intervals of time, [low, high), oldest first."""
        spans: list[tuple[int, int]] = []
        for segment in self._segments.values():
            low = segment.begin
            high = low + segment.rows
            if spans and spans[-1][1] == low:
                spans[-1] = (spans[-1][0], high)
            else:
                spans.append((low, high))
        return spans

    def _segments_in(self, spans: list[tuple[int, int]]) -> Iterator[tuple[Segment, tuple[int, int]]]:
        for low, high in spans:
            for seq in range(low // self.segment_rows, -(-high // self.segment_rows)):
                yield self._segments[seq], (low, high)

    def _uniform(self, rng, spans, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum([high - low - length + 1 for low, high in spans])
        draw = rng.integers(ends[-1] * self.num_envs, size=batch)
        place, envs = np.divmod(draw, self.num_envs)
        span = np.searchsorted(ends, place, side="right")
        # The last possible start of a span is `high - length`, at place ends - 1.
        return envs, place - ends[span] + 1 + np.array([high - length for _, high in spans])[span]

    def _from_episode_starts(self, rng, spans, length: int, envs, times, which) -> None:
        pairs = [(segment, segment.count_starts(high - length)) for segment, (_, high) in self._segments_in(spans)]
        ends = np.cumsum([count for _, count in pairs])
        if not ends[-1]:
            return
        for i, draw in zip(which, rng.integers(ends[-1], size=len(which)), strict=True):
            k = int(np.searchsorted(ends, draw, side="right"))
            segment, count = pairs[k]
            index = int(draw - ends[k] + count)
            envs[i] = segment.start_envs[index]
            times[i] = segment.start_times[index]

    def _from_priority(self, rng, spans, length: int, envs, times, which) -> None:
        pairs = list(self._segments_in(spans))
        ends = np.cumsum([segment.totals.sum() for segment, _ in pairs])
        if not ends[-1] > 0:
            return
        for i, (level, offset) in zip(which, rng.random((len(which), 2)), strict=True):
            k = _pick(ends, level * ends[-1])
            segment, (low, high) = pairs[k]
            by_env = np.cumsum(segment.totals)
            rest = level * ends[-1] - (ends[k - 1] if k else 0.0)
            env = _pick(by_env, rest)
            mass = segment.data["mass"][env, : segment.rows]
            anchor = segment.begin + _pick(mass, rest - (by_env[env - 1] if env else 0.0))
            first = max(low, anchor - length + 1)
            last = min(anchor, high - length)
            envs[i] = env
            times[i] = first + int(offset * (last - first + 1))

    def _gather(self, envs: list[int], times: list[int], length: int) -> dict:
        out: dict[str, np.ndarray] = {}
        for name, (shape, dtype) in self.fields.items():
            if name != "mass":
                out[name] = np.empty((len(envs), length, *shape), np.float32 if name == "action" else dtype)
        for b, (env, time) in enumerate(zip(envs, times, strict=True)):
            done = 0
            while done < length:
                seq, offset = divmod(time + done, self.segment_rows)
                count = min(length - done, self.segment_rows - offset)
                data = self._segments[seq].data
                self._touched += len(out) * FAULT_BYTES
                for name, target in out.items():
                    target[b, done : done + count] = data[name][env, offset : offset + count]
                done += count
        self._touched += sum(value.nbytes for value in out.values())
        self._release()
        obs = {name[4:]: out.pop(name) for name in list(out) if name.startswith("obs/")}
        return {"obs": obs, **out}


def _pick(ends: np.ndarray, level: float) -> int:
    """First index whose cumulative sum exceeds `level`. Its weight is positive even where rounding leaves the range."""
    return int(np.searchsorted(ends, min(max(level, 0.0), np.nextafter(ends[-1], 0)), side="right"))
