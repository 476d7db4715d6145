"""The verdict by intervention from scratch: plan with a quantized model, and with its parts mended.

A study of seven arms on the same episodes: the float model, both oracles, the quantized model, it
with one side put back in float at a time, and `oracle-latent` with its encoder. What a study's own
report says of its arms, without having to write the study.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantwm.diagnostics.alignment import ObjectiveAlignment, objective_alignment
from quantwm.diagnostics.verdict import InterventionVerdict, verdict_by_intervention
from quantwm.study.results import TaskResults, read_results
from quantwm.study.run import OnArm, run_study
from quantwm.study.spec import StudySpec
from quantwm.study.store import CONFIG
from quantwm.study.tables import Summary

DEFAULT_EPISODES = 50
"""Of fewer than 36 not even outcomes that are all alike show that success is kept."""
_PREDICTED = ("float", "quantized")
"""Kinds of arms that plan by costs of what a model predicts."""


@dataclass(frozen=True)
class Interventions:
    """What planning with a quantized model and its mended versions showed.

    Attributes:
        verdict: which part makes it fail; of the float arm, where that fails itself.
        alignment: arm's name → objective alignment, of every arm that plans by a predicted cost.
        results: the rows; without quantized arms where the float model surely fails.
    """

    verdict: InterventionVerdict
    alignment: Mapping[str, ObjectiveAlignment]
    results: TaskResults

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with `"kind": "interventions"`."""
        return {
            "kind": "interventions",
            "verdict": self.verdict.to_dict(),
            "alignment": {name: one.to_dict() for name, one in self.alignment.items()},
        }


def intervention_study(
    task: str,
    model: str,
    scheme: str,
    *,
    method: str = "rtn",
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> StudySpec:
    """The study that judges a quantized model by its parts, on tuning episodes.

    Args:
        task: its name.
        model: bundled name or folder of the float model; its parts are `encoder` and `predictor`.
        scheme: of every layer, such as "w3".
        method, options: how weights are quantized.
        settings: others of `StudySpec`, such as `episodes`, 50 unless given, and `seed`, 0.

    Raises:
        UsageError: an unknown scheme, method or setting.
    """
    suffix = "" if method == "rtn" else f"@{method}"

    def quantized(side: str = "", kind: str = "quantized") -> dict[str, Any]:
        prefix = "" if kind == "quantized" else f"{kind}:"
        return {
            "name": f"{prefix}{side and side + ':'}{scheme}{suffix}",
            "kind": kind,
            "plan": {f"{side}.*" if side else "*": scheme},
            "method": method,
            "options": dict(options or {}),
        }

    arms = [
        "oracle-state",
        "oracle-latent",
        "float",
        quantized(),
        quantized("encoder"),
        quantized("predictor"),
        quantized(kind="oracle-latent"),
    ]
    common = {"block": "tuning", "seed": 0, "episodes": DEFAULT_EPISODES} | settings
    name = f"interventions-{scheme}{suffix}-{common['episodes']}"
    what = {"name": name, "task": task, "model": model, "arms": arms}
    return StudySpec.from_dict(common | what)


def diagnose_interventions(spec: StudySpec, out: str | Path, **run: Any) -> Interventions:
    """Run the study of `intervention_study`, or what is missing of it, and judge.

    Where the float model's success is surely below the gate, nothing quantized is run, and the
    float model is judged by the oracles.

    Args:
        spec: that study.
        out: its results folder; the same call goes on where it was interrupted.
        run: further arguments of `run_study`, such as `progress`.

    Raises:
        UsageError, MismatchError, CellsFailedError, QuantWMError: as `run_study`.
    """
    unquantized = tuple(arm for arm in spec.arms if arm.plan is None)
    steps = [replace(spec, arms=unquantized), spec]
    run = run | {"on_arm": _once(run.get("on_arm"))}
    for step in steps[_steps_done(out) :]:
        run_study(step, out, gated=False, **run)  # its gate would go by the rate alone
        results = read_results(out)
        judged = verdict_by_intervention(results, _judged(step))
        if any(one.text == "float" and one.verdict == "contradicted" for one in judged.evidence):
            break
    alignment = {
        name: objective_alignment(rows)
        for name, rows in results.rows.items()
        if results.arms[name].kind in _PREDICTED
    }
    return Interventions(judged, alignment, results)


def _judged(spec: StudySpec) -> str:
    """The arm that is judged: the quantized one, or float where there is none."""
    return next((arm.name for arm in spec.arms if arm.kind == "quantized"), "float")


def _steps_done(out: str | Path) -> int:
    """1 where a folder's study has quantized arms already, so that float was judged before."""
    config = Path(out) / CONFIG
    return int(config.is_file() and _judged(StudySpec.from_yaml(config)) != "float")


def _once(tell: OnArm | None) -> OnArm:
    """Tell of each arm once, though two runs in turn have it."""
    told: set[str] = set()

    def on_arm(summary: Summary) -> None:
        if tell is not None and summary["arm"] not in told:
            tell(summary)
        told.add(summary["arm"])

    return on_arm
