"""Settings that are checked against their annotated types and ranges."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from longdream.worldmodel.fields import AT_LEAST_1, POSITIVE, SHARE, validated


@dataclass(frozen=True)
class Settings:
    count: Annotated[int, AT_LEAST_1] = 3
    rate: Annotated[float, POSITIVE] = 0.5
    share: Annotated[float, SHARE] = 0.0
    method: Literal["a", "b"] = "a"


def test_values_that_fit() -> None:
    assert validated(Settings, {}, "x") == Settings()
    assert validated(Settings, {"count": 1, "share": 1, "method": "b"}, "x") == Settings(1, 0.5, 1.0, "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, r"^x\.count 0: must be at least 1$"),
        ({"rate": 0.0}, r"^x\.rate 0\.0: must be more than 0$"),
        ({"share": 1.5}, r"^x\.share 1\.5: must be at most 1$"),
        ({"count": "many"}, r"^x\.count 'many': should be a valid integer$"),
        ({"method": "c"}, r"^x\.method 'c': should be 'a' or 'b'$"),
        ({"cuont": 2}, r"^x\.cuont: there is no such setting; there are count, rate, share, method$"),
    ],
)
def test_values_that_do_not_fit(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(Settings, values, "x")
