"""How a model calls one of its blocks while calibration data pass through it.

A block is learned by repeating its calls, so a call must be a function of its arguments, and its
rows (images, candidates) must not depend on each other. What is called with tensors inside lists
or dicts, or keeps something from call to call, cannot be repeated row by row; models that keep
something in rollouts offer `whole_windows` (`quantwm.protocols.WorldModel`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from quantwm.errors import UsageError
from quantwm.protocols import Latent, Observation, WorldModel
from quantwm.quant.observers import Observer, Replay
from quantwm.quant.sampling import named_generator

HELD_OUT = 0.2
"""Share of the calibration samples that nothing is fitted to."""
MIN_SAMPLES = 5
"""Calibration samples below which there is nothing to hold out."""

_Key: TypeAlias = int | str
"""Position or name of an argument."""


@dataclass(frozen=True)
class BlockCall:
    """A call of a block, or several alike in everything but their rows, as one.

    Attributes:
        arguments: by position or name.
        by_row: keys of those whose first dimension is the call's rows.
        samples: (rows,) int64, the calibration sample that each row belongs to.
        tokens: of a row.
    """

    arguments: Mapping[_Key, Any]
    by_row: frozenset[_Key]
    samples: Tensor
    tokens: int

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, index: Tensor) -> "BlockCall":
        """The same call of fewer rows; `index` is int64 or bool and on the CPU."""
        arguments = {
            key: value[index.to(value.device)] if key in self.by_row else value
            for key, value in self.arguments.items()
        }
        return BlockCall(arguments, self.by_row, self.samples[index], self.tokens)

    def run(self, block: nn.Module) -> Tensor:
        """What `block` makes of it.

        Raises:
            UsageError: something other than one tensor (rows, ...).
        """
        positions = sorted(key for key in self.arguments if isinstance(key, int))
        named = {key: value for key, value in self.arguments.items() if isinstance(key, str)}
        output = block(*(self.arguments[position] for position in positions), **named)
        if not isinstance(output, Tensor) or len(output) != len(self):
            raise UsageError(
                "learning a block compares what it returns, which must be a tensor of as many "
                f"rows as its input ({len(self)}); got {_described(output)}"
            )
        return output

    def like(self, other: "BlockCall") -> bool:
        """Whether the two can be one call."""
        own, theirs = self.arguments, other.arguments
        return (
            self.by_row == other.by_row
            and own.keys() == theirs.keys()
            and all(_alike(own[key], theirs[key], key in self.by_row) for key in own)
        )


class BlockInputs(Observer):
    """Keeps a block's calls, or a sample of their rows.

    Every row gets a random number from a generator of the block's own, and those with the lowest
    are kept, as many as `tokens` allows.

    Args:
        block: dotted name.
        tokens: to keep, over all rows; a token is a vector along the last dimension.
    """

    def __init__(self, block: str, tokens: int) -> None:
        super().__init__(block)
        self._generator = named_generator("inputs of", block)
        self._capacity = tokens
        self._calls: list[tuple[BlockCall, Tensor]] = []
        self._limit = 1.0
        self._first, self._samples = 0, 0

    def begin(self, samples: int) -> None:
        """Note that the model starts on `samples` others (episodes, or candidates)."""
        self._first, self._samples = self._first + self._samples, samples

    def see(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Keep rows of one call.

        Raises:
            UsageError: a call without a tensor (rows, ..., width).
        """
        named = cast(Mapping[_Key, Any], kwargs)
        arguments: dict[_Key, Any] = {**dict(enumerate(args)), **named}
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        x = next((tensor for tensor in tensors.values() if tensor.ndim > 1), None)
        if x is None:
            raise UsageError(f"{self.layer} is not called with a tensor (rows, ..., width)")
        self.update(x)
        rows, tokens = len(x), x[0].numel() // x.shape[-1]
        by_row = frozenset(k for k, v in tensors.items() if v.ndim and len(v) == rows)
        call = BlockCall(arguments, by_row, self._sample_of_rows(rows), tokens)
        draws = torch.rand(rows, dtype=torch.float64, generator=self._generator)
        kept = draws < self._limit
        if kept.any():
            # Copies, because a model may write into its tensors later, and plain ones, because
            # what came to be in inference mode cannot take part in a gradient.
            with torch.inference_mode(False):
                self._calls.append((call.rows(kept), draws[kept]))
            self._drop_surplus()

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Nothing but the check of `update`."""

    def _sample_of_rows(self, rows: int) -> Tensor:
        """Samples follow each other: they have several rows each, or share rows."""
        samples = self._samples or rows
        if rows % samples and samples % rows:
            return torch.full((rows,), self._first)
        return self._first + torch.arange(rows) * samples // rows

    def _drop_surplus(self) -> None:
        tokens = [call.tokens for call, _ in self._calls for _ in range(len(call))]
        if sum(tokens) <= self._capacity:
            return
        draws, order = torch.cat([draws for _, draws in self._calls]).sort()
        fits = torch.tensor(tokens)[order].cumsum(0) <= self._capacity
        fits[0] = True
        self._limit = float(draws[int(fits.sum()) :][0]) if not fits.all() else self._limit
        self._calls = [
            (call.rows(draws < self._limit), draws[draws < self._limit])
            for call, draws in self._calls
            if (draws < self._limit).any()
        ]

    def value(self) -> list[BlockCall]:
        """The calls, those alike as one."""
        self.check_seen()
        kinds: list[list[BlockCall]] = []
        for call, _ in self._calls:
            kind = next((kind for kind in kinds if kind[0].like(call)), None)
            if kind is None:
                kinds.append([call])
            else:
                kind.append(call)
        return [_joined(kind) for kind in kinds]


def block_calls(replay: Replay, blocks: Sequence[str], tokens: int) -> dict[str, list[BlockCall]]:
    """The calls of blocks in one replay of the model as it is now.

    Args:
        replay: of the model.
        blocks: dotted names.
        tokens: of each block's input to keep at most, see `BlockInputs`. Which rows are kept
            depends on the block's name and on how often it is called, not on the model's state.

    Raises:
        NonFiniteError: an input holds NaN or infinite values.
        UsageError: a block that the replay never runs, or not with a tensor.
    """
    inputs = {block: BlockInputs(block, tokens) for block in blocks}

    def begin(samples: int) -> None:
        for one in inputs.values():
            one.begin(samples)

    @contextmanager
    def context(world_model: WorldModel) -> Iterator[WorldModel]:
        with whole_windows(world_model):
            yield cast(WorldModel, _Counting(world_model, begin))

    replay.show({block: [one] for block, one in inputs.items()}, context)
    return {block: one.value() for block, one in inputs.items()}


def held_out_rows(calls: Sequence[BlockCall], block: str) -> list[Tensor]:
    """Which rows of each call nothing is to be fitted to: those of a fifth of the samples.

    Returns:
        bool (rows,) of each call.

    Raises:
        UsageError: fewer than `MIN_SAMPLES` calibration samples.
    """
    samples = torch.unique(torch.cat([call.samples for call in calls]))
    if len(samples) < MIN_SAMPLES:
        raise UsageError(
            f"too few calibration samples: of {block} inputs from {len(samples)} are kept, and "
            f"learning it needs those from at least {MIN_SAMPLES}, a part of which is held out; "
            "calibrate with more episodes, or keep more tokens"
        )
    shuffled = samples[torch.randperm(len(samples), generator=named_generator("split of", block))]
    chosen = shuffled[: max(1, round(HELD_OUT * len(samples)))]
    return [torch.isin(call.samples, chosen) for call in calls]


class _Counting:
    """Stands in for a world model and tells how many samples each of its runs has."""

    def __init__(self, world_model: WorldModel, begin: Callable[[int], None]) -> None:
        self._world_model, self._begin = world_model, begin

    def encode(self, observation: Observation) -> Latent:
        self._begin(len(observation["visual"]))
        return self._world_model.encode(observation)

    def rollout(self, latent: Latent, actions: Tensor, *, last_only: bool = False) -> Latent:
        self._begin(actions.shape[0] * actions.shape[1])
        return self._world_model.rollout(latent, actions, last_only=last_only)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world_model, name)


def whole_windows(world_model: WorldModel) -> AbstractContextManager[None]:
    """A context in which blocks keep nothing from call to call, see `WorldModel`."""
    offered = getattr(world_model, "whole_windows", None)
    return nullcontext() if offered is None else cast(AbstractContextManager[None], offered())


def _joined(calls: Sequence[BlockCall]) -> BlockCall:
    first = calls[0]
    arguments = {
        key: torch.cat([call.arguments[key] for call in calls]) if key in first.by_row else value
        for key, value in first.arguments.items()
    }
    samples = torch.cat([call.samples for call in calls])
    return BlockCall(arguments, first.by_row, samples, first.tokens)


def _alike(one: object, other: object, by_row: bool) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if by_row:
            return one.shape[1:] == other.shape[1:] and one.dtype == other.dtype
        return one.shape == other.shape and torch.equal(one, other)
    plain = isinstance(one, bool | int | float | str)
    return one is other or (plain and type(one) is type(other) and one == other)


def _described(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
