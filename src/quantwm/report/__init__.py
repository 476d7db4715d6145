"""The study's report: one HTML file that opens without a network."""

from quantwm.report.html import render, write_report

__all__ = ["render", "write_report"]
