"""How few bits can a world model run on and still plan?

import quantwm as qwm

world_model = qwm.load("wall")
plan = qwm.QuantPlan({"encoder.*": "w8a8", "predictor.*": "w4g128"}, method="rtn")
calibration = qwm.calibrate(world_model, task="wall", episodes=8)
small = qwm.quantize(world_model, plan, calibration)
outcome = qwm.evaluate(small, task="wall", episodes=50, seed=1, baseline=world_model)
print(outcome)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantwm.calibration import Calibration, calibrate
    from quantwm.envs import get_task
    from quantwm.errors import QuantWMError
    from quantwm.evaluation import Outcome, evaluate, evaluate_reference
    from quantwm.loading import load, save
    from quantwm.methods import quantize
    from quantwm.planning.cem import CEM
    from quantwm.quant import QuantPlan

_HOME = {
    "CEM": "quantwm.planning.cem",
    "Calibration": "quantwm.calibration",
    "Outcome": "quantwm.evaluation",
    "QuantPlan": "quantwm.quant",
    "QuantWMError": "quantwm.errors",
    "calibrate": "quantwm.calibration",
    "evaluate": "quantwm.evaluation",
    "evaluate_reference": "quantwm.evaluation",
    "get_task": "quantwm.envs",
    "load": "quantwm.loading",
    "quantize": "quantwm.methods",
    "save": "quantwm.loading",
}

__all__ = [
    "CEM",
    "Calibration",
    "Outcome",
    "QuantPlan",
    "QuantWMError",
    "calibrate",
    "evaluate",
    "evaluate_reference",
    "get_task",
    "load",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `quantwm --help` should not.
    if name not in _HOME:
        raise AttributeError(f"module 'quantwm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
