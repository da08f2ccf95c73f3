"""Reality and dream step by step: they agree while corrected, part when let go, and any moment can be returned to."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree

from longdream.agent.cli.play import find_run
from longdream.agent.core.actor import Carry
from longdream.agent.data.npz_episodes import read
from longdream.agent.data.video.library import open_library
from longdream.agent.play import session as play
from longdream.agent.play.frames import decode
from longdream.agent.play.mind import Mind
from longdream.agent.play.player import Player
from longdream.agent.play.recording import Recording
from longdream.agent.play.session import Session
from longdream.agent.play.source import Source, open_source
from longdream.envs import World
from longdream.envs.contract import UserError


def same(one: Carry, other: Carry) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def go(session: Session, source: Source, *keys: str) -> None:
    for key in keys:
        session.step(source.keys.action((key,)))


FORWARD, DOOR = "ArrowUp", "Digit1"


@pytest.fixture(scope="module")
def images(source_of: Callable[[str], Source]) -> Source:
    return source_of("images")


def test_while_it_is_corrected_m_knows_what_acting_knows(images: Source) -> None:
    session = images.session()
    mind = session.mind
    assert isinstance(mind, Mind)
    assert session.world is not None
    carry = mind.empty()
    for key in [None, FORWARD, FORWARD, DOOR, FORWARD]:
        if key is not None:
            action = images.keys.action((key,))
            assert action is not None
            carry = mind.acted(carry, action)
            session.step(action)
        real = session.now.real
        assert real is not None and session.now.carry is not None
        carry, surprise = mind.see(carry, real.row)
        assert same(carry._replace(action=session.now.carry.action), session.now.carry) and session.now.eyes
        if key is not None and not real.row.is_first[0]:
            assert session.now.surprise == surprise and session.now.expected is not None
    session.close()


def test_let_go_and_look_again(images: Source) -> None:
    seeing, blind = images.session(), images.session()
    blind.seed = seeing.seed
    for session in (seeing, blind):
        session.episodes = 0
        session.begin("episode")
    blind.settings.eyes = False
    for session in (seeing, blind):
        go(session, images, FORWARD, FORWARD)
    a, b = seeing.now, blind.now
    assert a.real and b.real and a.carry and b.carry
    assert a.real.picture == b.real.picture and not same(a.carry, b.carry)
    assert a.eyes and not b.eyes and a.surprise != b.surprise
    # what a blind M knows is a dream of the same actions
    dream = images.session()
    dream.seed, dream.episodes = blind.seed, 0
    dream.begin("episode")
    dream.set_mode("dream")
    dream.history[0] = play.replace(dream.history[-1], number=blind.history[0].number)
    del dream.history[1:]
    dream.at = 0
    first = blind.history[-3]
    dream.history[0] = play.replace(first, real=None)
    go(dream, images, FORWARD, FORWARD)
    assert dream.now.carry and same(dream.now.carry, b.carry) and dream.now.dream == b.dream
    blind.settings.eyes = True
    go(blind, images, FORWARD)
    assert blind.now.real and blind.now.carry and blind.mind
    action = images.keys.action((FORWARD,))
    assert action is not None
    seen, _ = blind.mind.see(blind.mind.acted(b.carry, action), blind.now.real.row)
    assert same(blind.now.carry, seen)
    for session in (seeing, blind, dream):
        session.close()


@pytest.mark.parametrize("name", ["images", "vectors"])  # an environment with a state, and one that is run again
def test_the_same_actions_from_an_earlier_moment_are_the_same_future(
    name: str, source_of: Callable[[str], Source]
) -> None:
    source = source_of(name)
    session = source.session()
    keys = [binding.keys for binding in source.keys.bindings][:2]
    for held in (keys[0], keys[1], keys[0], keys[0]):
        session.step(source.keys.action(held))
    before = list(session.history)
    session.go(before[1].number)
    assert session.now is before[1]
    for held in (keys[1], keys[0], keys[0]):
        session.step(source.keys.action(held))
    assert [moment.number for moment in session.history] == [moment.number for moment in before]
    for moment, old in zip(session.history, before, strict=True):
        assert moment.real and old.real and moment.carry and old.carry
        assert moment.real.picture == old.real.picture and moment.dream == old.dream
        assert same(moment.carry, old.carry) and moment.real.total == old.real.total
    assert session.counterpart is before[-1]
    session.close()


def test_two_futures_are_compared_and_swapped(images: Source) -> None:
    session = images.session()
    go(session, images, FORWARD, FORWARD, FORWARD, DOOR)
    first = list(session.history)
    session.go(first[2].number)
    go(session, images, DOOR, FORWARD)
    assert session.other == first[3:] and session.counterpart is first[4]
    second = list(session.history)
    session.swap()
    assert session.history == first and session.other == second[3:] and session.now is first[3]
    go(session, images, DOOR)  # from there it branches again, with the environment where it was
    real = session.now.real
    assert real and real.over and session.now.number == first[4].number
    with pytest.raises(UserError, match="no other future"):
        fresh = images.session()
        fresh.swap()
    session.close()


def test_what_is_kept_is_bounded(images: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "KEPT", 5)
    session = images.session()
    go(session, images, *[FORWARD] * 6)
    assert [moment.number for moment in session.history] == [2, 3, 4, 5, 6]
    session.go(0)
    assert session.now.number == 2
    go(session, images, *[FORWARD] * 9)
    assert len(session.history) == 5 and not session.other  # what they would be compared with is forgotten, too
    session.close()


def test_a_future_without_its_beginning_is_no_future(images: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped in, it would go on from a moment that it does not come from."""
    monkeypatch.setattr(play, "KEPT", 8)
    session = images.session()
    go(session, images, *[FORWARD] * 7)
    session.go(1)
    go(session, images, *[FORWARD] * 6)
    assert session.history[0].number == 0 and session.other[0].number == 2
    go(session, images, FORWARD)
    session.swap()
    assert [moment.number for moment in session.history] == list(range(1, 8))
    session.swap()
    session.go(8)
    go(session, images, FORWARD)  # the moment where they part is no longer kept
    with pytest.raises(UserError, match="no other future"):
        session.swap()
    session.close()


def test_a_memory_that_is_not_there_cannot_be_erased(images: Source) -> None:
    session = images.session()
    assert images.mind and images.mind.memories == {"scan", "attention"}
    images.mind.memories = frozenset({"scan"})
    try:
        session.forget("scan")
        for what in ("attention", "both"):
            with pytest.raises(UserError, match="no attention that could be erased"):
                session.forget(what)
    finally:
        images.mind.memories = frozenset({"scan", "attention"})
    session.close()


@pytest.mark.parametrize("what", ["scan", "attention", "both"])
def test_forget(what, images: Source) -> None:
    session = images.session()
    go(session, images, FORWARD, FORWARD)
    assert session.now.carry
    before = session.now.carry.state
    assert all(t.abs().sum() > 0 for t in (*before.mixers, *before.k, *before.v)) and before.age > 0
    session.forget(what)
    after = session.now.carry.state
    for kept, gone in ((what == "attention", after.mixers), (what == "scan", (*after.k, *after.v))):
        assert all((t.abs().sum() > 0) == kept for t in gone)
    assert (after.age > 0) == (what == "scan") and torch.equal(after.last, before.last)
    assert all(t.abs().sum() > 0 for t in before.mixers)  # the moment before is as it was: state is a value
    go(session, images, FORWARD)
    session.close()


def test_what_is_forgotten_is_missing_in_the_dream(images: Source) -> None:
    """After both are erased, M dreams as from the frame alone that it has just seen."""
    session = images.session()
    go(session, images, FORWARD, FORWARD)
    session.settings.eyes = False
    number = session.now.number
    go(session, images, FORWARD)
    remembered = session.now
    session.go(number)
    session.forget("both")
    go(session, images, FORWARD)
    assert session.now.carry and remembered.carry
    assert not torch.equal(session.now.carry.feat, remembered.carry.feat)
    session.close()


def test_dreams_begin_where_they_are_told_to(images: Source) -> None:
    session = images.session()
    session.begin("replay")
    assert session.settings.mode == "dream" and session.now.real is None and session.now.dream
    go(session, images, FORWARD)
    assert session.now.real is None and session.now.expected
    picture = np.zeros((60, 40, 3), np.uint8)
    picture[20:40] = (230, 30, 30)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    session.begin("picture", out.getvalue())
    assert session.now.dream
    assert abs(decode(session.now.dream).astype(int) - (230, 30, 30)).mean() < 80  # cut to a square
    session.set_mode("both")  # which needs reality: a new episode
    assert session.now.real and session.now.action is None
    for data in (b"", b"GIF89a", out.getvalue()[:40]):
        with pytest.raises(UserError, match="cannot be read"):
            session.begin("picture", data)
    session.close()


def test_a_dream_that_is_over_begins_anew(images: Source) -> None:
    session = images.session()
    session.set_mode("dream")
    session.history[-1] = play.replace(session.now, real=None, over=True)
    go(session, images, FORWARD)
    assert session.now.action is None and not session.now.over
    session.close()


def test_pictures_are_for_agents_that_see_one_image(source_of: Callable[[str], Source]) -> None:
    session = source_of("mixed").session()
    with pytest.raises(UserError, match="sees eye, gear, leg"):
        session.begin("picture", b"")
    session.step(None)  # the agent's action
    assert session.now.action is not None
    session.close()


def test_an_environment_alone(source_of: Callable[[str], Source]) -> None:
    source = source_of("longdream/FastMemoryMaze-9x9-v0")
    session = source.session()
    assert session.settings.mode == "reality" and session.map()
    for call in (lambda: session.step(None), lambda: session.forget("scan"), lambda: session.begin("replay")):
        with pytest.raises(UserError, match="play a run instead"):
            call()
    with pytest.raises(UserError, match="play a run instead"):
        session.set_mode("both")
    before = session.map()
    go(session, source, FORWARD, FORWARD, FORWARD)
    after = session.map()
    assert before and after and before["true"] == after["true"] and before["agent"] != after["agent"]
    session.go(0)
    assert session.map() == before
    session.close()


# -- recordings -------------------------------------------------------------------------------------------------------


def test_demonstrations_in_a_maze_are_episodes(source_of: Callable[[str], Source], tmp_path: Path) -> None:
    source = source_of("longdream/FastMemoryMaze-9x9-v0")
    session = source.session()
    recording = Recording(source.spec)
    recording.add(session)
    keys = [(FORWARD,), ("ArrowLeft",), (FORWARD, "ArrowRight"), ()]
    for held in keys:
        session.step(source.keys.action(held))
        recording.add(session)
    film, path = recording.save(tmp_path, "gif", 8)
    assert film == tmp_path / "videos" / "play-1.gif" and path == tmp_path / "recordings" / "play-1.npz"
    episode = read(path)
    assert episode["action"].argmax(1).tolist()[1:] == [1, 2, 5, 0] and not episode["action"][0].any()
    world = World("longdream/FastMemoryMaze-9x9-v0", 1, session.seed)
    frames = [world.reset().obs["obs"][0]]
    for held in keys:
        action = source.keys.action(held)
        assert action is not None
        frames.append(world.step(action).obs["obs"][0])
    assert (episode["image"] == np.stack(frames)).all()
    assert open_library(tmp_path / "recordings", "auto", "actions", "").layout == "memory-maze"
    world.close()
    session.close()


def test_other_demonstrations_are_videos_with_actions(images: Source, tmp_path: Path) -> None:
    session = images.session()
    recording = Recording(images.spec)
    session.episodes = 0
    session.begin("episode")
    recording.add(session)
    for key in (FORWARD, FORWARD, FORWARD, FORWARD, DOOR):
        go(session, images, key)
        recording.add(session)
    number = session.now.number
    session.go(number - 2)
    recording.add(session)
    go(session, images, DOOR)  # the last two steps did not happen after all
    recording.add(session)
    assert len(recording) == 8
    film, path = recording.save(tmp_path, "mp4", 8)
    assert film.stat().st_size > 1000
    library = open_library(tmp_path / "recordings", "auto", "actions", "")
    assert library.layout == "mp4"
    (one,) = library.recordings
    assert one.length == 5 and library.reader.actions(one, 0, 4).argmax(1).tolist() == [0, 0, 0, 1]
    frames = library.reader.frames(one, 0, 5, 16)
    lived = [moment.row.obs["obs"][0] for moment in recording.lived]
    assert abs(frames.astype(int) - np.stack(lived)).mean() < 6
    again, _ = recording.save(tmp_path, "mp4", 8)
    assert again.name == "play-2.mp4" and path.name == "play-1.mp4"
    session.close()


def test_to_look_back_takes_nothing_back(images: Source, tmp_path: Path) -> None:
    session = images.session()
    recording = Recording(images.spec)
    for number in (None, None, None, 1, 2, None):  # forward three times, back, on again, forward
        if number is None:
            go(session, images, FORWARD)
        else:
            session.go(number)
        recording.add(session)
    assert [moment.number for moment in recording.lived] == [1, 2, 3]
    session.go(3)
    recording.add(session)
    go(session, images, FORWARD)
    recording.add(session)
    assert [moment.number for moment in recording.lived] == [1, 2, 3, 4]
    session.forget("scan")  # another value of the same moment
    recording.add(session)
    session.go(1)
    recording.add(session)
    go(session, images, DOOR)  # three steps are taken back
    recording.add(session)
    assert [moment.number for moment in recording.lived] == [1, 2]
    assert recording.lived[1].action is not None and recording.lived[1].action.argmax() == 1
    session.close()


def test_a_film_shows_the_sides_that_were_shown(images: Source, tmp_path: Path) -> None:
    session = images.session()
    for mode, sides in (("reality", (True, False)), ("dream", (False, True)), ("both", (True, True))):
        session.set_mode(mode)
        recording = Recording(images.spec)
        for _ in range(2):
            go(session, images, FORWARD)
            recording.add(session)
        assert [tuple(bool(side) for side in shown[:2]) for shown in recording.shown] == [sides] * 2
    session.close()


def test_nothing_is_written_through_a_link(images: Source, tmp_path: Path) -> None:
    session = images.session()
    recording = Recording(images.spec)
    recording.add(session)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "videos").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        recording.save(tmp_path / "run", "mp4", 8)
    assert not list(elsewhere.iterdir())
    session.close()


def test_a_recording_that_cannot_be_written_is_one_line(images: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told: list[str] = []

    class Page:
        async def send_bytes(self, data: bytes) -> None: ...
        async def send_str(self, data: str) -> None:
            told.append(data)

    async def messages() -> AsyncIterator[str]:
        for on in (True, False):
            yield json.dumps({"do": "record", "on": on})

    async def blocking(function: Callable, *arguments) -> object:
        return function(*arguments)

    session = images.session()
    player = Player(replace(images, root=tmp_path / "file"), session, blocking, {})
    asyncio.run(player.run(Page(), messages()))
    assert [line for line in told if "the recording cannot be written to" in line] and not player.written
    session.close()


def test_no_step_is_taken_after_a_pause(images: Source) -> None:
    """Neither one that was due already, and waited for the command that paused."""

    async def blocking(function: Callable, *arguments) -> object:
        return function(*arguments)

    async def main(pauses: bool) -> int:
        session = images.session()
        player = Player(images, session, blocking, {})
        session.settings.agent = True
        player.playing = True
        async with player.turn:
            step = asyncio.create_task(player._step())
            await asyncio.sleep(0)
            player.playing = not pauses
        await step
        session.close()
        return session.now.number

    assert [asyncio.run(main(pauses)) for pauses in (False, True)] == [1, 0]


def test_the_agent_that_comes_with_the_program(source_of: Callable[[str], Source], tmp_path: Path) -> None:
    """It plays and dreams in its maze; what is recorded does not go to the program's own folder."""
    source = source_of("memory-maze-9x9")
    assert source.root == Path("recordings/memory-maze-9x9") and source.fps == 4
    session = source.session()
    for eyes in (True, False):
        session.settings.eyes = eyes
        session.step(None)
        assert session.now.real and session.now.dream and session.now.judgement.value is not None
        error = abs(decode(session.now.real.picture).astype(int) - decode(session.now.dream)).mean()
        assert error < 20  # a picture that has nothing to do with it is off by 50 and more
    session.close()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["images", "vectors"])
def test_a_step_that_is_a_graph_is_the_step(dream_runs: Callable[[str], Path], name: str) -> None:
    what = str(dream_runs(name))
    source = open_source(what, find_run(what), {}, "cuda")
    assert source.mind is not None
    slow, fast = Mind(source.mind.agent), Mind(source.mind.agent, graphed=True)
    carries = [mind.acted(mind.empty(), np.eye(1, source.spec.action.size, dtype=np.float32)) for mind in (slow, fast)]
    for steps in (1, 4, 1):
        for seed, temperature in ((1, 1.0), (2, 0.5), (1, 1.0)):
            results = [
                mind.imagine(carry, temperature, steps, seed) for mind, carry in zip((slow, fast), carries, strict=True)
            ]
            (one, told), (other, also) = results
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
            assert told.reward == pytest.approx(also.reward, abs=1e-2)
            assert told.end == pytest.approx(also.end, abs=1e-2)
            assert slow.judge(one).value == pytest.approx(fast.judge(one).value, abs=1e-2)
            carries = [one, other]
