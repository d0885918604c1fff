"""Hold results to a baseline: the gate that a change of model, recipe or library must pass."""

from vitcompress.gate.baseline import Baseline, read_baseline
from vitcompress.gate.formats import to_junit, to_markdown
from vitcompress.gate.judging import CellVerdict, GateReport, MetricVerdict, judge
from vitcompress.gate.updating import update_baseline

__all__ = [
    "Baseline",
    "CellVerdict",
    "GateReport",
    "MetricVerdict",
    "judge",
    "read_baseline",
    "to_junit",
    "to_markdown",
    "update_baseline",
]
