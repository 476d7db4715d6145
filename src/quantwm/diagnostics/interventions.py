"""The verdict by intervention from scratch: plan with a quantized model, and with its parts mended.

A study of seven arms on the same episodes: the float model, both oracles, the quantized model, it
with one side put back in float at a time, and `oracle-latent` with its encoder. What a study's own
report says of its arms, without having to write the study.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantwm.diagnostics.alignment import ObjectiveAlignment, objective_alignment
from quantwm.diagnostics.verdict import InterventionVerdict, verdict_by_intervention
from quantwm.errors import GateError
from quantwm.study.results import TaskResults, read_results
from quantwm.study.run import run_study
from quantwm.study.spec import StudySpec

DEFAULT_EPISODES = 24


@dataclass(frozen=True)
class Interventions:
    """What planning with a quantized model and its mended versions showed.

    Attributes:
        verdict: which part makes it fail; of the float arm, where that fails itself.
        alignment: arm's name → objective alignment, of every arm that plans by a predicted cost.
        results: the rows.
        gate: why nothing quantized was run, where the float model fails; else "".
    """

    verdict: InterventionVerdict
    alignment: Mapping[str, ObjectiveAlignment]
    results: TaskResults
    gate: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with `"kind": "interventions"`."""
        return {
            "kind": "interventions",
            "verdict": self.verdict.to_dict(),
            "alignment": {name: one.to_dict() for name, one in self.alignment.items()},
            "gate": self.gate,
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
        settings: others of `StudySpec`, such as `episodes`, 24 unless given, and `seed`, 0.

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
    common = {"name": f"interventions-{scheme}{suffix}", "block": "tuning", "seed": 0}
    common |= {"episodes": DEFAULT_EPISODES}
    return StudySpec.from_dict(common | settings | {"task": task, "model": model, "arms": arms})


def diagnose_interventions(spec: StudySpec, out: str | Path, **run: Any) -> Interventions:
    """Run the study of `intervention_study`, or what is missing of it, and judge.

    Args:
        spec: that study.
        out: its results folder; the same call goes on where it was interrupted.
        run: further arguments of `run_study`, such as `progress`.

    Raises:
        UsageError, MismatchError, CellsFailedError, QuantWMError: as `run_study`.
    """
    gate = ""
    try:
        run_study(spec, out, **run)
    except GateError as error:
        gate = str(error)
    results = read_results(out)
    judged = next(arm.name for arm in spec.arms if arm.kind == "quantized")
    reference = results.reference
    if gate and reference is None:
        raise GateError(gate)
    name = judged if reference is None or not gate else reference
    alignment = {
        arm: objective_alignment(rows)
        for arm, rows in results.rows.items()
        if any(row["cost_by_iteration"] for row in rows) and arm != "oracle-state"
    }
    return Interventions(verdict_by_intervention(results, name), alignment, results, gate)
