"""Which layer of a world model gets which scheme, by name pattern."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from torch import nn

from quantwm.errors import PlanError, UsageError, unknown_name
from quantwm.protocols import GroupKind, WorldModel
from quantwm.quant.scheme import LayerScheme, PerGroup

PLAN_VERSION = 1
_WILDCARD = re.compile(r"[*?]|\[!?\]?[^\]]*\]")
_OPTIONAL_KINDS = tuple(kind for kind in get_args(GroupKind) if kind != "linear")


@dataclass(frozen=True, init=False)
class QuantPlan:
    """Schemes by layer name, and the method that carries them out.

    Patterns are matched as file names are (`*`, `?`, `[...]`) against dotted layer names; `*`
    also matches dots. Where several patterns match a layer the most specific wins: a pattern
    without wildcards first, then the one with the most characters outside wildcards (a bracket
    is one wildcard). Two equally specific patterns with different schemes are an error, so the
    order in which patterns are written never matters. Layers that no pattern matches, and
    layers given "float", stay as they are.

    Args:
        layers: pattern → short name ("w4g128"), full form or `LayerScheme`.
        method: name of a registered method.
        include: kinds of layers besides linears that patterns may reach: "patch_embedding",
            "attention_matmul".
        options: the method's own settings, JSON values.

    Raises:
        UsageError: no pattern, an unreadable scheme or an unknown kind.
    """

    layers: tuple[tuple[str, LayerScheme], ...]
    method: str
    include: tuple[GroupKind, ...]
    options: tuple[tuple[str, Any], ...]

    def __init__(
        self,
        layers: Mapping[str, str | Mapping[str, Any] | LayerScheme],
        method: str = "rtn",
        include: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(layers, Mapping) or not layers:
            raise UsageError(
                "a plan maps at least one layer pattern to a scheme, such as "
                f"{{'encoder.*': 'w8a8'}}; got {layers!r}"
            )
        if not isinstance(method, str) or not method:
            raise UsageError(f"a plan's method is a name such as 'gptq', got {method!r}")
        if isinstance(include, Mapping) or not isinstance(include, Iterable):
            raise UsageError(f"a plan's include is a list of kinds of layers, got {include!r}")
        named = options is None or (
            isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
        )
        if not named:
            raise UsageError(
                f"a plan's options map names to values, as in {{'alpha': 0.5}}; got {options!r}"
            )
        kinds = {include} if isinstance(include, str) else set(include)
        for kind in kinds:
            if kind not in _OPTIONAL_KINDS:
                raise unknown_name("kind of layer to include", str(kind), _OPTIONAL_KINDS)
        schemes = {str(pattern): _parse_scheme(pattern, value) for pattern, value in layers.items()}
        object.__setattr__(self, "layers", tuple(sorted(schemes.items(), key=lambda item: item[0])))
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "include", tuple(sorted(kinds)))
        frozen = tuple(
            sorted((name, _freeze(name, value)) for name, value in (options or {}).items())
        )
        object.__setattr__(self, "options", frozen)

    @classmethod
    def parse(
        cls, value: "str | Mapping[str, Any] | QuantPlan", method: str = "rtn"
    ) -> "QuantPlan":
        """A plan from text, a mapping or itself.

        Args:
            value: "w4g128" for all layers, "encoder.*=w8a8, predictor.*=w4g128" by pattern, a
                mapping of patterns to schemes, or the form that `to_dict` gives.
            method: for text and mappings of patterns; the other forms name their own.

        Raises:
            UsageError: it describes no plan.
        """
        if isinstance(value, QuantPlan):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value) if "layers" in value else cls(value, method)
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"a plan is a text such as 'w4g128' or a mapping, got {value!r}")
        if "=" not in value:
            return cls({"*": value.strip()}, method)
        layers: dict[str, str] = {}
        for part in value.split(","):
            pattern, equals, scheme = (piece.strip() for piece in part.partition("="))
            if not (pattern and equals and scheme):
                raise UsageError(f"cannot read {part!r} in the plan {value!r}: pattern=scheme")
            if pattern in layers:
                raise UsageError(f"the pattern {pattern!r} is written twice in the plan {value!r}")
            layers[pattern] = scheme
        return cls(layers, method)

    def __str__(self) -> str:
        """Schemes as `parse` reads them; method, kinds and options are left out."""
        if len(self.layers) == 1 and self.layers[0][0] == "*":
            return str(self.layers[0][1])
        return ", ".join(f"{pattern}={scheme}" for pattern, scheme in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, with a version."""
        return {
            "version": PLAN_VERSION,
            "method": self.method,
            "layers": {pattern: str(scheme) for pattern, scheme in self.layers},
            "include": list(self.include),
            "options": {name: _thaw(value) for name, value in self.options},
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> "QuantPlan":
        """The plan that `to_dict` wrote; `version`, `include` and `options` may be left out.

        Raises:
            UsageError: an unknown field, another version or unreadable content.
        """
        known = {"version", "method", "layers", "include", "options"}
        for field in form:
            if field not in known:
                raise unknown_name("field of a plan:", str(field), known)
        if form.get("version", PLAN_VERSION) != PLAN_VERSION:
            raise UsageError(
                f"this plan has version {form['version']!r}; this quantwm reads {PLAN_VERSION}"
            )
        return cls(
            form.get("layers", {}),
            form.get("method", "rtn"),
            form.get("include") or (),
            form.get("options") or {},
        )

    def to_json(self) -> str:
        """One line of JSON; equal plans give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_yaml(self) -> str:
        """The plan as a YAML document."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def load(cls, path: str | Path) -> "QuantPlan":
        """Read a plan from a YAML or JSON file.

        Raises:
            UsageError: no such file, or no plan in it.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"cannot read a plan from {path}: {error}") from error
        return cls.parse(content)

    def resolve(self, world_model: WorldModel) -> dict[str, LayerScheme]:
        """The scheme of each layer that changes, in the model's forward order.

        The method is not looked at: `quantwm.methods.resolve_plan` does that as well.

        Raises:
            PlanError: the plan cannot be applied; the message lists every problem.
        """
        schemes, problems = self.match(world_model)
        if problems:
            raise self.error(problems)
        return schemes

    def match(self, world_model: WorldModel) -> tuple[dict[str, LayerScheme], list[str]]:
        """The scheme of each layer that would change, and everything that stands against it."""
        layers = declared_layers(world_model)
        reachable = [
            name for name, (kind, _) in layers.items() if kind == "linear" or kind in self.include
        ]
        problems = [
            *self._kind_problems({kind for kind, _ in layers.values()}),
            *self._pattern_problems(reachable, list(layers)),
        ]
        schemes: dict[str, LayerScheme] = {}
        affected: dict[str, list[str]] = {}
        for name in reachable:
            best = self._best_matches(name)
            if len({scheme for _, scheme in best}) > 1:
                written = " and ".join(f"{pattern!r} ({scheme})" for pattern, scheme in best)
                problems.append(
                    f"{name}: {written} are equally specific; make one of them more specific"
                )
            elif best and not best[0][1].is_float:
                schemes[name] = best[0][1]
                for problem in _layer_problems(*layers[name], best[0][1]):
                    affected.setdefault(problem, []).append(name)
        problems += [f"{_listed(names)}: {problem}" for problem, names in affected.items()]
        return schemes, problems

    def error(self, problems: Sequence[str]) -> PlanError:
        """An error that lists problems of this plan."""
        listed = "\n".join(f"  - {problem}" for problem in problems)
        return PlanError(f"the plan '{self}' cannot be applied to this model:\n{listed}")

    def _best_matches(self, name: str) -> list[tuple[str, LayerScheme]]:
        matching = [item for item in self.layers if fnmatchcase(name, item[0])]
        top = max((specificity(pattern) for pattern, _ in matching), default=None)
        return [item for item in matching if specificity(item[0]) == top]

    def _kind_problems(self, kinds: set[GroupKind]) -> Iterator[str]:
        for kind in self.include:
            if kind not in kinds:
                yield f"include {kind!r}: this model has no such layers"

    def _pattern_problems(self, reachable: Sequence[str], declared: Sequence[str]) -> Iterator[str]:
        for pattern, _ in self.layers:
            if any(fnmatchcase(name, pattern) for name in reachable):
                continue
            if any(fnmatchcase(name, pattern) for name in declared):
                kinds = " or ".join(repr(kind) for kind in _OPTIONAL_KINDS)
                yield f"pattern {pattern!r} matches only layers that need include ({kinds})"
            else:
                yield f"pattern {pattern!r} matches no layer{_nearest(pattern, reachable)}"


def specificity(pattern: str) -> tuple[bool, int]:
    """How specific a pattern is: (no wildcards, characters outside wildcards); larger wins."""
    literal = _WILDCARD.sub("", pattern)
    return literal == pattern, len(literal)


def declared_layers(world_model: WorldModel) -> dict[str, tuple[GroupKind, nn.Module]]:
    """Kind and module of each layer that the model declares quantizable, in forward order.

    Raises:
        UsageError: the model declares a layer that it does not have, or declares one twice.
    """
    layers: dict[str, tuple[GroupKind, nn.Module]] = {}
    for group in world_model.quantizable_groups():
        for name in group.layers:
            if name in layers:
                raise UsageError(f"quantizable_groups() of this model declares {name!r} twice")
            try:
                layers[name] = (group.kind, world_model.get_submodule(name))
            except AttributeError as error:
                raise UsageError(
                    f"quantizable_groups() of this model declares {name!r}, "
                    f"which does not exist: {error}"
                ) from None
    return layers


def input_width(module: nn.Module) -> int:
    """Inputs of one output channel: of a linear, or of a convolution's flattened patch."""
    if isinstance(module, nn.Linear):
        return module.in_features
    weight = cast(nn.Conv2d, module).weight
    return weight[0].numel()


def _listed(names: Sequence[str]) -> str:
    """Layers that share a problem, the first few by name."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _layer_problems(kind: GroupKind, module: nn.Module, scheme: LayerScheme) -> Iterator[str]:
    """What stands against a layer's scheme, without the layer's name."""
    if kind == "attention_matmul":
        if scheme.weight is not None:
            yield (
                f"an attention matmul has no weights, so {str(scheme)!r} cannot apply; "
                "give it activation bits alone, such as 'a8-token'"
            )
        if type(module) is not nn.Identity:
            yield f"an attention_matmul tap must be nn.Identity, not {_kind_of(module)}"
        return
    if kind == "linear" and not isinstance(module, nn.Linear):
        yield f"is declared linear, but is no nn.Linear: {_kind_of(module)}"
        return
    if kind == "patch_embedding" and not _is_patch_convolution(module):
        yield (
            f"a patch_embedding must be an nn.Conv2d whose kernel equals its stride, "
            f"without padding, dilation or groups, not {_kind_of(module)}"
        )
        return
    granularity = scheme.weight.granularity if scheme.weight is not None else None
    if isinstance(granularity, PerGroup) and granularity.size > input_width(module):
        yield (
            f"group size {granularity.size} is larger than the layer's "
            f"{input_width(module)} inputs; use at most {input_width(module)}, or no groups"
        )


def _is_patch_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == tuple(module.stride)
        and module.padding in {(0, 0), "valid"}
        and tuple(module.dilation) == (1, 1)
        and module.groups == 1
    )


def _kind_of(module: nn.Module) -> str:
    return type(module).__name__


def _nearest(pattern: str, names: Sequence[str]) -> str:
    prefixes = {name[:dot] + ".*" for name in names for dot in range(len(name)) if name[dot] == "."}
    near = difflib.get_close_matches(pattern, sorted({*names, *prefixes}), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; layers are named like {names[0]!r}" if names else ""


def _parse_scheme(pattern: object, value: str | Mapping[str, Any] | LayerScheme) -> LayerScheme:
    try:
        return LayerScheme.parse(value)
    except UsageError as error:
        raise UsageError(f"layer pattern {pattern!r}: {error}") from None


def _freeze(name: str, value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(_freeze(name, item) for item in value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UsageError(f"method option {name!r} must be a number, text or a list, got {value!r}")


def _thaw(value: object) -> object:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value
