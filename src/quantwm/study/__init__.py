"""Studies: many arms on the same episodes, each cell stored once, compared pair by pair.

from quantwm.study import load_preset, run_study

result = run_study(load_preset("quick", "wall"), "results/wall")
"""

from quantwm.study.arms import Arm
from quantwm.study.dry_run import CellPlan, plan_study
from quantwm.study.run import StudyInterrupted, StudyResult, run_study
from quantwm.study.spec import CalibrationSettings, StudySpec, load_preset, presets
from quantwm.study.work import StudyProgress

__all__ = [
    "Arm",
    "CalibrationSettings",
    "CellPlan",
    "StudyInterrupted",
    "StudyProgress",
    "StudyResult",
    "StudySpec",
    "load_preset",
    "plan_study",
    "presets",
    "run_study",
]
