"""The command line: parses, calls the library, prints."""

from quantwm.cli import bench, convert, diagnose, imagine, inspect, models, study
from quantwm.cli.app import app

__all__ = ["app", "bench", "convert", "diagnose", "imagine", "inspect", "main", "models", "study"]


def main() -> None:
    """Entry point of the `quantwm` command."""
    app()
