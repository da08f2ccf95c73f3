"""Action sets of MineRL: there and back, and the numbers of Video PreTraining."""

import itertools
import json

import numpy as np
import pytest
from gymnasium import spaces

from longdream.envs.contract import UserError
from longdream.envs.minerl.actions import CAMERA_MAX, action_set, camera_bins, camera_degrees
from longdream.envs.minerl.controls import CONTROLS, HUMAN, NONE, Controls
from longdream.envs.minerl.env import MineRLEnv
from longdream.envs.minerl.recordings import ticks_of_jsonl, ticks_of_rendered
from longdream.envs.remote import Enum

SETS = [(task, kind) for task in CONTROLS for kind in ("flat", "factored", "vpt")]


def stacked(ticks: list[dict]) -> dict[str, np.ndarray]:
    return {key: np.stack([tick[key] for tick in ticks]) for key in ticks[0]}


@pytest.mark.parametrize(("task", "kind"), SETS)
def test_encode_undoes_decode(task: str, kind: str) -> None:
    actions = action_set(kind, CONTROLS[task], task)
    actions.space.seed(0)
    if isinstance(actions.space, spaces.Discrete):
        chosen = np.arange(actions.space.n)
    else:
        chosen = np.stack([actions.space.sample() for _ in range(300)])
        rest = 60  # camera bins without the button that says that the camera moves mean nothing
        if kind == "vpt":
            still = chosen[:, 0] % 2 == 0
            still |= chosen[:, 0] == len(actions.names[0]) - 1 if "inventory" in CONTROLS[task].buttons else False
            chosen[still, 1] = rest
            chosen[~still & (chosen[:, 1] == rest), 1] = 0
    ticks = stacked([actions.decode(action) for action in chosen])
    np.testing.assert_array_equal(actions.encode(ticks), chosen)


def test_the_published_numbers_of_vpt() -> None:
    """Counted anew from the description of the published action space: its products in their order."""
    vpt = action_set("vpt", HUMAN)
    assert vpt.space == spaces.MultiDiscrete([8641, 121])
    factors = [
        [NONE, *(f"hotbar.{i}" for i in range(1, 10))],
        [NONE, "forward", "back"],
        [NONE, "left", "right"],
        [NONE, "sprint", "sneak"],
        *([NONE, key] for key in ("use", "drop", "attack", "jump", "camera")),
    ]
    for number, combination in enumerate(itertools.product(*factors)):
        if number % 97 == 0 or number > 8630:
            tick = vpt.decode([number, 0])
            assert {key for key in HUMAN.buttons if tick[key]} == set(combination) - {NONE, "camera"}
            assert (np.abs(tick["camera"]).max() > 0) == (combination[-1] == "camera")
    tick = vpt.decode([8640, 0])
    assert [key for key in HUMAN.buttons if tick[key]] == ["inventory"] and not tick["camera"].any()
    np.testing.assert_allclose(vpt.decode([1, 3 * 11 + 10])["camera"], camera_degrees(np.array([3, 10])))


def test_the_camera_is_finest_near_rest() -> None:
    middles = camera_degrees(np.arange(11))
    np.testing.assert_array_equal(camera_bins(middles), np.arange(11))
    np.testing.assert_allclose(middles, -middles[::-1], atol=1e-6)
    assert middles[5] == 0 and middles[10] == pytest.approx(CAMERA_MAX)
    steps = np.diff(middles[5:])
    assert (np.diff(steps) > 0).all()
    # mu-law with mu = 10: |x| = (11 ** |y| - 1) / 10
    np.testing.assert_allclose(middles[6:], 10 * (11 ** (np.arange(1, 6) / 5) - 1) / 10, rtol=1e-6)
    np.testing.assert_array_equal(camera_bins(np.array([-500.0, 500.0])), [0, 10])


def test_encode_chooses_the_nearest_action() -> None:
    ticks = {
        "forward": [1, 1, 0, 0, 1, 1],
        "back": [0, 1, 0, 0, 0, 0],
        "attack": [0, 0, 1, 0, 1, 0],
        "jump": [0, 0, 0, 0, 0, 1],
        "craft": [NONE, NONE, NONE, "planks", NONE, "nonsense"],
        "camera": [[0, 0], [0, 0], [0, 2], [30, 0], [0, 0], [-1, 1]],
    }
    flat = action_set("flat", CONTROLS["ObtainDiamond"], "ObtainDiamond")
    chosen = [flat.names[0][number] for number in flat.encode(ticks)]
    assert chosen[0] == "forward" and chosen[2:4] == ["attack", "craft_planks"] and chosen[5] == "forward_jump"
    assert chosen[4] in ("attack", "forward")
    factored = action_set("factored", CONTROLS["ObtainDiamond"], "ObtainDiamond")
    names = [
        {names[number] for names, number in zip(factored.names, row, strict=True)} for row in factored.encode(ticks)
    ]
    assert "forward" in names[0] and not {"forward", "back"} & names[1]  # opposite directions cancel
    assert {"attack", "forward"} <= names[4] and "planks" in names[3] and "jump" in names[5]


def test_flat_actions_are_those_that_the_task_supports() -> None:
    sizes = {task: len(action_set("flat", CONTROLS[task], task).names[0]) for task in CONTROLS}
    assert sizes == {
        "Treechop": 13,
        "NavigateDense": 13,
        "ObtainDiamond": 26,
        "ObtainDiamondShovel": 24,
        "BasaltFindCave": 14,
    }
    assert "ESC" in action_set("flat", HUMAN, "BasaltFindCave").names[0]  # as MineRL 1.0 has it
    assert [len(n) for n in action_set("factored", HUMAN, "BasaltFindCave").names if "ESC" in n] == [2]


def test_invalid_ticks_are_reported() -> None:
    flat = action_set("flat", CONTROLS["ObtainDiamond"], "ObtainDiamond")
    camera = np.zeros((3, 2))
    for ticks, message in (
        ({"forward": [1]}, "need a camera of shape"),
        ({"camera": camera, "forward": [1, 0]}, "3 ticks, but 'forward'"),
        ({"camera": camera, "craft": [0, 1, 0]}, "must hold words such as"),
        ({"camera": camera * np.nan}, "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            flat.encode(ticks)
    with pytest.raises(UserError, match="no action set 'flatt': use flat, factored, vpt"):
        action_set("flatt", HUMAN)


def test_invalid_arguments_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGDREAM_MINERL_PYTHON", raising=False)
    for arguments, message in (
        ({"task": "Treechoop"}, "no MineRL task 'Treechoop': use Treechop"),
        ({"task": "Treechop"}, "name it by python="),
        ({"task": "Treechop", "repeat": 0}, "repeat=0"),
        ({"task": "Treechop", "pitch": 100}, "pitch=100"),
        ({"task": "Treechop", "pitch": 0}, "pitch=0"),
        ({"task": "Treechop", "python": "/no/such/python"}, "there is no interpreter"),
    ):
        with pytest.raises(UserError, match=message):
            MineRLEnv(**arguments)  # type: ignore[arg-type]


def test_controls_of_a_space() -> None:
    parts = {"camera": spaces.Box(-180, 180, (2,)), "attack": spaces.Discrete(2), "place": Enum(["dirt", NONE])}
    assert Controls.of(spaces.Dict(parts)) == Controls(("attack",), {"place": ("dirt", NONE)})
    for wrong in ({"camera": parts["attack"]}, {"attack": parts["attack"]}, parts | {"power": spaces.Discrete(3)}):
        with pytest.raises(UserError, match="no action space of a MineRL task"):
            Controls.of(spaces.Dict(wrong))


def test_rendered_actions() -> None:
    rendered = {
        "action$forward": np.array([1, 0]),
        "action$camera": np.array([[0, 0], [0, -15.0]]),
        "action$place": np.array([NONE, "dirt"]),
        "reward": np.zeros(2),
        "observation$inventory$dirt": np.zeros(3),
    }
    ticks = ticks_of_rendered(rendered)
    assert sorted(ticks) == ["camera", "forward", "place"]
    flat = action_set("flat", CONTROLS["NavigateDense"], "NavigateDense")
    assert [flat.names[0][i] for i in flat.encode(ticks)] == ["forward", "jump_place_dirt"]
    with pytest.raises(UserError, match="no action\\$camera"):
        ticks_of_rendered({"reward": np.zeros(2)})
    with pytest.raises(UserError, match="2 actions, but 'forward' \\(1,\\)"):
        ticks_of_rendered(rendered | {"action$forward": np.array([1])})


def line(keys: str = "", dx: float = 0, dy: float = 0, buttons: tuple = (), new: tuple = (), hotbar: int = 0) -> str:
    pressed = [f"key.keyboard.{key}" for key in keys.split()]
    mouse = {"x": 640.0, "y": 360.0, "dx": dx, "dy": dy, "buttons": buttons, "newButtons": new}
    return json.dumps({"mouse": mouse, "keyboard": {"keys": pressed, "chars": ""}, "hotbar": hotbar, "tick": 0})


def test_ticks_of_a_contractors_recording() -> None:
    ticks = ticks_of_jsonl(
        [
            line("w left.control", buttons=(0,), new=(0,)),  # attack hangs from the beginning
            line("w u", dx=20, dy=-10, buttons=(0,)),
            line("", buttons=(0.0, 1), new=(0, 1.0), hotbar=3),  # until it is pressed anew
            line("e", dx=2000, hotbar=3),
            "",
        ]
    )
    assert {key: value.tolist() for key, value in ticks.items() if value.any() and key != "camera"} == {
        "forward": [True, True, False, False],
        "sprint": [True, False, False, False],
        "attack": [False, False, True, False],
        "use": [False, False, True, False],
        "hotbar.4": [False, False, True, False],
        "inventory": [False, False, False, True],
    }
    np.testing.assert_allclose(ticks["camera"], [[0, 0], [-1.5, 3.0], [0, 0], [0, 0]])
    vpt = action_set("vpt", HUMAN)
    assert vpt.encode(ticks)[3].tolist() == [8640, 60]
    for wrong, message in (
        (["{"], "line 1 is no tick"),
        ([line(), '{"mouse": {}}'], "line 2 is no tick"),
        ([], "no tick"),
    ):
        with pytest.raises(UserError, match=message):
            ticks_of_jsonl(wrong)
