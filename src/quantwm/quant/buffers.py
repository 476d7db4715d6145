"""Buffers that keep their precision whatever a model is cast to."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module, ABC):
    """A module whose `exact` buffers keep float32 when the module is cast or moved."""

    exact: ClassVar[tuple[str, ...]] = ("scale",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in self.exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in before.items():
            after = self._buffers.get(name)
            if original is not None and after is not None and after.dtype != torch.float32:
                self._buffers[name] = original.to(after.device)
        self._refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    @abstractmethod
    def _refresh(self) -> None:
        """Compute again what derives from the buffers."""
