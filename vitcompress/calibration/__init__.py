"""Looking at data: sources, observers, statistics and range search."""

from vitcompress.calibration.observers import (
    ChannelAbsMax,
    Histogram,
    MinMax,
    Observer,
    QuantizationNoise,
    Samples,
    SecondMoment,
)
from vitcompress.calibration.ranges import RangeConfig, fit_range, search_range
from vitcompress.calibration.source import Batch, CalibrationSource, FirstImages
from vitcompress.calibration.statistics import Request, Statistics

__all__ = [
    "Batch",
    "CalibrationSource",
    "ChannelAbsMax",
    "FirstImages",
    "Histogram",
    "MinMax",
    "Observer",
    "QuantizationNoise",
    "RangeConfig",
    "Request",
    "Samples",
    "SecondMoment",
    "Statistics",
    "fit_range",
    "search_range",
]
