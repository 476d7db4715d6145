"""The report of a study: one HTML file that opens without a network, and its tables as CSV."""

from quantwm.report.html import Report, render, write_report
from quantwm.report.load import TaskReport, read_task, task_report

__all__ = ["Report", "TaskReport", "read_task", "render", "task_report", "write_report"]
