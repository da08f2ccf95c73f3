"""Averages between two lines of the record."""

import pytest
import torch

from longdream.agent.run.metrics import Averages


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_means_are_of_updates_that_were_made(device: str) -> None:
    averages = Averages()
    for value, finite in ((1.0, True), (float("nan"), False), (3.0, True)):
        averages.add({"loss": torch.tensor(value, device=device)}, torch.tensor(finite, device=device))
    averages.add({"never": torch.tensor(float("nan"), device=device)}, torch.tensor(False, device=device))
    assert averages.means() == {"loss": 2.0}
