"""Which layer broke it: quantize one place at a time and look at the logits.

The model is quantized once. Then its quantizers are switched: all off but those of one unit
(``only``), or all on but those (``except``). A unit is a quantizer, a layer (weight and input
together) or a block. All measurements share the ranges of that one quantization.
"""

from vitcompress.analyze.records import Analysis, AnalysisEntry, Distance, read_analysis
from vitcompress.analyze.run import analyze

__all__ = ["Analysis", "AnalysisEntry", "Distance", "analyze", "read_analysis"]
