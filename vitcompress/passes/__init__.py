"""The passes: one method, one file, one line here."""

from vitcompress.passes.attach import Attach
from vitcompress.passes.base import PASSES, Fact, Pass, PassContext, PassReport, register
from vitcompress.passes.calibrate import Calibrate
from vitcompress.passes.erq import Erq
from vitcompress.passes.freeze import Freeze
from vitcompress.passes.gptq import Gptq
from vitcompress.passes.hadamard import Hadamard
from vitcompress.passes.integer_bias import IntegerBias
from vitcompress.passes.is_vit import IsVit
from vitcompress.passes.massive_activations import MassiveActivations
from vitcompress.passes.mlp_reconstruction import MlpReconstruction
from vitcompress.passes.range_search import RangeSearch
from vitcompress.passes.reconstruct import Reconstruct
from vitcompress.passes.refine_ranges import RefineRanges
from vitcompress.passes.repq_vit import RepqVit

__all__ = [
    "PASSES",
    "Attach",
    "Calibrate",
    "Erq",
    "Fact",
    "Freeze",
    "Gptq",
    "Hadamard",
    "IntegerBias",
    "IsVit",
    "MassiveActivations",
    "MlpReconstruction",
    "Pass",
    "PassContext",
    "PassReport",
    "RangeSearch",
    "Reconstruct",
    "RefineRanges",
    "RepqVit",
    "register",
]
