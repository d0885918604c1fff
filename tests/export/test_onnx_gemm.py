"""Linears as ``Gemm`` with an int32 bias: when the bias is whole steps, and when not."""

import pytest
import torch
from finished import quantized
from onnx import TensorProto
from onnx_files import GEMM, LINEARS, load_file
from tiny import enliven, images
from torch import nn

from vitcompress.evaluate import onnx_predictor
from vitcompress.export.onnx import TARGETS
from vitcompress.graph import capture
from vitcompress.recipe import Recipe


def test_bias_of_eight_bit_linears_is_int32(export):
    _, graph = load_file(export("deploy", "W8A8", "gemm").path)

    for linear in LINEARS:
        bias = graph.made_by[graph.named(linear).input[2]]
        assert bias.op_type == "DequantizeLinear"
        assert graph.initializers[bias.input[0]].data_type == TensorProto.INT32


@pytest.mark.parametrize(("recipe", "scheme"), [("deploy", "W4A8"), ("repq_vit", "W4A4")])
def test_narrow_linears_have_an_exact_int32_bias(export, recipe, scheme):
    """Steps of s_x s_w are coarse there; the graph holds whole steps, so none is rounded."""
    exported = export(recipe, scheme, "gemm")
    _, graph = load_file(exported.path)

    assert all(len(graph.named(linear).input) == 3 for linear in LINEARS)
    assert exported.result.verification.code_mismatch < 1e-4
    assert exported.result.verification.in_step_cosine > 1.0 - 1e-9


@pytest.fixture(scope="module")
def offered_gemm():
    """Let files be written with ``Gemm``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, GEMM.name, GEMM)
        yield


@pytest.mark.usefixtures("offered_gemm")
def test_bias_that_is_no_whole_steps_is_added_in_float(vit_graph, source, tmp_path):
    passes = [
        {
            "pass": "attach",
            "rules": [
                {"roles": ["weight"], "bits": 4, "granularity": "per_channel"},
                {
                    "roles": ["norm_output", "proj_input", "act_output", "head_input"],
                    "bits": 4,
                },
            ],
        },
        {"pass": "calibrate"},
        {"pass": "freeze"},
    ]
    fields = {"schema": 1, "name": "plain", "scheme": "W4A4", "passes": passes}
    model = quantized(vit_graph, source, recipe=Recipe.from_dict(fields))

    result = model.export_onnx(tmp_path / "m.onnx", target="gemm", images=images(4, seed=3))

    _, graph = load_file(tmp_path / "m.onnx")
    assert all(len(graph.named(linear).input) == 2 for linear in LINEARS)
    assert result.verification.integer_linears == len(LINEARS)
    assert result.verification.code_mismatch < 1e-4


@pytest.fixture(scope="module")
def overflowing(vit_graph, source, tmp_path_factory, offered_gemm):
    """A file whose first fc1 has steps too small for its bias, and a named output."""
    graph = vit_graph.clone()
    graph.output_names = ("logits",)
    graph.set_parameter("blocks.0.fc1.weight", 1e-7 * graph.parameter("blocks.0.fc1.weight"))
    graph.set_parameter("blocks.0.fc1.bias", 10 * graph.parameter("blocks.0.fc1.bias"))
    path = tmp_path_factory.mktemp("overflow") / "m.onnx"
    model = quantized(graph, source, bits=8)
    return model.export_onnx(path, target="gemm", images=images(8, seed=3)), path


def test_bias_that_overflows_is_added_in_float_and_the_product_stays_integer(overflowing):
    result, path = overflowing

    _, graph = load_file(path)

    assert len(graph.named("blocks.0.fc1").input) == 2
    assert len(graph.named("blocks.0.fc2").input) == 3
    assert result.verification.integer_linears == len(LINEARS)
    assert result.verification.cosine > 0.999


def test_named_outputs_keep_their_names(overflowing):
    _, path = overflowing

    model, _ = load_file(path)

    assert [value.name for value in model.graph.output] == ["logits"]
    assert [value.name for value in model.graph.input] == ["images"]
    assert onnx_predictor(path)(images(1)).shape == (1, 10)


class Mixing(nn.Module):
    """Two products with bare matrices: one module path for two linears."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 24) / 4)
        self.second = nn.Parameter(torch.randn(24, 16) / 4)

    def forward(self, x):
        return x @ self.first @ self.second


class Shared(nn.Module):
    """Pairs of linears with one bias tensor, and a module that is two linears."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.mix = Mixing()
        self.biased = nn.Sequential(*(nn.Linear(16, 16) for _ in range(2)))
        self.zeros = nn.Sequential(*(nn.Linear(16, 16) for _ in range(2)))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.mix(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(self.zeros(self.biased(x).relu()).mean(1))


@pytest.fixture(scope="module")
def sharing(source):
    """Return a model of shared paths and tensors."""
    torch.manual_seed(0)
    model = enliven(Shared())
    for pair in (model.biased, model.zeros):
        pair[1].bias = pair[0].bias
    torch.nn.init.zeros_(model.zeros[0].bias)
    return quantized(capture(model, images(2)), source, bits=8)


@pytest.fixture(scope="module")
def shared(sharing, tmp_path_factory, offered_gemm):
    """Return the verification and the graph of a file of shared paths and tensors."""
    path = tmp_path_factory.mktemp("shared") / "m.onnx"
    result = sharing.export_onnx(path, target="gemm", images=images(8, seed=3))
    return result.verification, load_file(path)[1]


def test_two_linears_of_one_module_are_counted_both(shared):
    found, graph = shared

    assert (found.integer_linears, found.linears) == (7, 7)
    assert found.cosine > 0.999
    first, second = graph.named("mix"), graph.named("mix:1")
    assert first.op_type == second.op_type == "Gemm"
    assert first.output != second.output


def test_a_bias_that_two_linears_share_is_written_for_each(shared):
    _, graph = shared

    # No steps fit both linears: the bias is added in float.
    for name in ("biased.0", "biased.1"):
        assert len(graph.named(name).input) == 2
    # Zero is a whole number of any steps.
    codes = [
        graph.made_by[graph.named(name).input[2]].input[0] for name in ("zeros.0", "zeros.1")
    ]
    assert len(set(codes)) == 2
    for name in codes:
        assert graph.initializers[name].data_type == TensorProto.INT32


def test_integer_products_read_a_shared_bias_where_it_is(sharing, tmp_path):
    result = sharing.export_onnx(tmp_path / "m.onnx", images=images(8, seed=3))

    _, graph = load_file(tmp_path / "m.onnx")
    assert (result.verification.integer_linears, result.verification.linears) == (8, 8)
    assert result.verification.cosine > 0.999
    for pair in ("biased", "zeros"):
        first, second = (graph.named(f"{pair}.{index}") for index in (0, 1))
        assert first.input[6] == second.input[6]
        assert first.input[1] != second.input[1]
    assert graph.named("mix").output != graph.named("mix:1").output
