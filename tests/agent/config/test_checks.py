"""Settings that contradict each other, that are out of their range, or that mean nothing to a run of that kind."""

import re

import pytest

from longdream.agent.config import checks, options
from longdream.agent.config.schema import Config
from longdream.envs.contract import UserError

VIDEO = {"kind": "video", "video.data": "there"}
IMAGINATION = {"kind": "imagination", "world": "runs/there"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"replay.length": 1}, "replay.length 1: must be at least 2"),
        ({"worldmodel.window": 0}, "worldmodel.window 0: must be at least 1"),
        ({"worldmodel.layers": 0}, "worldmodel.layers 0: must be at least 1"),
        ({"learn.steps": -1}, "learn.steps -1: must be at least 1"),
        ({"learn.explore": 1.5}, "learn.explore 1.5: must be at most 1"),
        ({"learn.explore": -0.5}, "learn.explore -0.5: must be at least 0"),
        ({"learn.explore": float("nan")}, "learn.explore nan: "),
        ({"learn.encoder_rate": float("inf")}, "learn.encoder_rate inf: should be a finite number"),
        ({"env.timeout_s": 0}, "env.timeout_s 0: must be more than 0"),
        ({"learn.agc": 0}, "learn.agc 0: must be more than 0"),
        ({"worldmodel.blocks": [1, 0]}, "worldmodel.blocks [1, 0]: must be at least 1"),
        ({"worldmodel.blocks": []}, "worldmodel.blocks is empty"),
        ({"worldmodel.chunk_frames": 5}, "an agent acts after every frame; set it to 1"),
        ({"forcing.history": "noisy", "forcing.prefix": 0.5}, "an agent's dreams begin at clean frames"),
        ({"worldmodel.num_heads": 3}, "worldmodel.num_heads = 3 does not divide worldmodel.width = 64"),
        ({"replay.episode_start_fraction": 0.7, "replay.priority_fraction": 0.7}, "their sum must not exceed 1"),
        ({"learn.prefill": 20_000}, "learn.steps = 20000: nothing is learned before step 20000"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"seed": 2**31}, "seed 2147483648: must be less than 2.14748e+09"),
        ({"world": "runs/there"}, "kind = online and world = 'runs/there': --world RUN makes a run of kind"),
        ({"kind": "imagination"}, "kind = imagination and world = '': --world RUN makes a run of kind"),
        ({"kind": "video"}, "learn from what? Name a folder of recordings: --data DIR"),
        (VIDEO | {"video.lengths": []}, "video.lengths is empty"),
        (VIDEO | {"video.lengths": [64, 1]}, "video.lengths [64, 1]: must be at least 2"),
        (VIDEO | {"video.lengths": [2048]}, "video.frames = 1024 frames per update hold no clip of 2048"),
        (VIDEO | {"worldmodel.chunk_frames": 5}, "must be multiples of it, and 64 is not"),
        (VIDEO | {"video.retrace": 0.5}, "set video.condition to pose, video.carry to false and heads.reward_weight"),
        (VIDEO | {"video.carry": True, "cuda_graphs": True}, "set it or video.carry to false"),
        (VIDEO | {"video.encoder": "runs/there"}, "set video.freeze to true and learn.warmup to 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)) as caught:
        checks.check(options.update(Config(), settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, VIDEO, IMAGINATION])
def test_defaults_make_sense(settings: dict) -> None:
    checks.check(options.update(Config(), settings))


@pytest.mark.parametrize(
    "settings",
    [
        VIDEO | {"learn.steps": 1, "replay.length": 10**6},  # there is no replay, and no real step
        VIDEO | {"worldmodel.chunk_frames": 4},
        VIDEO | {"forcing.history": "noisy", "forcing.prefix": 0.5},
        IMAGINATION | {"learn.steps": 1},
    ],
)
def test_what_means_nothing_to_a_run_is_not_checked(settings: dict) -> None:
    checks.check(options.update(Config(), settings))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ({}, ["env.id", "env.kwargs.corridor", "learn.steps", "evaluate.every", "seed", "controller.kwargs.method"]),
        (VIDEO, ["video.data", "learn.updates", "evaluate.times", "worldmodel.layers", "seed"]),
        (IMAGINATION, ["world", "learn.updates", "evaluate.times", "controller.gamma", "replay.batch", "seed"]),
    ],
)
def test_what_may_be_given(kind: dict, names: list[str]) -> None:
    checks.check_given(options.update(Config(), kind), names)


@pytest.mark.parametrize(
    ("kind", "name", "problem"),
    [
        (
            {},
            "video.data",
            "--video.data means nothing to a run of kind online, only to video: name a preset video-..., or omit it",
        ),
        (
            {},
            "learn.updates",
            "--learn.updates means nothing to a run of kind online, only to imagination and video: omit it",
        ),
        ({}, "world", "--world means nothing to a run of kind online, only to imagination: omit it"),
        (VIDEO, "env.id", "--env.id means nothing to a run of kind video, only to online: omit it"),
        (VIDEO, "env.kwargs.size", "--env.kwargs.size means nothing to a run of kind video, only to online: omit it"),
        (
            VIDEO,
            "controller.gamma",
            "--controller.gamma means nothing to a run of kind video, only to online and imagination: omit it",
        ),
        (VIDEO, "evaluate.every", "--evaluate.every means nothing to a run of kind video, only to online: omit it"),
        (
            IMAGINATION,
            "worldmodel.layers",
            "--worldmodel.layers cannot change: V and M of runs/there stay as they are",
        ),
    ],
)
def test_what_means_nothing_to_a_run_is_refused(kind: dict, name: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        checks.check_given(options.update(Config(), kind), [name])
    assert str(caught.value) == problem


def test_the_kind_of_a_run_is_said_and_not_inferred() -> None:
    """Recordings that are named do not make a run on video: its kind does."""
    config = options.update(Config(), {"video.data": "there", "video.lengths": [4]})
    assert config.kind == "online"
    checks.check(config)
    with pytest.raises(UserError, match=r"--video\.data means nothing to a run of kind online"):
        checks.check_given(config, ["video.data"])


def test_a_replay_without_a_clip() -> None:
    checks.check_clip(Config(), 64)
    with pytest.raises(UserError, match=r"keeps clips of 63 rows at most, replay\.length is 64: raise the one"):
        checks.check_clip(Config(), 63)
