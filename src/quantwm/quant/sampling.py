"""Random draws that depend on a name alone, and uniform samples drawn with them."""

import hashlib

import torch
from torch import Tensor

_SURPLUS = 1.5
"""Rows are dropped once this many times the capacity are kept, so that few are sorted often."""


def named_generator(*key: str) -> torch.Generator:
    """A generator on the CPU that depends on `key` alone."""
    digest = hashlib.sha256("\n".join(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Reservoir:
    """A uniform sample of rows, all of them where they are few enough.

    Every row gets a random number from a generator of the sample's own, and those with the lowest
    are kept: the sample depends on its name and the rows alone, not on how many come at a time.

    Args:
        name: of the sample.
        capacity: rows to keep.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self._capacity = capacity
        self._generator = named_generator(name)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._count = 0
        self._highest = 1.0

    def update(self, rows: Tensor) -> None:
        """See rows (n, ...); what is kept of them is copied."""
        draws = torch.rand(len(rows), dtype=torch.float64, generator=self._generator)
        # Few numbers are that low late in a replay.
        self._keep(*_up_to(self._highest, rows, draws))
        if self._count > _SURPLUS * self._capacity:
            self.value()

    def value(self) -> Tensor:
        """(min(rows, capacity), ...), in the order they were seen."""
        rows, draws = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        if len(draws) > self._capacity:
            self._highest = draws.kthvalue(self._capacity).values.item()
            rows, draws = _up_to(self._highest, rows, draws)
        self._kept, self._count = [], 0
        self._keep(rows, draws)
        return rows

    def _keep(self, rows: Tensor, draws: Tensor) -> None:
        self._kept.append((rows, draws))
        self._count += len(draws)


def _up_to(highest: float, rows: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the rows whose numbers, which are always on the CPU, are at most `highest`."""
    index = (draws <= highest).nonzero().squeeze(1)
    return rows[index.to(rows.device)], draws[index]
