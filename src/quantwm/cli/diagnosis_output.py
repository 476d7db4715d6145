"""What diagnoses print."""

from typing import TYPE_CHECKING

from rich.text import Text

from quantwm.console import columns, out, print_whole, right

if TYPE_CHECKING:
    from quantwm.diagnostics.fidelity import Fidelity
    from quantwm.diagnostics.interventions import Interventions
    from quantwm.diagnostics.rollouts import RolloutDiagnosis
    from quantwm.diagnostics.sensitivity import Sensitivity

_LAYERS = 20
"""Layers that a table of sensitivities shows."""


def print_rollout_diagnosis(diagnosis: "RolloutDiagnosis") -> None:
    """Errors of imagined latents by model step, then what they do to the choice of candidates."""
    parts = [(name or "latent", name) for name in diagnosis.error]
    names = [f"{shown}\n{kind}" for shown, _ in parts for kind in ("imagined", "unchanged")]
    table = columns("model step", *(right(name) for name in names))
    for step in range(len(next(iter(diagnosis.error.values())))):
        values = [v[name][step] for _, name in parts for v in (diagnosis.error, diagnosis.still)]
        table.add_row(str(step + 1), *(f"{value:.3f}" for value in values))
    print_whole(table)
    facts = diagnosis.to_dict()
    out.print(
        "candidates, imagined against true costs: rank correlation "
        f"{facts['rank_correlation']:.2f}, {facts['elite_overlap']:.2f} of the {facts['elites']} "
        f"cheapest in common; the favourite ends {facts['regret']:.3g} further from the goal than "
        f"the best candidate (by true costs {facts['true_regret']:.3g}); means over "
        f"{facts['episodes']} episodes",
        highlight=False,
    )


def print_fidelity(fidelity: "Fidelity") -> None:
    """Drift by model step, then how candidates are ranked, against the float model."""
    arm, kinds = fidelity.arm, ("{}\nvs float", "{}\nvs truth", "float {}\nvs truth")
    names = [kind.format(name or "latent") for name in fidelity.drift for kind in kinds]
    table = columns("model step", *(right(name) for name in names))
    drifts = list(fidelity.drift.values())
    observed = [[d.observed, d.observed, 0.0] for d in drifts]
    table.add_row("observed", *(f"{value:.3f}" for part in observed for value in part))
    for step in range(len(drifts[0].against_float)):
        shown = [(d.against_float, d.against_truth, d.float_against_truth) for d in drifts]
        values = [kind[step] for part in shown for kind in part]
        table.add_row(str(step + 1), *(f"{value:.3f}" for value in values))
    out.print(f"{arm}: relative errors of latents", markup=False, highlight=False)
    print_whole(table)
    names = ["rank\ncorrelation", f"cheapest {fidelity.k}\nin common", "regret"]
    table = columns("candidates", *(right(name) for name in names))
    for name, ranks in (("at random", fidelity.first), ("near float's plan", fidelity.last)):
        means = [v.mean() for v in (ranks.rank_correlation, ranks.top_k_overlap, ranks.regret)]
        table.add_row(name, *(f"{mean:.3f}" for mean in means))
    out.print(f"\n{arm}: costs of candidates against float's", markup=False, highlight=False)
    print_whole(table)
    out.print(
        "regret: what its favourite costs above the cheapest, both by the float model; 1 is the "
        f"cost of a plan at random. Means over {len(fidelity.last.regret)} episodes.",
        highlight=False,
    )


def print_sensitivity(sensitivity: "Sensitivity") -> None:
    """The layers that matter most, then a summary of each part."""
    ranked = sensitivity.ranked()
    names = ("error of the\nlast latent", "rank correlation\nof costs")
    table = columns("layer", *(right(name) for name in names))
    for layer in ranked[:_LAYERS]:
        table.add_row(layer.layer, f"{layer.error:.4f}", f"{layer.rank_correlation:.3f}")
    out.print(
        f"{sensitivity.scheme} ({sensitivity.method}) in one layer alone, against the float model",
        markup=False,
        highlight=False,
    )
    print_whole(table)
    if len(ranked) > _LAYERS:
        out.print(
            f"... and {len(ranked) - _LAYERS} less sensitive layers (all with --json)",
            highlight=False,
        )
    for part in dict.fromkeys(layer.part for layer in sensitivity.layers):
        errors = [layer.error for layer in ranked if layer.part == part]
        out.print(
            f"{part}: {len(errors)} layers, median error {errors[len(errors) // 2]:.4f}, "
            f"largest {errors[0]:.4f}",
            highlight=False,
        )


def print_interventions(found: "Interventions") -> None:
    """The verdict with its evidence, then how far costs mean success, arm by arm."""
    one = found.verdict
    out.print(f"\n{one.arm}: {one.verdict}; {one.reason}", markup=False, highlight=False)
    table = columns("compared", right("estimate"), "95% interval", "", "")
    for part in one.evidence:
        known = part.estimate is not None and part.low is not None and part.high is not None
        shown = ["", ""]
        if known:
            sign = "" if part.margin is None else "+"  # a success rate, or a difference of two
            values = (part.estimate, part.low, part.high)
            estimate, low, high = (format(value, f"{sign}.2f") for value in values)
            shown = [estimate, f"[{low}, {high}]"]
        table.add_row(Text(part.text), *shown, part.verdict, Text(part.note))
    print_whole(table)
    if one.episodes_needed is not None:
        needed = f"--episodes {one.episodes_needed}"
        out.print(f"{needed} would decide it, if what was seen goes on", highlight=False)
    out.print("\nobjective: does a lower predicted cost mean success?", highlight=False)
    names = ("AUC", "cost falls to", "episodes in\nwhich it falls")
    table = columns("arm", *(right(name) for name in names))
    for name, alignment in found.alignment.items():
        fall = alignment.fall
        table.add_row(
            Text(name),
            "" if alignment.auc is None else f"{alignment.auc:.2f}",
            "" if fall.median is None else f"{fall.median:.2f}",
            f"{fall.falling} of {fall.episodes}",
        )
    print_whole(table)
    out.print(
        "AUC: chance that a success had the lower predicted cost than a failure of the same MPC "
        "iteration, 0.5 a coin's; empty without both. Costs fall to a share of the first step's.",
        highlight=False,
    )
