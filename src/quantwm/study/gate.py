"""The float gate: a model that fails in float is no reference for its quantized versions."""

from collections.abc import Mapping, Sequence

from quantwm.errors import GateError
from quantwm.evaluation import ORACLES
from quantwm.study.prepare import Prepared
from quantwm.study.store import FinishedCell, ResultsFolder


def gate_of(prepared: Prepared, folder: ResultsFolder) -> bool:
    """Whether quantized arms may run: the float arm is finished and no failure, or there is none.

    In a run that is not gated a float arm below the gate is no failure. In another one it is
    refused once the study's oracles, which tell what is to blame, are there or could not be
    computed; until then quantized arms wait.

    Raises:
        GateError: the float arm fails, or could not be computed.
    """
    name = prepared.float_arm
    if name is None:
        return True
    cells = prepared.cells
    failure = folder.load_failure(cells[name].id)
    if failure is not None:
        raise GateError(f"the float arm {name!r} could not be computed: {failure['error']}")
    reference = folder.load_cell(cells[name].id)
    if reference is None:
        return False
    if not prepared.gated:
        return True
    oracles: dict[str, list[bool]] = {}
    awaited = False
    for cell in cells.values():
        if cell.kind in ORACLES and not cell.quantized:
            found = folder.load_cell(cell.id)
            if found is not None:
                oracles[cell.kind] = _successes(found)
            else:
                awaited = awaited or folder.load_failure(cell.id) is None
    try:
        check_gate(name, _successes(reference), oracles, prepared.spec.gate)
    except GateError as error:
        if awaited:
            return False
        raise GateError(f"{error} Finished cells are kept in {folder.path}.") from None
    return True


def _successes(cell: FinishedCell) -> list[bool]:
    return [bool(row["success"]) for row in cell.rows]


def check_gate(
    arm: str,
    successes: Sequence[bool],
    oracles: Mapping[str, Sequence[bool]],
    gate: float,
) -> None:
    """Refuse a float arm that succeeds too rarely.

    Args:
        arm: name of the float arm.
        successes: of its episodes.
        oracles: successes of the oracle arms of the study, by kind.
        gate: the least success rate.

    Raises:
        GateError: says what was seen, what the oracles blame, and how to go on.
    """
    rate = _rate(successes)
    if rate >= gate:
        return
    raise GateError(
        f"the float arm {arm!r} reaches the goal in {sum(successes)} of {len(successes)} episodes "
        f"({rate:.2f}), below the gate of {gate:.2f}: quantized arms cannot be judged against it. "
        f"{_blame(oracles, gate)} Mend that, or set gate=0 to compare all the same."
    )


def _blame(oracles: Mapping[str, Sequence[bool]], gate: float) -> str:
    if not {"oracle-state", "oracle-latent"} <= oracles.keys():
        return "Add the arms oracle-state and oracle-latent: they tell what is to blame."
    state, latent = _rate(oracles["oracle-state"]), _rate(oracles["oracle-latent"])
    seen = f"oracle-state reaches {state:.2f} and oracle-latent {latent:.2f}, which points to"
    if state < gate:
        return f"{seen} the planner and its settings: it fails with the true dynamics too."
    if latent < gate:
        return f"{seen} the representation and the objective."
    return f"{seen} the model's dynamics (the predictor)."


def _rate(successes: Sequence[bool]) -> float:
    return sum(successes) / len(successes)
