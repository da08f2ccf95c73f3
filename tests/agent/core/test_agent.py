"""What an agent refuses to be built from, with the number that would fit."""

import re

import pytest

from longdream.agent.config import options
from longdream.agent.core.agent import Agent
from longdream.agent.core.device import free_bytes
from longdream.envs.contract import ActionSpec, EnvSpec, ObsSpec, UserError

SPEC = EnvSpec(
    {"obs": ObsSpec("image", (16, 16, 3))},
    ActionSpec((3,), native={"kind": "discrete", "start": 0, "shape": [], "dtype": "int64"}),
)


def build(**settings: object) -> Agent:
    given = {"device": "cpu"} | {key.replace("__", "."): value for key, value in settings.items()}
    return Agent(options.update(options.load("tiny"), given), SPEC)


def test_more_dreams_than_memory_holds_are_refused() -> None:
    """The number that is named does fit, and three times as many do not."""
    with pytest.raises(UserError, match=r"controller\.imagination_starts = 1,000,000,000: 4 times as many") as error:
        build(controller__imagination_starts=1_000_000_000).check_memory()
    found = re.search(r"at most ([\d,]+)", str(error.value))
    assert found
    fits = int(found[1].replace(",", ""))
    assert free_bytes(build().device) > 0 and fits > 1000
    build(controller__imagination_starts=fits // 2).check_memory()
    with pytest.raises(UserError, match="GiB free"):
        build(controller__imagination_starts=3 * fits).check_memory()


@pytest.mark.parametrize("grid", [16, 12])
def test_tokens_that_v_cannot_make_are_refused(grid: int) -> None:
    with pytest.raises(UserError, match=f"encoder.grid = {grid} needs .* pixels or more; set it to at most 8"):
        build(encoder__grid=grid)
    build(encoder__grid=8)
