"""Between two lines of the record: averages, and what is learned per second."""

import time
from types import SimpleNamespace

import pytest
import torch

from longdream.agent.run.metrics import RATES, Averages, Rates


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_means_are_of_updates_that_were_made(device: str) -> None:
    averages = Averages()
    for value, finite in ((1.0, True), (float("nan"), False), (3.0, True)):
        averages.add({"loss": torch.tensor(value, device=device)}, torch.tensor(finite, device=device))
    averages.add({"never": torch.tensor(float("nan"), device=device)}, torch.tensor(False, device=device))
    assert averages.means() == {"loss": 2.0}


def agent_on(device: str) -> SimpleNamespace:
    return SimpleNamespace(updates=5, dream_steps=70, device=torch.device(device))


def test_rates_are_of_what_was_learned_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    agent = agent_on("cpu")
    rates = Rates(agent, rows=32)
    clock[0] += 2
    agent.updates += 8
    agent.dream_steps += 60
    first = {"time/updates_per_s": 4.0, "time/rows_per_s": 128.0, "time/dreamt_steps_per_s": 30.0}
    assert rates.take() == first
    clock[0] += 4
    agent.updates += 4
    assert rates.take() == {"time/updates_per_s": 1.0, "time/rows_per_s": 32.0, "time/dreamt_steps_per_s": 0.0}
    agent.updates = 1000  # loaded, not learned
    agent.dream_steps = 9000
    rates.restart()
    clock[0] += 1
    assert rates.take() == dict.fromkeys(first, 0.0)
    assert first.keys() == RATES.keys() - {"time/gpu"}


def test_the_gpu_is_left_out_from_when_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(agent_on("cuda"), rows=32)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    assert rates.take()["time/gpu"] == 0.97
    monkeypatch.undo()

    def failing(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", failing)
    assert "time/gpu" not in rates.take()
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    assert "time/gpu" not in rates.take()  # it is not asked for at every line again


@pytest.mark.cuda
def test_the_gpu_is_read_where_its_package_is() -> None:
    pytest.importorskip("pynvml")
    assert 0 <= Rates(agent_on("cuda"), rows=32).take()["time/gpu"] <= 1
