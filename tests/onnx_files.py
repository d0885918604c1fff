"""Looking into exported files."""

from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from vitcompress.api import CompressedModel
from vitcompress.export.onnx import TARGETS
from vitcompress.export.rewrites import rewritten
from vitcompress.graph import CapturedGraph
from vitcompress.quantizers import AdaLog, Affine


def in_blocks(*names):
    """Return names within each block of the tiny network."""
    return [f"blocks.{i}.{name}" for i in (0, 1) for name in names]


#: Linears of the tiny network.
LINEARS = [*in_blocks("attn.qkv", "attn.proj", "fc1", "fc2"), "head"]
#: For onnxruntime patches are a linear, and query, key and value one each.
SEPARATE = ["patch_embed", *LINEARS, *in_blocks("attn.qkv:1", "attn.qkv:2")]


class Graph:
    """Producers, initializers and nodes of an ONNX graph by name."""

    def __init__(self, graph):
        self.nodes = list(graph.node)
        self.made_by = {out: node for node in graph.node for out in node.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}

    def of_type(self, op):
        return [node for node in self.nodes if node.op_type == op]

    def constant(self, name):
        return numpy_helper.to_array(self.initializers[name])

    def named(self, name):
        (found,) = [node for node in self.nodes if node.name == name]
        return found

    def behind_moves(self, value):
        node = self.made_by[value]
        while node.op_type in ("Reshape", "Transpose"):
            node = self.made_by[node.input[0]]
        return node


def load_file(path: Path) -> tuple[ModelProto, Graph]:
    model = onnx.load(path)
    return model, Graph(model.graph)


def written_graph(model: CompressedModel, target: str) -> CapturedGraph:
    """Return the graph that a file for a target is written from."""
    return rewritten(model.graph, TARGETS[target].rewrites).graph


def assert_codes_agree(path: Path, captured: CapturedGraph, x: Tensor) -> None:
    """Compare at each site the runtime's codes with torch's codes of the runtime's values."""
    proto = onnx.load(path)
    graph = Graph(proto.graph)
    quantizers = {q.site: q for q in captured.quantizers().values() if not q.frozen}
    wanted = {}
    for site, quantizer in quantizers.items():
        codes = graph.named(site)
        value = codes.input[0]
        # The first operator of a logarithm; an AdaLog has its shift in front.
        first = ("Add",) if isinstance(quantizer, AdaLog) else ("Relu", "Max")
        # The marker's own input lies in front of the clip or of the logarithm.
        while graph.made_by.get(value) is not None and graph.made_by[value].op_type in (
            *("Clip", "Round", "Mul", "Log", "Div", "Relu", "Min", *first),
        ):
            node = graph.made_by[value]
            value = node.input[0]
            if node.op_type in first:
                break
            if node.op_type == "Clip" and codes.op_type == "QuantizeLinear":
                break
        wanted[site] = (value, codes.output[0])
    known = {out.name for out in proto.graph.output} | {proto.graph.input[0].name}
    for name in dict.fromkeys(name for pair in wanted.values() for name in pair):
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {feed: x.numpy()}), strict=True))
    found[feed] = x.numpy()
    assert len(wanted) > 0
    for site, (value, codes) in wanted.items():
        quantizer = quantizers[site]
        expected = quantizer.quantize(torch.from_numpy(found[value])).to(torch.int32)
        if isinstance(quantizer, Affine):
            expected = expected - quantizer.bounds[0]
        stored = torch.from_numpy(found[codes])
        if stored.dtype == torch.int8:  # right operands of products: less by 128
            expected = expected - 128
        different = stored.to(torch.int32) != expected
        assert different.double().mean() < 1e-4, site
