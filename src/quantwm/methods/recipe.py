"""A method as plans write it: one part, or several joined by "+", such as "smoothquant+gptq".

The order in which parts are written does not matter: they run in the order of their roles
(`quantwm.methods.roles`), and a role that no part plays is played by round-to-nearest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantwm.errors import UsageError
from quantwm.methods.roles import (
    BlockLearning,
    Checked,
    Clipping,
    Correction,
    InputRange,
    Part,
    Rounding,
    Selective,
    Transform,
)
from quantwm.methods.rtn import RTN
from quantwm.methods.work import Work, blocks_of
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.apply import Progress
from quantwm.quant.observers import CalibrationData
from quantwm.quant.scheme import LayerScheme

_CHOOSE_ALONE = (
    (BlockLearning, "all codes of a block"),
    (Rounding, "the codes"),
    (InputRange, "input ranges"),
    (Correction, "how layers are corrected"),
)
"""Roles that one part of a method can play, with what it chooses."""


@dataclass(frozen=True)
class Recipe:
    """The parts of one method.

    Raises:
        UsageError: a composition that makes no sense, with the reason.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        problems = [*_misfits(self.parts), *self._idle()]
        if problems:
            written = "+".join(part.name for part in self.parts)
            raise UsageError(f"the method {written!r} makes no sense: {'; '.join(problems)}")
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=_position)))

    @property
    def name(self) -> str:
        """The parts in the order in which they run, joined by "+"."""
        return "+".join(part.name for part in self.parts)

    @property
    def needs_calibration(self) -> bool:
        """Whether a part does."""
        return any(part.needs_calibration for part in self.parts)

    def options(self) -> dict[str, Any]:
        """Every part's options as `part.option`, JSON values, defaults included."""
        return {
            f"{part.name}.{key}": value for part in self.parts for key, value in vars(part).items()
        }

    def problems(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """What stands against each part for these layers; every part named."""
        found = []
        for part in self.parts:
            if isinstance(part, Checked):
                problems = part.problems(world_model, schemes, groups)
                found += [f"{part.name}: {problem}" for problem in problems]
        return found

    def apply(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
        calibration: CalibrationData | None,
        progress: Progress | None,
    ) -> dict[str, Any]:
        """Transform the model, then quantize it; see `quantwm.quant.Method`."""
        steps = _Steps(len(self._transforms) + len(blocks_of(schemes, groups)), progress)
        work = Work(world_model, schemes, groups, calibration)
        self.transform(work, steps)
        learner = self._first(BlockLearning)
        if learner is not None:
            self._learn(learner, work, steps)
        else:
            self._round(work, steps)
        return work.report

    def transform(self, work: Work, step: Callable[[], None] = lambda: None) -> None:
        """Run the transforms alone: the model stays float, and its outputs stay what they were."""
        for transform in self._transforms:
            transform.transform(work, self._clipping)
            step()

    def _idle(self) -> Iterator[str]:
        """Options that were set and change nothing; a default cannot be told from nothing said."""
        for part in self.parts:
            idle = part.idle_options(self._clipping) if isinstance(part, Selective) else {}
            for option, reason in idle.items():
                if getattr(part, option) != getattr(type(part), option):
                    yield f"{part.name}.{option} changes nothing, because {reason}; leave it out"

    def _learn(self, learner: BlockLearning, work: Work, step: Callable[[], None]) -> None:
        for block, layers in work.blocks.items():
            floats = _floats(work, layers)
            learner.learn(work, block, self._input_range.observer)
            self._correct(work, floats)
            step()

    def _round(self, work: Work, step: Callable[[], None]) -> None:
        """Block by block, because memory is bounded so and later blocks may depend on earlier."""
        ranges = work.static_ranges(work.layers, self._input_range.observer)
        for layers in work.blocks.values():
            schemes = work.weighted(layers)
            weights = {name: work.weight(name) for name in schemes}
            codes = self._rounding.codes(work, self._clipping.extents(work, weights, schemes))
            floats = _floats(work, layers)
            work.quantize(layers, codes, ranges)
            self._correct(work, floats)
            step()

    def _correct(self, work: Work, floats: Mapping[str, nn.Module]) -> None:
        correction = self._first(Correction)
        if correction is not None:
            correction.correct(work, floats)

    @property
    def _transforms(self) -> list[Transform]:
        return [part for part in self.parts if isinstance(part, Transform)]

    @property
    def _clipping(self) -> Clipping:
        # A part that does nothing but clip is meant where it is named: "awq+omse" clips as OMSE.
        clippings: list[Clipping] = [part for part in self.parts if isinstance(part, Clipping)]
        return next((part for part in clippings if _only_clips(part)), (clippings or [RTN()])[0])

    @property
    def _rounding(self) -> Rounding:
        found = [part for part in self.parts if isinstance(part, Rounding)]
        return next((part for part in found if not isinstance(part, RTN)), RTN())

    @property
    def _input_range(self) -> InputRange:
        found = [part for part in self.parts if isinstance(part, InputRange)]
        return next((part for part in found if not isinstance(part, RTN)), RTN())

    def _first(self, role: type) -> Any:
        return next((part for part in self.parts if isinstance(part, role)), None)


class _Steps:
    """Counts steps for whoever shows progress."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _floats(work: Work, layers: Sequence[str]) -> dict[str, nn.Module]:
    return {name: work.world_model.get_submodule(name) for name in layers}


def _position(part: Part) -> tuple[int, bool, str]:
    roles = (Transform, BlockLearning, Clipping, Rounding, InputRange, Correction)
    role = next(number for number, kind in enumerate(roles) if isinstance(part, kind))
    return role, _says(part, "scales_channels"), part.name


def _says(part: Part, what: str) -> bool:
    """Whether a part has a class variable of that name that is true."""
    return bool(getattr(part, what, False))


def _only_clips(part: object) -> bool:
    """Whether a part chooses ranges of weights and nothing else about them."""
    others = Transform | BlockLearning | Rounding
    return isinstance(part, Clipping) and not isinstance(part, others)


def _misfits(parts: Sequence[Part]) -> Iterator[str]:
    """Why parts do not go together."""
    names = [part.name for part in parts]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"{name!r} is written twice"
    if "rtn" in names and len(set(names)) > 1 and not _completed_by_rtn(parts):
        yield "rtn is what is done where no other part chooses; leave it out"
    rivals = sorted({part.name for part in parts if _says(part, "scales_channels")})
    if len(rivals) > 1:
        yield f"{' and '.join(rivals)} scale the same channels; take one of them"
    others = [part for part in parts if not isinstance(part, RTN)]
    chosen = {what: {p.name for p in others if isinstance(p, role)} for role, what in _CHOOSE_ALONE}
    chosen["the ranges of weights"] = {part.name for part in others if _only_clips(part)}
    for what, several in chosen.items():
        if len(several) > 1:
            yield f"{' and '.join(sorted(several))} both choose {what}; take one of them"
    learners = [part.name for part in others if isinstance(part, BlockLearning)]
    choosers = [
        part.name
        for part in others
        if isinstance(part, Clipping | Rounding) and not isinstance(part, BlockLearning)
    ]
    if learners and choosers:
        yield f"{learners[0]} learns ranges and rounds by itself; leave out {', '.join(choosers)}"
    searchers = [part.name for part in parts if _says(part, "rounds_to_nearest")]
    rounders = [part.name for part in others if isinstance(part, Rounding)]
    if searchers and rounders:
        yield (
            f"{searchers[0]} searches its scales by what rounding to nearest does, and "
            f"{rounders[0]} does not round to nearest; smoothquant and rotation go with it"
        )


def _completed_by_rtn(parts: Sequence[Part]) -> bool:
    """Whether no part but RTN chooses ranges or codes of weights, so that naming it is true."""
    others = [part for part in parts if not isinstance(part, RTN)]
    return not any(isinstance(part, Clipping | Rounding | BlockLearning) for part in others)
