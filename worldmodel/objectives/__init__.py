"""How M is trained to predict, and how it is sampled."""

from __future__ import annotations

from longdream.worldmodel.objectives.flow import Flow
from longdream.worldmodel.objectives.mask import Mask
from longdream.worldmodel.objectives.prior import Prior
from longdream.worldmodel.objectives.teacher import Teacher
from longdream.worldmodel.types import class_by_name


def objective_class(name: str) -> type:
    """The class that `forcing.objective` names: a known word or a dotted path `package.module:Class`.

    Raises:
        ValueError: neither.
    """
    return class_by_name("forcing.objective", name, {"flow": Flow, "mask": Mask, "prior": Prior, "teacher": Teacher})
