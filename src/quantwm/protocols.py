"""What the parts of quantwm know of one another.

`models`, `envs`, `planning` and `quant` do not import each other; they meet in these types.
Anything that satisfies `WorldModel` can be calibrated, quantized, planned with and studied, and
anything that satisfies `Task` can be planned in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeAlias, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quantwm.errors import MissingStatisticsError, UsageError

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Latent: TypeAlias = Tensor | dict[str, Tensor]
"""A latent state: a tensor or a dict of tensors, frames in dimension 1 (or 2 after a rollout)."""

Layout: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""What an episode's world looks like besides its state: one array (B,) a named quantity."""


class Observation(TypedDict):
    """Raw observations of T frames of B episodes, as the environment gives them."""

    visual: npt.NDArray[np.uint8]
    """Frames (B, T, H, W, 3), uint8 RGB."""
    proprio: npt.NDArray[np.float32]
    """Proprioception (B, T, P) in the environment's own units."""


@dataclass(frozen=True)
class ActionSpec:
    """How a planner's normalised model actions become the environment's raw actions.

    A model action concatenates `frameskip` raw actions of width `dim`; each raw action is
    normalised with `mean` and `std` (both of length `dim`). A model that carries no statistics
    (`mean is None`) can encode and predict but cannot plan.
    """

    dim: int
    frameskip: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def model_dim(self) -> int:
        """Width of one model action: `frameskip * dim`."""
        return self.frameskip * self.dim

    def denormalize(self, actions: Tensor) -> FloatArray:
        """Normalised model actions (..., H, frameskip·dim) → raw actions (..., H·frameskip, dim).

        Raises:
            MissingStatisticsError: the model carries no action statistics.
        """
        mean, std = self._statistics()
        raw = actions.detach().to("cpu", torch.float32).numpy().astype(np.float64)
        raw = raw.reshape(*raw.shape[:-2], raw.shape[-2] * self.frameskip, self.dim)
        return np.asarray(raw * std + mean, np.float64)

    def normalize(self, raw: FloatArray) -> Tensor:
        """Raw actions (..., H·frameskip, dim) → normalised model actions (..., H, frameskip·dim).

        Returns:
            float32, on the CPU.

        Raises:
            MissingStatisticsError: the model carries no action statistics.
            UsageError: they are no whole number of model actions.
        """
        mean, std = self._statistics()
        steps, rest = divmod(raw.shape[-2], self.frameskip)
        if rest:
            raise UsageError(
                f"{raw.shape[-2]} actions are no multiple of the model's frameskip of "
                f"{self.frameskip}"
            )
        normalized = (raw - mean) / std
        return torch.from_numpy(normalized.reshape(*raw.shape[:-2], steps, self.model_dim)).float()

    def _statistics(self) -> tuple[FloatArray, FloatArray]:
        if self.mean is None or self.std is None:
            raise MissingStatisticsError(
                "this world model carries no action statistics, so its plans cannot be executed; "
                "give the data set it was trained on, or a statistics file, when loading it"
            )
        return np.asarray(self.mean), np.asarray(self.std)


GroupKind: TypeAlias = Literal["linear", "patch_embedding", "attention_matmul"]


@dataclass(frozen=True)
class LinearGroup:
    """Quantizable layers of a world model that read the same tensor.

    Attributes:
        layers: dotted module names. For kind "linear" they are `nn.Linear`, for
            "patch_embedding" an `nn.Conv2d` whose kernel equals its stride, for
            "attention_matmul" `nn.Identity` taps through which a matmul operand passes.
        producer: dotted name of the affine normalisation whose output the layers read, if any.
            Transforms that need a producer (SmoothQuant, AWQ) apply only where there is one.
        block: dotted name of the transformer block that the layers belong to.
        kind: only "linear" is quantized unless a plan includes the other kinds.
        tokens_per_frame: the layers' input is (rows, tokens, width); this many consecutive
            tokens belong to one frame, so that dynamic per-tensor scales are one a candidate
            and frame. None: every token of a row belongs to one frame.
    """

    layers: tuple[str, ...]
    producer: str | None
    block: str
    kind: GroupKind = "linear"
    tokens_per_frame: int | None = None


@dataclass(frozen=True)
class AttentionValues:
    """The path of values through an attention.

    Attributes:
        qkv: the linear whose outputs are queries, keys and values, each `heads * head_dim` wide.
        proj: the linear that reads what attention mixed from the values.
        heads, head_dim: of the attention.
    """

    qkv: str
    proj: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class ResidualStream:
    """A residual stream of a pre-LayerNorm transformer: all that writes it and all that reads it.

    Whoever changes the stream's basis (rotation) must change all of these together, so what a
    declaration leaves out must not touch the stream. Names are dotted.

    Attributes:
        name: of the stream.
        width: of it.
        writers: each linear or patch-embedding convolution whose output is added to the stream →
            the LayerScale on its way, a module whose only parameter (width,) multiplies; or None.
        readers: each LayerNorm that reads the stream → the linears that read it, which nothing
            else feeds.
        embeddings: parameters (..., width) that are added to the stream or put into it.
        exit: the LayerNorm whose output leaves the stream.
        entry: an `nn.Identity` through which tokens come into the stream that no writer makes,
            before anything else is added; None if there are none.
        values: of the attentions.
        hidden: each `nn.Identity` in front of the second linear of an MLP → that linear.
    """

    name: str
    width: int
    writers: Mapping[str, str | None]
    readers: Mapping[str, tuple[str, ...]]
    embeddings: tuple[str, ...]
    exit: str
    entry: str | None = None
    values: tuple[AttentionValues, ...] = ()
    hidden: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class HasResidualStreams(Protocol):
    """An optional member of world models, without which they cannot be rotated."""

    def residual_streams(self) -> Sequence[ResidualStream]:
        """All residual streams that hold quantizable layers."""
        ...


@runtime_checkable
class HasTask(Protocol):
    """An optional member of world models, by which a model is kept from planning elsewhere."""

    @property
    def trained_in(self) -> str:
        """Name of the task that the model was trained in; "" if it does not say."""
        ...


@runtime_checkable
class WorldModel(Protocol):
    """A latent world model for planning; an `nn.Module` with these members.

    It may also have that of `HasTask` and, made of transformers, that of `HasResidualStreams`. One
    whose blocks keep something from call to call, such as keys and values, may also have
    `whole_windows()`, a context manager without a value under which a block's output depends on
    its arguments alone: methods that learn block by block run calibration data under it.
    """

    action_spec: ActionSpec
    objective_weights: Mapping[str, float]
    """Weight of each latent part in the planning objective; {"": 1.0} for a tensor latent."""

    def encode(self, observation: Observation) -> Latent:
        """Raw observations of (B, T) frames → latent, every tensor (B, T, ...)."""
        ...

    def rollout(self, latent: Latent, actions: Tensor, *, last_only: bool = False) -> Latent:
        """Predict the frames that candidate actions lead to.

        Args:
            latent: of T observed frames, tensors (B, T, ...), on the model's device.
            actions: normalised model actions (B, N, H, frameskip·dim): N candidates an episode.
                The first T − 1 lie between the observed frames; planning observes one frame.
            last_only: return only the last predicted frame.

        Returns:
            latents of the observed and the predicted frames, tensors (B, N, H + 1, ...), or of
            the last one, (B, N, 1, ...), with `last_only`.
        """
        ...

    def quantizable_groups(self) -> Sequence[LinearGroup]:
        """The layers that quantization may replace, in forward order."""
        ...

    # The parts of nn.Module that quantwm relies on.
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def eval(self) -> Self: ...


@dataclass(frozen=True)
class Episodes:
    """Starts and goals of B episodes, each fixed by its own seed.

    Attributes:
        seeds: (B,) the integer every random draw of an episode derives from.
        start, goal: (B, S) environment states.
        layout: named arrays (B,).
    """

    seeds: npt.NDArray[np.int64]
    start: FloatArray
    goal: FloatArray
    layout: Layout

    def __len__(self) -> int:
        return len(self.seeds)

    def select(self, index: npt.NDArray[Any]) -> "Episodes":
        """The episodes at `index`, an integer or boolean array."""
        layout = {name: values[index] for name, values in self.layout.items()}
        return Episodes(self.seeds[index], self.start[index], self.goal[index], layout)


class Simulation(Protocol):
    """B running episodes; stateful, because not every simulator is a function of its state."""

    @property
    def states(self) -> FloatArray:
        """Current states (B, S)."""
        ...

    def step(self, index: npt.NDArray[np.intp], actions: FloatArray) -> FloatArray:
        """Execute raw actions (len(index), T, A) in the episodes at `index`, no others.

        Returns:
            the states after each action, (len(index), T, S).
        """
        ...


@runtime_checkable
class Task(Protocol):
    """An environment with its episode distribution, observation and success rule."""

    name: str
    action_dim: int
    proprio_dim: int

    def settings(self) -> dict[str, Any]:
        """Everything that changes an episode's rows, as JSON values (layout, version, …)."""
        ...

    def episodes(self, seeds: Sequence[int]) -> Episodes:
        """Starts, goals and layouts; episode i depends on `seeds[i]` alone."""
        ...

    def start(self, episodes: Episodes) -> Simulation:
        """A simulation at the episodes' start states."""
        ...

    def rollout(self, states: FloatArray, layout: Layout, actions: FloatArray) -> FloatArray:
        """True dynamics: states (B, S), raw actions (B, T, A) → states (B, T, S)."""
        ...

    def observe(self, states: FloatArray, layout: Layout) -> Observation:
        """Observations of states (B, T, S): frames (B, T, H, W, 3) and proprio (B, T, P)."""
        ...

    def proprio(self, states: FloatArray) -> npt.NDArray[np.float32]:
        """Proprioception of states, (..., S) → (..., P), without rendering."""
        ...

    def distance(self, states: FloatArray, goals: FloatArray) -> FloatArray:
        """Distance to the goal in the environment's units, (..., S) and (..., S) → (...)."""
        ...

    def success(self, states: FloatArray, goals: FloatArray) -> BoolArray:
        """Whether states (..., S) count as having reached goals (..., S)."""
        ...


CostFunction: TypeAlias = Callable[[npt.NDArray[np.intp], Tensor], Tensor]
"""(episode indices (B,), candidate actions (B, N, H, D)) → costs (B, N), float32 on the CPU."""


@dataclass(frozen=True)
class PlanResult:
    """What a planner found for B episodes.

    Attributes:
        actions: (B, H, D) normalised model actions to execute.
        cost: (B,) the lowest candidate cost of the last optimisation step.
        cost_by_step: (B, steps) the lowest candidate cost of each step.
        failures: (B,) None, or why an episode could not be planned ("non_finite: …").
    """

    actions: Tensor
    cost: FloatArray
    cost_by_step: FloatArray
    failures: tuple[str | None, ...]


class Planner(Protocol):
    """Finds action sequences of low cost; knows neither the model nor the simulator."""

    def plan(
        self,
        cost: CostFunction,
        seeds: npt.NDArray[np.int64],
        iteration: int,
        action_spec: ActionSpec,
    ) -> PlanResult:
        """Plan for B episodes with noise keyed by (seed, iteration, optimisation step)."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that changes a plan, as JSON values."""
        ...
