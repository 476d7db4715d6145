"""The arms of a study: what each is called, and how it is written in a study file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantwm.errors import PlanError, UsageError, unknown_name
from quantwm.methods import get_method, resolve_plan
from quantwm.protocols import WorldModel
from quantwm.quant import LayerScheme, QuantPlan
from quantwm.study.cells import REFERENCES, ArmKind

SIDES = ("encoder", "predictor")
EXAMPLES = ("w8", "w8a8", "w8a8-token", "w4", "w4g128", "w4a4", "w4a4-token", "w3", "w2")
"""Short names that an error lists; the grammar has more (`quantwm.quant.LayerScheme`)."""
LONGER_EXAMPLES = ("encoder:w4", "predictor:w4", "w4@gptq")
FOLDER = "folder:"
"""Before the path of a saved quantized model, in an arm's short form."""
MAPPING_KEYS = ("name", "kind", "plan", "method", "include", "options", "folder")


@dataclass(frozen=True)
class Arm:
    """One arm: a name, and an oracle, the float model or a quantization plan.

    Attributes:
        name: unique within a study; shown in tables and plots.
        kind: one of the oracles, "float" or "quantized".
        plan: how the float model is quantized; None unless `kind` is "quantized".
        folder: of a quantized model that was saved; it takes the place of a plan.
    """

    name: str
    kind: ArmKind
    plan: QuantPlan | None = None
    folder: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """An arm from its short form, `[name=]what`.

        `what` is "oracle-state", "oracle-latent", "float", the short name of a quantization
        ("w4g128": every quantizable layer), or that of one side with the other left in float
        ("encoder:w3", "predictor:w3"); a quantization may name its method ("w4@gptq",
        "encoder:w3@smoothquant+gptq"), round-to-nearest otherwise. "folder:PATH" is a quantized
        model that `quantwm quantize` wrote, made from the study's float model.

        Raises:
            UsageError: not a known arm; suggests the nearest.
        """
        label, equals, what = text.strip().rpartition("=")
        what = what.strip()
        name = label.strip() if equals else what
        if not name:
            raise UsageError(f"arm {text!r} has an empty name; write NAME=ARM or only ARM")
        for reference in REFERENCES:
            if what == reference:
                return cls(name, reference)
        if what.startswith(FOLDER):
            return cls(name, "quantized", folder=what.removeprefix(FOLDER))
        quantization, at, method = what.partition("@")
        side, colon, scheme = quantization.rpartition(":")
        if colon and side not in SIDES:
            raise unknown_name(f"side of arm {text!r}:", side, SIDES)
        if not re.match(r"[wa]\d", scheme):
            raise unknown_name("arm", what, (*REFERENCES, *EXAMPLES, *LONGER_EXAMPLES))
        if at:
            get_method(method)
        plan = QuantPlan({f"{side}.*" if colon else "*": scheme}, method if at else "rtn")
        return cls(name, "quantized", plan)

    @classmethod
    def from_value(cls, value: Any) -> "Arm":
        """An arm as a study file gives it: a short form, or a mapping of `MAPPING_KEYS`.

        In a mapping, `plan` maps layer patterns to schemes (or is the short name of one scheme
        for every layer); `method`, `include` and `options` are those of `QuantPlan`.

        Raises:
            UsageError: a key or a value is wrong.
        """
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping):
            raise UsageError(f"an arm is a string or a mapping, got {value!r}")
        for key in value:
            if key not in MAPPING_KEYS:
                raise unknown_name(
                    f"key of arm {value.get('name', '?')!r}:", str(key), MAPPING_KEYS
                )
        name, kind = value.get("name"), value.get("kind", "quantized")
        if not isinstance(name, str) or not name:
            raise UsageError(f"an arm given as a mapping needs a name, got {dict(value)!r}")
        if kind in REFERENCES:
            return cls._reference(name, kind, value)
        if kind != "quantized":
            raise unknown_name(f"kind of arm {name!r}:", str(kind), (*REFERENCES, "quantized"))
        if "folder" in value:
            return cls._saved(name, value)
        plan = value.get("plan")
        if not isinstance(plan, str | Mapping):
            raise UsageError(
                f"arm {name!r} needs a plan: layer patterns with their schemes, such as "
                "{'encoder.*': 'w8a8', 'predictor.*': 'w4g128'}"
            )
        return cls(
            name,
            "quantized",
            QuantPlan(
                {"*": plan} if isinstance(plan, str) else plan,
                method=value.get("method", "rtn"),
                include=value.get("include") or (),
                options=value.get("options"),
            ),
        )

    @classmethod
    def _saved(cls, name: str, value: Mapping[str, Any]) -> "Arm":
        surplus = [key for key in ("plan", "method", "include", "options") if key in value]
        if surplus:
            raise UsageError(
                f"arm {name!r} is a saved model, which knows how it was quantized: leave out "
                f"{', '.join(surplus)}"
            )
        return cls(name, "quantized", folder=str(value["folder"]))

    @classmethod
    def _reference(cls, name: str, kind: ArmKind, value: Mapping[str, Any]) -> "Arm":
        surplus = [key for key in MAPPING_KEYS[2:] if key in value]
        if surplus:
            raise UsageError(f"arm {name!r} of kind {kind!r} takes no {', '.join(surplus)}")
        return cls(name, kind)

    def to_dict(self) -> dict[str, Any]:
        """The full form, which `from_value` reads."""
        if self.folder is not None:
            return {"name": self.name, "kind": self.kind, "folder": self.folder}
        if self.plan is None:
            return {"name": self.name, "kind": self.kind}
        plan = self.plan.to_dict()
        form = {"name": self.name, "kind": self.kind, "plan": plan["layers"]}
        return form | {key: plan[key] for key in ("method", "include", "options")}


def parse_arms(values: Any) -> tuple[Arm, ...]:
    """All arms of a study; a string is split at commas.

    Raises:
        UsageError: lists every arm that is wrong, and names given twice.
    """
    if isinstance(values, str):
        values = [part for part in values.split(",") if part.strip()]
    if not isinstance(values, Sequence) or not values:
        raise UsageError(f"a study needs a list of arms, got {values!r}")
    arms: list[Arm] = []
    problems: list[str] = []
    for value in values:
        try:
            arms.append(Arm.from_value(value))
        except UsageError as error:
            problems.append(str(error))
    names = [arm.name for arm in arms]
    problems += [
        f"{names.count(name)} arms are called {name!r}; name one otherwise, as in 'again={name}'"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise _together(problems)
    return tuple(arms)


def resolve_arms(arms: Sequence[Arm], world_model: WorldModel) -> dict[str, dict[str, LayerScheme]]:
    """Each arm's layers and their schemes; empty for the oracles and the float model.

    Raises:
        PlanError: lists the problems of all arms.
    """
    resolved: dict[str, dict[str, LayerScheme]] = {}
    problems: list[str] = []
    for arm in arms:
        resolved[arm.name] = {}
        if arm.plan is None:
            continue
        try:
            resolved[arm.name] = resolve_plan(arm.plan, world_model)
        except UsageError as error:
            problems.append(f"arm {arm.name!r}: {error}")
    if problems:
        raise PlanError("\n".join(problems))
    return resolved


def _together(problems: Sequence[str]) -> UsageError:
    if len(problems) == 1:
        return UsageError(problems[0])
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return UsageError(f"{len(problems)} problems with the study's arms:\n{listed}")
