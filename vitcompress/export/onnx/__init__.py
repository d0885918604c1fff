"""ONNX export: mark, export, lower, spell for the target, verify."""

from vitcompress.export.onnx.exporter import ExportResult, export_onnx
from vitcompress.export.onnx.targets import TARGETS, Target
from vitcompress.export.onnx.verify import Verification

__all__ = ["TARGETS", "ExportResult", "Target", "Verification", "export_onnx"]
