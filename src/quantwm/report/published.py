"""What the published study (arXiv 2602.02110) says, in our words, beside our own tables."""

from collections.abc import Sequence

from quantwm.report.text import escape
from quantwm.report.verdicts import is_tested
from quantwm.study.findings import Finding

SOURCE = "arXiv 2602.02110"
TASKS = ("wall", "pusht")
"""Those that the published study's tables are of."""

_CLAIMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "weights": (
        "eight bits keep what the float model reaches; at four bits one scale a channel is "
        "unreliable and groups of 128 steady the imagined rollouts; at three bits groups no "
        "longer help.",
        (1, 2),
    ),
    "activations": (
        "eight bits for weights and inputs keep what the float model reaches; below that, one "
        "scale a token instead of one a tensor helps in some cells and not in others.",
        (1, 3),
    ),
    "sides": ("the encoder suffers from few bits, the predictor much less.", (4,)),
    "budgets": (
        "at very few bits neither more optimisation steps nor more MPC iterations bring back "
        "what was lost.",
        (5,),
    ),
    "objective": (
        "at very few bits the planner goes on lowering its objective while success does not "
        "follow.",
        (5,),
    ),
    "failures": (
        "tasks fail in their own ways: in Wall the representation breaks down, in PushT plans "
        "lead off course.",
        (6,),
    ),
}


def claim(about: str, findings: Sequence[Finding], task: str) -> str:
    """The published claim of a section, and what this study's findings say of it; "" if none.

    Args:
        about: key of the section's group.
        findings: of the whole study.
        task: whose section it is.
    """
    if about not in _CLAIMS:
        return ""
    text, numbers = _CLAIMS[about]
    own = [
        f'<a href="#finding-{one.number}">finding {one.number}</a> {escape(one.verdict)}'
        for one in findings
        if one.number in numbers and one.task in (None, task) and is_tested(one)
    ]
    if task not in TASKS:
        text += " Its tables are of Wall and PushT."
    here = f" <b>Here:</b> {'; '.join(own)}." if own else ""
    return f'<p class="claim"><b>Published study</b> ({SOURCE}): {escape(text)}{here}</p>'
