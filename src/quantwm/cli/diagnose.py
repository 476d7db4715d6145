"""The command that says what a world model gets wrong."""

from typing import Annotated

import typer

from quantwm.cli.app import Device, Json, ModelName, app
from quantwm.console import bars, counter, exit_codes, print_json, print_rollout_diagnosis


@app.command(epilog="Example: quantwm diagnose wall --episodes 32")
def diagnose(
    model: ModelName,
    task: Annotated[
        str | None, typer.Option(help="Task to plan in; default: the model's own.")
    ] = None,
    episodes: Annotated[int, typer.Option(help="Episodes of the tuning block.")] = 16,
    seed: Annotated[int, typer.Option(help="Another seed gives other episodes.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Compare rollouts that the model imagines with what happens: errors by step, and whether the
    cheapest candidates are truly the best."""
    with exit_codes():
        from quantwm.diagnostics.rollouts import diagnose_rollouts
        from quantwm.loading import load

        world_model = load(model, device=device)
        with bars() as progress:
            diagnosis = diagnose_rollouts(
                world_model,
                task or world_model.config.task,
                episodes=episodes,
                seed=seed,
                device=device,
                dtype=dtype,
                progress=counter(progress, "diagnose"),
            )
        if as_json:
            print_json(diagnosis.to_dict())
        else:
            print_rollout_diagnosis(diagnosis)
