"""The captured program: one FX graph of tensor operations, and what is recognised in it."""

from vitcompress.graph.capture import capture
from vitcompress.graph.captured import CapturedGraph, OutputDict, Provenance
from vitcompress.graph.sites import QuantizationSite, Role, enumerate_sites, unlisted_products

__all__ = [
    "CapturedGraph",
    "OutputDict",
    "Provenance",
    "QuantizationSite",
    "Role",
    "capture",
    "enumerate_sites",
    "unlisted_products",
]
