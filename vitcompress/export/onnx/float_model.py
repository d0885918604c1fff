"""What a compressed file is compared with: the float32 network, and its dynamic INT8 form."""

import logging
import warnings
from pathlib import Path

import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from vitcompress.errors import ExportError
from vitcompress.export.onnx.program import marked_model
from vitcompress.export.onnx.targets import find_target
from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.quantizers import Quantizer

__all__ = ["export_float_onnx", "quantize_dynamically", "without_quantizers"]


def without_quantizers(captured: CapturedGraph) -> CapturedGraph:
    """Return the float graph of a compressed one: same operations, no quantizer.

    Stored weights become the values of their codes, so its function differs from that of the
    original network by the error of the weights; its operations and their cost do not.

    Args:
        captured: A graph with quantizers; not changed.
    """
    graph = captured.clone()
    for node in [n for n in graph.graph.nodes if is_quantizer(n)]:
        quantizer = graph.module.get_submodule(str(node.target))
        assert isinstance(quantizer, Quantizer)
        value = node.all_input_nodes[0]
        # Readers of one weight share its quantizer, which may be called several times.
        if quantizer.frozen and not graph.parameter(str(value.target)).is_floating_point():
            codes = graph.parameter(str(value.target))
            graph.set_parameter(str(value.target), quantizer.dequantize(codes))
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def export_float_onnx(captured: CapturedGraph, path: Path) -> None:
    """Write a graph, quantizers bypassed, as plain float32 ONNX with a dynamic batch.

    Args:
        captured: A graph, compressed or not; not changed.
        path: File to write.

    Raises:
        ExportError: The exporter cannot translate an operation.
    """
    model = marked_model(without_quantizers(captured), opset=find_target("generic").opset)
    model.producer_name = "vitcompress"
    ir.save(model, path)


def quantize_dynamically(source: Path, path: Path) -> None:
    """Write onnxruntime's own dynamic INT8 form of a float32 file.

    Signed weights, one scale per output channel; unsigned activations whose scale is found
    while running. Only ``MatMul`` and ``Gemm`` are quantized, for a faster reference: with
    dynamic integers a convolution takes longer in the runtime than with floats (a patch
    embedding of 16 x 16 pixels into 384 channels 3.6 against 1.0 ms, one thread).

    Args:
        source: Float32 ONNX file.
        path: File to write.

    Raises:
        ExportError: onnxruntime cannot quantize the file.
    """
    root = logging.getLogger()
    disabled = root.disabled
    root.disabled = True  # it recommends preprocessing on the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_dynamic(
                source,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
    except Exception as error:  # its exception types are not public
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ExportError(
            f"{source.name}: onnxruntime's dynamic quantization fails on it: {reason}; "
            "--no-references leaves it out"
        ) from error
    finally:
        root.disabled = disabled
