"""A study as a YAML file: which arms plan in which task, and under which settings."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quantwm.calibration import DEFAULT_EPISODES, DEFAULT_SAMPLES
from quantwm.checks import is_integer, is_number, parsed
from quantwm.compute import DTYPES, parse_bytes
from quantwm.envs import TASKS
from quantwm.errors import UsageError, unknown_name
from quantwm.planning.cem import CEM
from quantwm.planning.defaults import default_iterations
from quantwm.planning.planners import PLANNERS
from quantwm.quant import LayerScheme
from quantwm.seeds import BLOCKS, MAX_EPISODES, MAX_SEED, SeedBlock
from quantwm.study.arms import Arm, parse_arms

VERSION = 1
RECORD = "record"
"""Key under which a results folder's `config.yaml` notes where it ran; no part of the study."""
DEVICES = ("auto", "cpu", "cuda")
GATE = 0.7
GATES = {"pusht": 0.3}
"""The float gate of tasks where success is bounded far below 1 without any quantization."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How the arms that need it are calibrated.

    Attributes:
        episodes: calibration episodes that the float model plans in.
        samples: observations with a candidate rollout kept of them.
        seed: of the calibration block, which no evaluation meets.
    """

    episodes: int = DEFAULT_EPISODES
    samples: int = DEFAULT_SAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("calibration.episodes", self.episodes, 1, MAX_EPISODES)
        _check_integer("calibration.samples", self.samples, 1)
        _check_integer("calibration.seed", self.seed, 0, MAX_SEED - 1)


@dataclass(frozen=True)
class DiagnosticsSettings:
    """Which diagnoses a study adds to its rows, in `diagnostics/` of its folder.

    Attributes:
        fidelity: of every quantized arm of the study's own budget, against float: drift of what is
            imagined, and how well the costs of candidates keep their order.
        sensitivity: schemes; for each, every layer of the model alone is quantized to it.
        episodes: of the tuning block, whose candidates are looked at.
    """

    fidelity: bool = False
    sensitivity: tuple[str, ...] = ()
    episodes: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.fidelity, bool):
            raise UsageError(f"diagnostics.fidelity must be true or false, got {self.fidelity!r}")
        schemes = self.sensitivity
        if not isinstance(schemes, str | list | tuple):
            raise UsageError(f"diagnostics.sensitivity must list schemes, got {schemes!r}")
        listed = (schemes,) if isinstance(schemes, str) else tuple(schemes)
        object.__setattr__(self, "sensitivity", listed)
        for scheme in listed:
            LayerScheme.parse(scheme)
        _check_integer("diagnostics.episodes", self.episodes, 1, MAX_EPISODES)

    def to_dict(self) -> dict[str, Any]:
        """The settings as YAML and JSON values."""
        return {**vars(self), "sensitivity": list(self.sensitivity)}


@dataclass(frozen=True)
class StudySpec:
    """A study, validated.

    Attributes:
        task: the task's name, and settings such as its layout: {"name": "wall", "door_y": 20}.
        model: name of a bundled world model, or the folder of one.
        arms: what is compared, in the order of the tables.
        name: of the study; a label.
        episodes: episodes an arm; every arm meets the same.
        seed: which episodes of the block.
        block: the seed block (`quantwm.seeds.BLOCKS`).
        mpc_iterations: replans an episode at most; where none are given, the task's default of
            the planner's preset.
        planner: planner settings that differ from the default planner of the task; the key
            `preset` ("compact" or "paper") picks which default.
        calibration: for the arms that need one.
        diagnostics: what is diagnosed besides. Changes no row.
        dtype, device: compute type and device; "auto" picks (`quantwm.evaluation`).
        threads: CPU threads of torch; None leaves torch's own number.
        memory_budget: what rollouts in flight may take, such as "2GB"; None takes half of what
            is free. Changes no row.
        gate: the least success of the float arm that other arms are compared with; 0 turns the
            gate off. It counts only where the study has a float arm. Where none is given, 0.7;
            in PushT, where the true dynamics do not help far either (docs/pusht.md), 0.3.
    """

    task: Mapping[str, Any]
    model: str
    arms: tuple[Arm, ...]
    name: str = "study"
    episodes: int = 50
    seed: int = 1
    block: SeedBlock = "evaluation"
    mpc_iterations: int = None  # type: ignore[assignment]  # an integer once it is built
    planner: Mapping[str, Any] = field(default_factory=dict)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    diagnostics: DiagnosticsSettings = field(default_factory=DiagnosticsSettings)
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    memory_budget: str | int | None = None
    gate: float = None  # type: ignore[assignment]  # a number once it is built
    _derived: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    """Settings that nobody gave: another task or planner would change them."""

    def __post_init__(self) -> None:
        if not isinstance(self.task.get("name"), str):
            raise UsageError(f"task needs a name, got {dict(self.task)!r}")
        _check_text("model", self.model)
        _check_text("name", self.name)
        _check_integer("episodes", self.episodes, 1, MAX_EPISODES)
        _check_integer("seed", self.seed, 0, MAX_SEED - 1)
        if self.mpc_iterations is None:
            own = default_iterations(self.task["name"], self.planner.get("preset", "compact"))
            self._derive("mpc_iterations", own)
        _check_integer("mpc_iterations", self.mpc_iterations, 1)
        if self.gate is None:
            self._derive("gate", GATES.get(self.task["name"], GATE))
        if self.block not in BLOCKS:
            raise unknown_name("seed block", str(self.block), BLOCKS)
        if self.threads is not None:
            _check_integer("threads", self.threads, 1)
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if self.dtype not in ("auto", *DTYPES):
            raise unknown_name("dtype", str(self.dtype), ("auto", *DTYPES))
        if str(self.device).partition(":")[0] not in DEVICES:
            raise unknown_name("device", str(self.device), DEVICES)
        if not is_number(self.gate) or not 0 <= self.gate <= 1:
            raise UsageError(f"gate must be a success rate, 0 to 1, got {self.gate!r}")

    def _derive(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_derived", (*self._derived, name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudySpec":
        """A study from plain values, as `to_dict` gives them or a person writes them.

        Short forms are taken: the task's name alone, arms as strings, no version.

        Raises:
            UsageError: an unknown key (with the nearest known), a missing one, or a bad value.
        """
        recorded = RECORD in values
        values = {key: value for key, value in values.items() if key != RECORD}
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise UsageError(
                f"the study has version {version!r}, this quantwm reads {VERSION}; "
                "install the quantwm that wrote it"
            )
        _check_keys("study setting", values, _settings())
        for required in ("task", "model", "arms"):
            if required not in values:
                raise UsageError(f"the study lacks {required!r}")
        task = values["task"]
        values["task"] = {"name": task} if isinstance(task, str) else _mapping("task", task)
        values["planner"] = _mapping("planner", values.get("planner", {}))
        if not recorded:  # what has run may have planned with a task or planner of one's own
            _check_own_settings(values["task"], values["planner"])
        for key, settings in (
            ("calibration", CalibrationSettings),
            ("diagnostics", DiagnosticsSettings),
        ):
            inner = _mapping(key, values.get(key, {}))
            _check_keys(f"{key} setting", inner, [one.name for one in fields(settings)])
            values[key] = settings(**inner)
        values["arms"] = parse_arms(values["arms"])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "StudySpec":
        """Read a study file; a results folder's `config.yaml` is one.

        Raises:
            UsageError: the file is missing, no YAML mapping, or a setting is wrong or given
                twice.
        """
        try:
            text = Path(path).read_text()
            values = yaml.safe_load(text)
        except OSError as error:
            raise UsageError(f"cannot read the study {path}: {error.strerror or error}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(f"{path} is no YAML: {error}") from error
        for key in _repeated(yaml.compose(text)):
            line = key.start_mark.line + 1
            raise UsageError(f"{path}, line {line}: {key.value!r} is given twice; leave one")
        if not isinstance(values, dict):
            raise UsageError(f"{path} must map settings to values, as in 'episodes: 16'")
        try:
            return cls.from_dict(values)
        except UsageError as error:
            line = None if error.name is None else _line_of(error.name, text)
            place = path if line is None else f"{path}, line {line}"
            raise type(error)(f"{place}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Every setting in its full form, as YAML and JSON values."""
        values: dict[str, Any] = {"version": VERSION, "name": self.name}
        for name in _settings():
            values.setdefault(name, getattr(self, name))
        values["task"], values["planner"] = dict(self.task), dict(self.planner)
        values["arms"] = [arm.to_dict() for arm in self.arms]
        values["calibration"] = dict(vars(self.calibration))
        values["diagnostics"] = self.diagnostics.to_dict()
        return values

    def to_yaml(self) -> str:
        """The study as the text of a YAML file, every setting in its full form."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100)

    def with_overrides(self, overrides: Iterable[str]) -> "StudySpec":
        """The study with settings replaced, each given as `key=value`.

        Keys are those of the YAML file, dotted where nested (`planner.samples=64`,
        `task.door_y=20`); values are YAML. `arms=float,w4,w2` gives another list of arms. What
        the study left to the task and the planner follows theirs.

        Raises:
            UsageError: no `=`, an unknown key (with the nearest known), a key given twice, or a
                bad value.
        """
        values = {key: value for key, value in self.to_dict().items() if key not in self._derived}
        given: set[str] = set()
        for override in overrides:
            key, equals, text = override.partition("=")
            key = key.strip()
            if not equals or not key:
                raise UsageError(f"an override is KEY=VALUE, such as episodes=32; got {override!r}")
            if key in given:
                raise UsageError(
                    f"{key!r} is given twice; if its value has braces, quote it, or the shell "
                    f"makes several words of it: '{key}=...'"
                )
            given.add(key)
            _override(values, key.split("."), parsed(text, override))
        return StudySpec.from_dict(values)


def presets() -> list[str]:
    """Names of the studies that ship with quantwm."""
    folder = resources.files("quantwm.study") / "presets"
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_preset(name: str, task: str) -> StudySpec:
    """A study that ships with quantwm, for a task and the world model bundled for it.

    A preset's `by_task` names settings that differ in some tasks.

    Raises:
        UsageError: no such preset; lists what exists.
    """
    if name not in presets():
        raise unknown_name("preset", name, presets())
    text = (resources.files("quantwm.study") / "presets" / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    own = values.pop("by_task", {}).get(task, {})
    return StudySpec.from_dict(values | own | {"task": task, "model": task})


def _settings() -> list[str]:
    """Names of a study's settings."""
    return [one.name for one in fields(StudySpec) if one.init]


def _override(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a dotted key; a whole mapping may be replaced, `task=NAME` stays a short form."""
    head, *rest = path
    if head not in _settings():
        raise unknown_name("study setting", head, _settings())
    if not rest:
        values[head] = value
        return
    inner = values.get(head)
    if head not in ("task", "planner", "calibration", "diagnostics") or not isinstance(inner, dict):
        raise UsageError(f"{'.'.join(path)!r}: {head!r} holds no settings of its own")
    inner[".".join(rest)] = value


def _line_of(name: str, text: str) -> int | None:
    """The line, from 1, of the first key or value in a YAML text that is, or contains, a name."""
    scalars = list(_scalars(yaml.compose(text)))
    exact = (node for node in scalars if node.value == name)
    inside = (node for node in scalars if name in node.value)
    found = next(exact, None) or next(inside, None)
    return None if found is None else int(found.start_mark.line) + 1


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _scalars(key)
            yield from _scalars(value)


def _repeated(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Keys of a YAML text that their mapping has already: YAML takes the last one silently."""
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, _ in children:
            if (key.tag, str(key.value)) in seen:
                yield key
            seen.add((key.tag, str(key.value)))
        children = [value for _, value in children]
    for child in children:
        yield from _repeated(child)


def _check_own_settings(task: Mapping[str, Any], planner: Mapping[str, Any]) -> None:
    """Refuse settings that a task or planner of quantwm does not have."""
    name = str(task.get("name"))
    if name in TASKS:
        known = ["name", "version", *inspect.signature(TASKS[name]).parameters]
        _check_keys(f"{name} setting", task, known)
    name = str(planner.get("name", CEM.name))
    if name in PLANNERS:
        known = ["name", "preset", *(one.name for one in fields(PLANNERS[name]))]
        _check_keys(f"{name} setting", planner, known)


def _check_keys(kind: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise unknown_name(kind, str(key), known)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} must map settings to values, got {value!r}")
    return dict(value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} must be a text, got {value!r}")


def _check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Accept an integer in range; `True` and 1.0 are none."""
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    if not is_integer(value, least) or (most is not None and value > most):
        raise UsageError(f"{name} must be an integer, {wanted}, got {value!r}")
