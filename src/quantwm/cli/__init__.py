"""The command line: parses, calls the library, prints."""

from quantwm.cli import bench, diagnose, inspect, models, study
from quantwm.cli.app import app

__all__ = ["app", "bench", "diagnose", "inspect", "main", "models", "study"]


def main() -> None:
    """Entry point of the `quantwm` command."""
    app()
