"""Each measurement has the value that is right where it is known, and each light the colour that follows from it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longdream.agent.cli.main import main
from longdream.agent.config import options
from longdream.agent.config.schema import EnvConfig
from longdream.agent.core.agent import Agent
from longdream.agent.evaluation import diagnosis
from longdream.agent.evaluation.diagnosis import Explained, Finding, Played, diagnose
from longdream.agent.train.trainer import OnlineTrainer
from longdream.envs import World
from longdream.envs.contract import ObsSpec


def moving_dot() -> np.ndarray:
    """Pictures `(12, 16, 16, 3)` of a dot that moves on a background that does not."""
    rows = np.random.default_rng(0).integers(60, 90, (1, 16, 16, 3)).repeat(12, 0).astype(np.uint8)
    for t in range(12):
        rows[t, 5, t] = 255
    return rows


def explained(rows: np.ndarray, predicted: np.ndarray, kind: Any) -> float | None:
    part = Explained(ObsSpec(kind, rows.shape[1:], 4), rows.mean(0), np.ones(1))
    part.add(rows[1:], predicted[1:], rows[:-1])
    return part.share()


def test_what_changes_is_what_counts() -> None:
    """A V that draws the background alone has an error of 1% of the picture, and shows nothing."""
    rows = moving_dot()
    background = np.median(rows, 0)[None].repeat(12, 0)
    assert explained(rows, rows, "image") == 1
    blurred = explained(rows, background, "image")
    before = explained(rows, np.concatenate([rows[:1], rows[:-1]]), "image")
    assert blurred is not None and blurred < 0.1 and before is not None and before <= 0
    half = np.where(rows == 255, 165, rows)  # half of the way from the background's 75
    share = explained(rows, half, "image")
    assert share is not None and 0.6 < share < 0.8  # a quarter of the squared error is left
    assert explained(rows[:1].repeat(12, 0), rows, "image") is None  # nothing changed


def test_discrete_values_and_vectors() -> None:
    rows = np.array([0, 1, 1, 2, 3, 3, 0])
    assert explained(rows, np.array([0, 1, 0, 2, 0, 0, 0]), "discrete") == pytest.approx(3 / 4)
    cells = np.array([[[0, 1]], [[1, 1]], [[1, 2]]])
    assert explained(cells, np.array([[[0, 1]], [[1, 0]], [[1, 1]]]), "categories") == pytest.approx(1 / 2)
    vectors = np.random.default_rng(1).normal(size=(500, 3))
    assert explained(vectors, vectors, "vector") == 1
    noisy = explained(vectors, vectors + 0.5 * np.random.default_rng(2).normal(size=(500, 3)), "vector")
    assert noisy == pytest.approx(0.75, abs=0.05)  # R squared


def played(reward: list[list[float]], **fields: Any) -> Played:
    """Rows of two copies, whose features are their numbers."""
    rewards = np.array(reward).T
    none = np.zeros(rewards.shape, bool)
    arrays: dict[str, Any] = {"terminated": none, "truncated": none, "first": none}
    arrays |= {name: np.array(values).T for name, values in fields.items()}
    feat = torch.arange(rewards.shape[0]).float()[:, None, None].expand(*rewards.shape, 1)
    return Played({}, rewards, **arrays, feat=feat, action=torch.zeros_like(feat), entropy=np.empty(0))


def heads(reward: np.ndarray, end: np.ndarray) -> Any:
    """An agent whose heads expect these of the row after row t, `(T, n)`."""

    def expect(feat: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(reward[1:]), 1 - torch.from_numpy(end[1:])

    return SimpleNamespace(model=SimpleNamespace(reward_continue=SimpleNamespace(expect=expect)))


def test_the_reward_head_is_judged_by_rewarded_steps() -> None:
    rows = played([[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]])
    none = np.zeros_like(rows.reward)
    assert diagnosis._reward(heads(rows.reward, none), rows).light == "green"
    silent = diagnosis._reward(heads(none, none), rows)
    assert silent.value == 0 and silent.light == "red" and "reward_weight" in silent.advice
    half = diagnosis._reward(heads(rows.reward / 2, none), rows)
    assert half.value == pytest.approx(0.75)
    guessed = np.where([[0, 0], [0, 0], [1, 0], [1, 0], [0, 1], [1, 1], [0, 0], [0, 0]], 0.5, 0.0)  # where it may come
    assert diagnosis._reward(heads(guessed, none), rows).value == pytest.approx(1 - 5 / 4 / 3)
    usual = diagnosis._reward(heads(none, none), played([[1.0] * 8, [1.0] * 8]))
    assert usual.light == "unknown" and "0 of 14 steps" in usual.says


def test_ends_are_looked_at_where_they_were_and_elsewhere() -> None:
    ends = [[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]
    first = [[1, 0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1, 0, 0]]
    rows = played([[0.0] * 8] * 2, terminated=np.array(ends, bool), first=np.array(first, bool))
    ended = np.array(ends, float).T
    assert diagnosis._end(heads(ended, ended), rows) == Finding(
        1.0, "green", "M expects an end with probability 1.00 where episodes ended, 0.000 elsewhere"
    )
    assert diagnosis._end(heads(ended, np.full_like(ended, 0.3)), rows).light == "red"


def test_going_on_ends_at_the_first_row_of_another_episode() -> None:
    first = [[1, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    rows = played([[0.0] * 8] * 2, first=np.array(first, bool))
    assert rows.going_on(1, 4).tolist() == [[True, True], [False, True], [False, True], [False, True]]


def test_memory_is_what_is_lost_without_it() -> None:
    assert diagnosis.memory(1.0, 0.5, 0.0).value == 0.5
    harmful = diagnosis.memory(1.0, 1.5, 0.0)
    assert harmful.light == "yellow" and "better without" in harmful.says
    chance = diagnosis.memory(0.2, 0.2, 0.3)
    assert chance.light == "red" and "replay.length" not in chance.advice and "light above" in chance.advice


def test_what_v_should_try_concerns_what_it_does_not_show() -> None:
    def advice(key: str, exchanges: bool = False, **encoder: int) -> str:
        config = options.update(options.load("tiny"), {f"encoder.{name}": value for name, value in encoder.items()})
        spec = SimpleNamespace(obs={"screen": ObsSpec("image", (8, 8, 3)), "key": ObsSpec("discrete", (), 2)})
        model = SimpleNamespace(exchanges_gradients=exchanges)
        return diagnosis._for_encoder(SimpleNamespace(config=config, spec=spec, model=model), key)  # type: ignore[arg-type]

    assert "--encoder.grid 4" in advice("screen") and "--encoder.depth 32" in advice("screen")
    assert "grid" not in advice("screen", grid=4) and "depth" not in advice("screen", depth=32)
    assert "shaped_by observation" in advice("screen", exchanges=True) and "shaped_by" not in advice("screen")
    assert "--encoder" not in advice("key", exchanges=True) and "--learn.train_ratio" in advice("key")


@pytest.mark.parametrize(("entropy", "says"), [(0.69, "a lower"), (0.66, "a lower"), (0.0, "a higher")])
def test_the_advice_on_entropy_names_one_side(entropy: float, says: str) -> None:
    agent: Any = SimpleNamespace(spec=SimpleNamespace(action=SimpleNamespace(parts=(2,))))
    rows = played([[0.0] * 4] * 2)
    rows.entropy = np.full((4, 2), entropy)
    assert diagnosis._entropy(agent, rows).advice.startswith(f"{says} --controller.entropy")


def test_an_agent_that_has_learned_nothing() -> None:
    config = options.load("tiny")
    world = World(config.env.id, 1, 0, config.env.kwargs)
    agent = Agent(config, world.spec)
    state = torch.get_rng_state()
    findings = diagnose(agent, config.env, 0, rows=128)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(findings) == ["encoder", "dream", "reward", "end", "promise", "entropy"]
    assert findings["encoder"].light == findings["dream"].light == findings["entropy"].light == "red"
    assert "--encoder.grid" in findings["encoder"].advice
    again = diagnose(agent, config.env, 0, rows=128)
    assert again == findings  # the same steps and the same dreams


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_vectors_boxes_and_episodes_without_ends(env: str) -> None:
    config = options.update(options.load("tiny"), {"env.id": env, "env.kwargs": {}})
    world = World(env, 1, 0)
    findings = diagnose(Agent(config, world.spec), EnvConfig(env), 0, rows=256)
    world.close()
    assert findings["encoder"].value is not None and findings["promise"].value is not None
    assert (findings["entropy"].light == "unknown") == (env == "Pendulum-v1")
    assert (findings["end"].light == "unknown") == (env == "Pendulum-v1")


def test_training_warns_once_of_each_red_light(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"learn.steps": 160, "evaluate.every": 60, "evaluate.final_episodes": 2, "log.to": ("tensorboard",)}
    config = options.update(options.load("tiny"), settings)
    folder = tmp_path / "run"
    OnlineTrainer.train(config, folder)
    said = capsys.readouterr().err
    warned = [line for line in said.splitlines() if "longdream diagnose" in line]
    assert warned and len({line.split(";")[0] for line in warned}) == len(warned)
    assert sum("V shows" in line for line in warned) == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = sum("evaluate/return_mean" in line or "final/return_mean" in line for line in lines)
    assert sum("diagnosis/encoder" in line for line in lines) == evaluations > 1
    events = EventAccumulator(str(folder / "tensorboard"), {"tensors": 0}).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("warnings/text_summary")]
    assert len(texts) == len(warned) and all(text in said for text in texts)
    OnlineTrainer.train(options.update(config, {"learn.steps": 240}), folder, resume=True)
    assert "V shows" not in capsys.readouterr().err  # it was said before

    assert main(["diagnose", str(folder), "--rows", "128", "--episodes", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out.splitlines()[-1])
    assert list(shown["findings"])[-1] == "memory" and shown["findings"]["encoder"]["light"] == "red"
    assert "try: --encoder.grid" in err
    assert main(["diagnose", str(folder), "--rows", "3"]) == 2
    assert "--rows 3: must be at least 64" in capsys.readouterr().err
