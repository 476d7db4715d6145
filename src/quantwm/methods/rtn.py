"""Round to nearest: the min-max grid of every weight and input, nothing optimised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from quantwm.methods.registry import register
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.apply import Progress
from quantwm.quant.modules import quantized_layer, replace_module
from quantwm.quant.observers import CalibrationData, input_ranges
from quantwm.quant.scheme import LayerScheme


@register
@dataclass(frozen=True)
class RTN:
    """Round-to-nearest. Static input ranges are those of the float model, extremes included."""

    name: ClassVar[str] = "rtn"
    needs_calibration: ClassVar[bool] = False

    def apply(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
        calibration: CalibrationData | None,
        progress: Progress | None,
    ) -> None:
        """Replace every layer of `schemes`; see `quantwm.quant.Method`."""
        tokens_per_frame = {
            name: group.tokens_per_frame for group in groups for name in group.layers
        }
        ranges = {}
        if calibration is not None:
            static = [
                name
                for name, scheme in schemes.items()
                if scheme.activation is not None and scheme.activation.static
            ]
            ranges = input_ranges(world_model, static, calibration)
        for done, (name, scheme) in enumerate(schemes.items(), start=1):
            layer = quantized_layer(
                world_model.get_submodule(name),
                scheme,
                tokens_per_frame=tokens_per_frame[name],
                input_range=ranges.get(name),
            )
            replace_module(world_model, name, layer)
            if progress is not None:
                progress(done, len(schemes))
