"""What was played, as a film and as episodes that the readers of recordings take (docs/video.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Literal

import av
import numpy as np

from longdream.agent.data import npz_episodes as offline
from longdream.agent.evaluation.plots import CONTEXT, IMAGINED, PANEL, beside, save_film
from longdream.agent.play.frames import decode
from longdream.agent.play.session import Moment, Session
from longdream.agent.run.files import check_own_path
from longdream.envs.contract import EnvSpec, Row
from longdream.envs.images import rgb

Format = Literal["mp4", "gif"]
MOST = 10_000
"""Moments of a recording, at most."""
QUALITY = "4"
"""Constant rate factor of H.264 for frames that somebody learns from: losses that cannot be seen. Colours are not
halved, which would blur small pictures."""


@dataclass(frozen=True)
class Lived:
    """What an episode keeps of a moment with a reality: a small part of it."""

    number: int
    action: np.ndarray | None
    row: Row
    probes: dict[str, np.ndarray]


class Recording:
    """Moments in the order in which they were shown, and of reality those that led to the newest one.

    spec: of the observations and actions.
    """

    def __init__(self, spec: EnvSpec) -> None:
        self.spec = spec
        self.shown: list[tuple[bytes | None, bytes | None, bool]] = []
        self.lived: list[Lived] = []
        self.last: Moment | None = None

    def __len__(self) -> int:
        return len(self.shown)

    @property
    def full(self) -> bool:
        return len(self) >= MOST

    def add(self, session: Session) -> None:
        """Take in the moment that a session shows.

        Steps that were taken back lie in the session's other future; they are left out. To look back takes back
        nothing.
        """
        moment = session.now
        if moment is self.last:  # it is shown again, as after a setting has changed
            return
        self.last = moment
        mode = session.settings.mode
        real = moment.real.picture if moment.real and mode != "dream" else None
        self.shown.append((real, moment.dream if mode != "reality" else None, moment.eyes))
        taken_back = {id(other.real.row) for other in session.other if other.real}
        while self.lived and id(self.lived[-1].row) in taken_back:
            self.lived.pop()
        if moment.real and (not self.lived or moment.number > self.lived[-1].number):
            self.lived.append(Lived(moment.number, moment.action, moment.real.row, moment.real.probes))

    def save(self, root: Path, form: Format, fps: float) -> list[Path]:
        """Write the film to `root`/videos and the episodes to `root`/recordings; their paths, the film's first.

        Raises:
            UserError: the folder has links where files belong.
        """
        film = _unused(root / "videos", f".{form}")
        check_own_path(root, film)
        save_film(film, self._film(), fps)
        paths = [film]
        for episode in self._episodes():
            maze = "maze_layout" in episode[0].probes
            path = _unused(root / "recordings", ".npz" if maze else ".mp4")
            check_own_path(root, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if maze:
                _write_maze(path, episode)
            else:
                self._write_mp4(path, episode, fps)
            paths.append(path)
        return paths

    def _film(self) -> Iterator[np.ndarray]:
        """Reality beside the dream, as far as there was one at any moment; what is missing is black."""
        sides = [any(moment[side] for moment in self.shown) for side in (0, 1)]
        sample = decode(next(data for real, dream, _ in self.shown for data in (real, dream) if data))
        for real, dream, eyes in self.shown:
            pictures = []
            for data, there in ((real, sides[0]), (dream, sides[1])):
                if there:
                    pictures.append(decode(data) if data else np.zeros_like(sample))
            captions = [name for name, there in zip(("reality", "dream"), sides, strict=True) if there]
            colours = [
                colour for colour, there in zip((PANEL, CONTEXT if eyes else IMAGINED), sides, strict=True) if there
            ]
            yield beside(pictures, captions, colours)

    def _episodes(self) -> Iterator[list[Lived]]:
        """Stretches of reality without a gap: of one episode, of two rows or more, in which something is seen."""
        if not any(known.kind == "image" for known in self.spec.obs.values()):
            return
        episode: list[Lived] = []
        for moment in self.lived:
            if not episode or moment.action is None or moment.number != episode[-1].number + 1:
                if len(episode) > 1:
                    yield episode
                episode = []
            episode.append(moment)
        if len(episode) > 1:
            yield episode

    def _write_mp4(self, path: Path, episode: list[Lived], fps: float) -> None:
        """Layout mp4: frames, and beside them the action that was taken at each but the last."""
        key = next(key for key, known in self.spec.obs.items() if known.kind == "image")
        images = [moment.row.obs[key][0] for moment in episode]
        height, width = images[0].shape[:2]
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=max(1, round(fps)), options={"crf": QUALITY})
            stream.width = width
            stream.height = height
            stream.pix_fmt = "yuv444p"
            for image in images:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb(image)), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        actions = np.concatenate([moment.action for moment in episode[1:] if moment.action is not None])
        if len(self.spec.action.parts) == 1:
            np.save(path.with_suffix(".npy"), actions.argmax(1))
        else:
            np.save(path.with_suffix(".npy"), actions)


def _write_maze(path: Path, episode: list[Lived]) -> None:
    """Layout memory-maze."""
    rows = []
    for before, moment in pairwise([None, *episode]):
        assert moment is not None
        action = None if before is None or moment.action is None else int(moment.action.argmax())
        (image,) = moment.row.obs.values()
        rows.append(offline.row(image[0], action, float(moment.row.reward[0]) if before else 0.0, moment.probes))
    offline.write(path, rows[: offline.STEPS + 1])


def _unused(folder: Path, suffix: str) -> Path:
    """The first of play-1, play-2, ... that is not there, with any suffix."""
    names = (folder / f"play-{i}" for i in count(1))
    return next(name.with_suffix(suffix) for name in names if not list(folder.glob(f"{name.name}.*")))
