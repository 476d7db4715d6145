"""Whether a results folder is a study's own: one folder holds rows of one configuration."""

from collections.abc import Mapping
from typing import Any

from quantwm.compute import NUMERICS_VERSION, cpu_arithmetic
from quantwm.errors import MismatchError
from quantwm.study.prepare import Prepared
from quantwm.study.spec import RECORD
from quantwm.study.store import ResultsFolder

UNDEFINING = ("version", "name", "model", "arms", "gate", "memory_budget", "diagnostics")
"""Settings that may change within one results folder; the model counts by its hash."""


def definition_of(prepared: Prepared) -> dict[str, Any]:
    """What fixes the rows of a study's every arm, as flat dotted keys: a results folder has one."""
    return definition(prepared.spec.to_dict(), prepared.model_hash, NUMERICS_VERSION)


def definition(
    values: Mapping[str, Any], model: str | None, numerics: int | None
) -> dict[str, Any]:
    """Flat dotted keys of a study's plain values, without those that may change."""
    flat: dict[str, Any] = {"model_hash": model, "numerics": numerics}
    for key, value in values.items():
        if key in UNDEFINING:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def check_same_study(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: str) -> None:
    """Refuse a results folder of another study.

    Args:
        found, wanted: `definition` of the folder and of this study.
        folder: for the message.

    Raises:
        MismatchError: lists the keys that differ, with both values.
    """
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if not keys:
        return
    listed = "\n".join(
        f"  {key}: the folder has {_shown(found, key)}, this study {_shown(wanted, key)}"
        for key in keys
    )
    raise MismatchError(
        f"{folder} holds the results of another configuration:\n{listed}\n"
        "Give another folder (--out), or set these as the folder has them. Arms, name, gate, "
        "diagnostics and memory_budget may change within one folder, nothing else."
    )


def check_folder(prepared: Prepared, folder: ResultsFolder) -> None:
    """Refuse a folder that is another study's, or nobody's."""
    config = folder.read_config()
    if config is None:
        folder.check_usable()
        return
    record = config.pop(RECORD, None) or {}
    found = definition(config, record.get("model_hash"), record.get("numerics"))
    check_same_study(found, definition_of(prepared), str(folder.path))


def check_arithmetic(prepared: Prepared, folder: ResultsFolder) -> None:
    """Refuse to compute here what other processors have begun.

    Apart from `check_folder`, because who submits jobs may sit at another kind of machine.

    Raises:
        MismatchError: this processor rounds otherwise than the folder's.
    """
    if prepared.device.type != "cpu":
        return
    own, found = cpu_arithmetic(), folder.arithmetic()
    if found == "unknown":
        raise MismatchError(
            f"{folder.path} was begun by a quantwm that did not note its processor's arithmetic, "
            f"{own} here, on which its rows depend: run the study into another folder (--out)"
        )
    if found not in (None, own):
        raise MismatchError(
            f"{folder.path} is computed on processors with {found}, this one computes with {own}: "
            "they round otherwise, so that rows of both would not compare. Work on a machine like "
            "the first, or run the study here into another folder (--out)."
        )


def settle_arithmetic(prepared: Prepared, folder: ResultsFolder) -> None:
    """Say with which arithmetic a folder is computed, if this worker is the first.

    Raises:
        MismatchError: another one was, and its processor rounds otherwise.
        QuantWMError: the folder cannot be written.
    """
    check_arithmetic(prepared, folder)
    if prepared.device.type == "cpu":
        folder.settle_arithmetic(cpu_arithmetic())
        check_arithmetic(prepared, folder)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"
