"""A session of play: reality and M's dream under the same actions, with a history that one can go back in.

Everything that is needed to go on from a moment is a value in it: the state of the environment, what M remembers, and
the pictures. So going back is taking an earlier moment, and branching is acting from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from longdream.agent.core.actor import Carry
from longdream.agent.dream_env.starts import Moments
from longdream.agent.evaluation.probes import Reading
from longdream.agent.play.frames import encode, maze, observation
from longdream.agent.play.mind import Expected, Judgement, Memory, Mind
from longdream.envs.contract import EnvSpec, Row, UserError
from longdream.envs.make import World

KEPT = 500
"""Moments that one can go back to."""
ENDED = 0.5
"""A dream is over where M expects an end with at least this probability."""
Mode = Literal["both", "dream", "reality"]
Start = Literal["episode", "replay", "picture"]


@dataclass(frozen=True)
class Real:
    """Reality at a moment. state: the world's, to go on from. total: the return so far. map: of Memory Maze."""

    row: Row
    state: dict[str, Any]
    picture: bytes
    total: float
    probes: dict[str, np.ndarray]

    @property
    def over(self) -> bool:
        return bool(self.row.terminated[0] or self.row.truncated[0])


@dataclass(frozen=True)
class Moment:
    """One moment of a session, and all that it takes to go on from it.

    number: counts moments since the session began; those of two futures of a moment have the same numbers.
    action: the encoded one `(1, A)` that led here; None where an episode or a dream begins.
    real, carry: of reality and of M; None without an environment or without an agent.
    dream: M's picture: what it expected to see, or where a dream begins. expected: M's prediction of this moment.
    surprise: (latent, reward, end) of reality for M. dreamt: the sum of expected rewards so far. eyes: whether M saw
    what came. over: whether the dream, if there is nothing else, has ended. read: the maze as M remembers it.
    """

    number: int
    action: np.ndarray | None
    real: Real | None
    carry: Carry | None
    dream: bytes | None
    expected: Expected | None = None
    surprise: tuple[float, float, float] | None = None
    judgement: Judgement = field(default_factory=Judgement)
    dreamt: float = 0.0
    eyes: bool = True
    over: bool = False
    read: Reading | None = None


@dataclass
class Settings:
    """What can be changed at any moment.

    eyes: whether M sees reality ("look again") or only the actions ("let go"). agent: who acts.
    """

    mode: Mode = "both"
    eyes: bool = True
    agent: bool = False
    greedy: bool = True
    temperature: float = 1.0
    steps: int = 1


class Session:
    """Reality, a dream, or both, step by step.

    Args:
        spec: of observations and actions. world: one copy of the environment; None: dreams alone. It is closed with the
            session.
        mind: the agent's; None: reality alone.
        moments: of a replay, where dreams can begin; None: there is none.
        seed: of the episodes and dreams.

    Raises:
        UserError: (in every method) what is asked for is not there.
        EnvError: the environment failed.
    """

    def __init__(
        self, spec: EnvSpec, world: World | None, mind: Mind | None, moments: Moments | None = None, seed: int = 0
    ) -> None:
        self.spec = spec
        self.world = world
        self.mind = mind
        self.moments = moments
        self.seed = seed
        self.episodes = 0
        self.settings = Settings(mode="both" if world and mind else "reality" if world else "dream")
        if mind is not None:
            self.settings.steps = mind.steps
        self.history: list[Moment] = []
        self.other: list[Moment] = []
        """Another future of a moment in the history, from the moment after it on."""
        self.at = 0
        """Place in the history."""
        self.begin("episode" if world else "replay")

    @property
    def now(self) -> Moment:
        """The moment that is shown."""
        return self.history[self.at]

    @property
    def counterpart(self) -> Moment | None:
        """The moment of the other future that is as late as this one."""
        return next((moment for moment in self.other if moment.number == self.now.number), None)

    # -- beginning ----------------------------------------------------------------------------------------------------

    def begin(self, start: Start, picture: bytes = b"") -> None:
        """Begin a new episode, or a dream from a random replayed moment or from an uploaded picture.

        Replayed moments and pictures are dreams alone: no environment can be put there.
        """
        number = self.history[-1].number + 1 if self.history else 0
        if start == "episode":
            self._begin_episode(number)
        elif self.mind is None:
            raise UserError("without an agent there is no dream: play a run instead of an environment")
        elif start == "replay":
            if self.moments is None:
                raise UserError("this run has no replay on disk: begin with an episode, or with a picture")
            chosen = int(np.random.default_rng((self.seed, number)).integers(len(self.moments.z)))
            carry, shown = self.mind.wake(self.moments, chosen)
            self._begin_dream(number, carry, shown)
        else:
            row = self.mind.in_row(observation(picture, self.spec))
            self._begin_dream(number, self.mind.see(self.mind.empty(), row)[0], encode(row.obs))

    def set_mode(self, mode: Mode) -> None:
        """Show reality, M's dream, or both. From a dream, the other two begin with a new episode."""
        if mode != "dream" and self.world is None:
            raise UserError("there is no environment: only dreams can be played")
        if mode != "reality" and self.mind is None:
            raise UserError("without an agent there is no dream: play a run instead of an environment")
        self.settings.mode = mode
        if mode != "dream" and self.now.real is None:
            self.begin("episode")

    def _begin_episode(self, number: int) -> None:
        if self.world is None:
            raise UserError("there is no environment: begin with a replayed moment")
        self.world.seed = self.seed + self.episodes
        self.episodes += 1
        row = self.world.reset()
        if self.settings.mode == "dream" and self.mind is not None:
            self._begin_dream(number, self.mind.see(self.mind.empty(), row)[0], encode(row.obs))
        else:
            self._add(self._first(number, None, self._real(row, 0.0)))

    def _begin_dream(self, number: int, carry: Carry, shown: bytes) -> None:
        assert self.mind is not None
        self.settings.mode = "dream"
        moment = Moment(number, None, None, carry, shown, judgement=self.mind.judge(carry), eyes=False)
        self._add(moment)

    def _first(self, number: int, action: np.ndarray | None, real: Real) -> Moment:
        """The first moment of an episode: M sees it, whatever it does later."""
        if self.mind is None:
            return Moment(number, action, real, None, None)
        carry, _ = self.mind.see(self.mind.empty(), real.row)
        judgement = self.mind.judge(carry)
        read = self.mind.read(carry, real.probes)
        picture = real.picture
        return Moment(number, action, real, carry, picture, judgement=judgement, eyes=self.settings.eyes, read=read)

    # -- time ---------------------------------------------------------------------------------------------------------

    def step(self, action: np.ndarray | None) -> None:
        """One moment further, by this encoded action `(1, A)`; None: by the agent's.

        From an earlier moment this branches: what came after it becomes the other future.
        """
        if self.at < len(self.history) - 1:
            self._branch()
        now = self.now
        alone = self.settings.mode == "dream" or now.real is None
        if alone and (now.over or (now.real is not None and now.real.over)):
            self.begin("replay" if self.world is None else "episode")
            return
        seed = (self.seed << 32) + now.number + 1
        if self.settings.agent or action is None:
            action = self._agents_action(now, seed)
        self._add(self._next(now, action, seed))

    def _next(self, now: Moment, action: np.ndarray, seed: int) -> Moment:
        settings = self.settings
        number = now.number + 1
        real = None
        if now.real is not None and settings.mode != "dream":
            assert self.world is not None
            row = self.world.step(action)
            first = bool(row.is_first[0])
            real = self._real(row, 0.0 if first else now.real.total + float(row.reward[0]))
            if first:
                return self._first(number, None, real)
        if self.mind is None or now.carry is None:
            return Moment(number, action, real, None, None)
        acted = self.mind.acted(now.carry, action)
        dreams = settings.mode != "reality"
        carry = acted
        expected = surprise = None
        if dreams:
            carry, expected = self.mind.imagine(acted, settings.temperature, settings.steps, seed)
        if real is not None:
            seen, surprise = self.mind.see(acted, real.row)
            carry = seen if settings.eyes or not dreams else carry
        return Moment(
            number,
            action,
            real,
            carry,
            expected.picture if expected else None,
            expected,
            surprise,
            self.mind.judge(carry),
            now.dreamt + (expected.reward if expected else 0.0),
            real is not None and (settings.eyes or not dreams),
            real is None and expected is not None and expected.end >= ENDED,
            self.mind.read(carry, real.probes) if real is not None else None,
        )

    def _agents_action(self, now: Moment, seed: int) -> np.ndarray:
        if self.mind is None or now.carry is None:
            raise UserError("there is no agent that could act: play a run instead of an environment")
        return self.mind.choose(now.carry, self.settings.greedy, seed)

    def _real(self, row: Row, total: float) -> Real:
        assert self.world is not None
        return Real(row, self.world.get_state(), encode(row.obs), total, self.world.probes())

    def _add(self, moment: Moment) -> None:
        self.history.append(moment)
        if len(self.history) > KEPT:
            del self.history[0]
        self.at = len(self.history) - 1
        if self.other and self.other[0].number <= self.history[0].number:
            self.other = []  # the moment where it parts is no longer kept

    # -- going back ---------------------------------------------------------------------------------------------------

    def go(self, number: int) -> None:
        """Show the moment of this number, or the nearest one that is kept."""
        first = self.history[0].number
        self.at = min(max(number - first, 0), len(self.history) - 1)

    def swap(self) -> None:
        """Make the other future this one, and this one the other; shown from the moment where they part."""
        if not self.other:
            raise UserError("there is no other future: go back, and act from there")
        parting = self.other[0].number - self.history[0].number
        future = self.history[parting:]
        self.history = self.history[:parting] + self.other
        self.other = future
        self.at = parting
        self._restore(len(self.history) - 1)

    def _branch(self) -> None:
        self.other = self.history[self.at + 1 :]
        del self.history[self.at + 1 :]
        self._restore(self.at)

    def _restore(self, place: int) -> None:
        """Put the environment where this moment has it."""
        real = self.history[place].real
        if real is not None and self.world is not None:
            self.world.set_state(real.state)

    # -- memory -------------------------------------------------------------------------------------------------------

    def forget(self, what: Memory) -> None:
        """Erase a part of M's memory at this moment."""
        if self.mind is None or self.now.carry is None:
            raise UserError("there is no M that could forget: play a run instead of an environment")
        carry = self.mind.forget(self.now.carry, what)
        self.history[self.at] = replace(self.now, carry=carry)

    def close(self) -> None:
        if self.world is not None:
            self.world.close()

    # -- for the page -------------------------------------------------------------------------------------------------

    def map(self) -> dict[str, Any] | None:
        """The true map of Memory Maze at this moment, and the one that is read out of M's memory."""
        return maze(self.now.real.probes, self.now.read) if self.now.real else None
