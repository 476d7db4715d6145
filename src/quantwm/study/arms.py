"""The arms of a study: what each is called, and how it is written in a study file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantwm.checks import is_integer, parsed
from quantwm.errors import PlanError, UsageError, unknown_name
from quantwm.methods import get_method, resolve_plan
from quantwm.protocols import WorldModel
from quantwm.quant import LayerScheme, QuantPlan
from quantwm.study.cells import WITHOUT_PLAN, ArmKind

EACH_BLOCK = "each_block"
"""Side of an arm that stands for one arm a transformer block of the study's model."""
SIDES = ("encoder", "predictor", EACH_BLOCK)
EXAMPLES = ("w8", "w8a8", "w8a8-token", "w4", "w4g128", "w4a4", "w4a4-token", "w3", "w2")
"""Short names that an error lists; the grammar has more (`quantwm.quant.LayerScheme`)."""
LONGER_EXAMPLES = ("encoder:w4", "predictor:w4", "w4@gptq", "oracle-latent:w4")
FOLDER = "folder:"
"""Before the path of a saved quantized model, in an arm's short form."""
MAPPING_KEYS = (
    "name",
    "kind",
    "plan",
    "method",
    "include",
    "options",
    "folder",
    "planner",
    "mpc_iterations",
)
_PLAN_KEYS = ("plan", "method", "include", "options")
_ITERATIONS = "mpc_iterations"
_QUANTIZED_ORACLE = "oracle-latent:"
_COMMA = re.compile(r",(?![^{]*\})")


@dataclass(frozen=True)
class Arm:
    """One arm: a name, and a reference, the float model or a quantization plan.

    Attributes:
        name: unique within a study; shown in tables and plots.
        kind: one of the references, "float" or "quantized".
        plan: how the float model is quantized; None for "float", "oracle-state" and "random". An
            "oracle-latent" with a plan encodes with the quantized model.
        folder: of a quantized model that was saved; it takes the place of a plan.
        planner: planner settings in which this arm differs from its study.
        mpc_iterations: replans an episode, where this arm differs from its study.
    """

    name: str
    kind: ArmKind
    plan: QuantPlan | None = None
    folder: str | None = None
    planner: Mapping[str, Any] = field(default_factory=dict)
    mpc_iterations: int | None = None

    def __post_init__(self) -> None:
        if self.mpc_iterations is not None and not is_integer(self.mpc_iterations, 1):
            raise UsageError(
                f"arm {self.name!r}: mpc_iterations must be an integer, at least 1, got "
                f"{self.mpc_iterations!r}"
            )

    def budget(self) -> dict[str, Any]:
        """What the arm plans with where it differs from its study."""
        own = {} if self.mpc_iterations is None else {_ITERATIONS: self.mpc_iterations}
        return {**self.planner, **own}

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """An arm from its short form, `[name=]what[/setting=value...]`.

        `what` is "oracle-state", "oracle-latent", "random", "float", the short name of a
        quantization ("w4g128": every quantizable layer), or that of one side, or a block of it,
        with the rest in float ("encoder:w3", "predictor.blocks.0:w3"), or one arm a block of the
        model ("each_block:w3"); a quantization may name its method
        ("w4@gptq", "encoder:w3@smoothquant+gptq"), round-to-nearest otherwise. "oracle-latent:w3"
        is the oracle that encodes with the quantized model. "folder:PATH" is a quantized model that
        `quantwm quantize` wrote, made from the study's float model. Settings are planner settings
        or `mpc_iterations` in which the arm differs from its study: "w3/steps=20".

        Raises:
            UsageError: not a known arm; suggests the nearest.
        """
        label, what, budget = _split(text)
        name = text.strip() if label is None else label
        if not name:
            raise UsageError(f"arm {text!r} has an empty name; write NAME=ARM or only ARM")
        iterations = budget.pop(_ITERATIONS, None)
        settings: dict[str, Any] = {"planner": budget, _ITERATIONS: iterations}
        for kind_alone in WITHOUT_PLAN:
            if what == kind_alone:
                return cls(name, kind_alone, **settings)
        if what.startswith(FOLDER):
            return cls(name, "quantized", folder=what.removeprefix(FOLDER), **settings)
        kind: ArmKind = "oracle-latent" if what.startswith(_QUANTIZED_ORACLE) else "quantized"
        plan = _parse_plan(text, what.removeprefix(_QUANTIZED_ORACLE))
        return cls(name, kind, plan, **settings)

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
        planner = value.get("planner") or {}
        if not isinstance(planner, Mapping):
            raise UsageError(f"arm {name!r}: planner must map settings to values, got {planner!r}")
        budget: dict[str, Any] = {
            "planner": dict(planner),
            _ITERATIONS: value.get(_ITERATIONS),
        }
        if kind in WITHOUT_PLAN and not (kind == "oracle-latent" and "plan" in value):
            return cls._reference(name, kind, value, budget)
        if kind not in ("quantized", "oracle-latent"):
            raise unknown_name(f"kind of arm {name!r}:", str(kind), (*WITHOUT_PLAN, "quantized"))
        if "folder" in value:
            return cls._saved(name, value, budget)
        plan = value.get("plan")
        if not isinstance(plan, str | Mapping):
            raise UsageError(
                f"arm {name!r} needs a plan: layer patterns with their schemes, such as "
                "{'encoder.*': 'w8a8', 'predictor.*': 'w4g128'}"
            )
        return cls(
            name,
            kind,
            QuantPlan(
                {"*": plan} if isinstance(plan, str) else plan,
                method=value.get("method", "rtn"),
                include=value.get("include") or (),
                options=value.get("options"),
            ),
            **budget,
        )

    @classmethod
    def _saved(cls, name: str, value: Mapping[str, Any], budget: Mapping[str, Any]) -> "Arm":
        surplus = [key for key in _PLAN_KEYS if key in value]
        if surplus:
            raise UsageError(
                f"arm {name!r} is a saved model, which knows how it was quantized: leave out "
                f"{', '.join(surplus)}"
            )
        return cls(name, "quantized", folder=str(value["folder"]), **budget)

    @classmethod
    def _reference(
        cls, name: str, kind: ArmKind, value: Mapping[str, Any], budget: Mapping[str, Any]
    ) -> "Arm":
        surplus = [key for key in (*_PLAN_KEYS, "folder") if key in value]
        if surplus:
            raise UsageError(f"arm {name!r} of kind {kind!r} takes no {', '.join(surplus)}")
        return cls(name, kind, **budget)

    def to_dict(self) -> dict[str, Any]:
        """The full form, which `from_value` reads."""
        form: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.folder is not None:
            form["folder"] = self.folder
        elif self.plan is not None:
            plan = self.plan.to_dict()
            form["plan"] = plan["layers"]
            form |= {key: plan[key] for key in ("method", "include", "options")}
        if self.planner:
            form["planner"] = dict(self.planner)
        if self.mpc_iterations is not None:
            form[_ITERATIONS] = self.mpc_iterations
        return form


def parse_arms(values: Any) -> tuple[Arm, ...]:
    """All arms of a study; a string is split at commas outside braces.

    Braces make a grid, as a shell's do: "w{4,3}{,g128}{,@gptq}" is eight arms.

    Raises:
        UsageError: lists every arm that is wrong, and names given twice.
    """
    if isinstance(values, str):
        values = [part for part in _COMMA.split(values) if part.strip()]
    if not isinstance(values, Sequence) or not values:
        raise UsageError(f"a study needs a list of arms, got {values!r}")
    arms: list[Arm] = []
    problems: list[UsageError] = []
    for value in values:
        try:
            forms = list(expanded(value)) if isinstance(value, str) else [value]
        except UsageError as error:
            problems.append(error)
            continue
        for form in forms:
            try:
                arms.append(Arm.from_value(form))
            except UsageError as error:
                problems.append(error)
    problems += _repeated_names(arms)
    if problems:
        raise _together(problems)
    return tuple(arms)


def expanded(text: str) -> Iterator[str]:
    """The texts that braces stand for, leftmost braces slowest: "a{1,2}" is "a1", "a2".

    Raises:
        UsageError: braces that are not closed, or an empty pair of them.
    """
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        if set("{}") & set(text):
            raise UsageError(f"arm {text!r} has a brace without its pair")
        yield text
        return
    if not match[1].strip():
        raise UsageError(f"arm {text!r} has nothing between its braces, so the grid is empty")
    for choice in match[1].split(","):
        yield from expanded(text[: match.start()] + choice.strip() + text[match.end() :])


def float_arm(arms: Sequence[Arm]) -> Arm | None:
    """The study's float arm: the first one, of the study's own budget if there is such a one."""
    floats = [one for one in arms if one.kind == "float"]
    return min(floats, key=lambda one: bool(one.budget()), default=None)


def reference_arm(arms: Sequence[Arm], arm: Arm) -> Arm | None:
    """The float arm that an arm is compared with: that of the same budget, else the study's.

    None for the study's float arm itself, and where there is none.
    """
    own = float_arm(arms)
    if arm == own:
        return None
    same = (one for one in arms if one.kind == "float" and one.budget() == arm.budget())
    return own if arm.kind == "float" else next(same, own)


def with_blocks(arms: Sequence[Arm], world_model: WorldModel) -> tuple[Arm, ...]:
    """The arms, with each "each_block:..." replaced by one arm a block of the model.

    Where a block has this very arm already, it gets no other.

    Raises:
        UsageError: lists names that two different arms have then.
    """
    groups = [group for group in world_model.quantizable_groups() if group.kind == "linear"]
    blocks = list(dict.fromkeys(group.block for group in groups))
    replaced: list[Arm] = []
    for arm in arms:
        if arm.plan is None or f"{EACH_BLOCK}.*" not in dict(arm.plan.layers):
            replaced.append(arm)
            continue
        for block in blocks:
            layers = {
                pattern.replace(EACH_BLOCK, block): scheme for pattern, scheme in arm.plan.layers
            }
            plan = QuantPlan(layers, arm.plan.method, arm.plan.include, dict(arm.plan.options))
            name = (
                arm.name.replace(EACH_BLOCK, block)
                if EACH_BLOCK in arm.name
                else f"{arm.name} {block}"
            )
            one = replace(arm, name=name, plan=plan)
            if one not in arms and one not in replaced:
                replaced.append(one)
    if problems := _repeated_names(replaced):
        raise _together(problems)
    return tuple(replaced)


def resolve_arms(arms: Sequence[Arm], world_model: WorldModel) -> dict[str, dict[str, LayerScheme]]:
    """Each arm's layers and their schemes; empty for the references and the float model.

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


def _split(text: str) -> tuple[str | None, str, dict[str, Any]]:
    """An arm's label, if it has one, what it is, and the settings after its slashes."""
    before, found, path = text.partition(FOLDER)
    label, equals, rest = before.strip().rpartition("=")
    if found and not rest.strip():  # a path may hold slashes and equals signs
        return (label.strip() if equals else None), f"{FOLDER}{path.strip()}", {}
    head, *settings = text.split("/")
    label, equals, what = head.strip().rpartition("=")
    budget: dict[str, Any] = {}
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found or not key.strip():
            raise UsageError(
                f"arm {text!r}: {setting!r} is no SETTING=VALUE; write it as in 'w3/steps=20'"
            )
        budget[key.strip()] = parsed(value, text)
    return (label.strip() if equals else None), what.strip(), budget


def _parse_plan(arm: str, what: str) -> QuantPlan:
    """The plan of "[side:]scheme[@method]", where a side may be a part of one."""
    quantization, at, method = what.partition("@")
    side, colon, scheme = quantization.rpartition(":")
    if colon and side.partition(".")[0] not in SIDES:
        raise unknown_name(f"side of arm {arm!r}:", side, SIDES)
    if not re.match(r"[wa]\d", scheme):
        raise unknown_name("arm", what, (*WITHOUT_PLAN, *EXAMPLES, *LONGER_EXAMPLES))
    if at:
        get_method(method)
    return QuantPlan({f"{side}.*" if colon else "*": scheme}, method if at else "rtn")


def _repeated_names(arms: Sequence[Arm]) -> list[UsageError]:
    names = [arm.name for arm in arms]
    return [
        UsageError(
            f"{names.count(name)} arms are called {name!r}; "
            f"name one otherwise, as in 'again={name}'"
        )
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]


def _together(problems: Sequence[UsageError]) -> UsageError:
    if len(problems) == 1:
        return problems[0]
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return UsageError(f"{len(problems)} problems with the study's arms:\n{listed}")
