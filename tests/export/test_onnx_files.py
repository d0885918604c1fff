"""What the exported files hold and compute, for every recipe, width and target."""

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from finished import quantized
from onnx import TensorProto, numpy_helper
from onnx_files import assert_codes_agree, load_file
from tiny import enliven, images, make_source
from torch import nn
from zoo import zoo_graph, zoo_images

import vitcompress
from vitcompress.evaluate import onnx_predictor
from vitcompress.export.onnx import exporter
from vitcompress.export.onnx.exporter import METADATA_KEY
from vitcompress.graph import capture
from vitcompress.numerics.nonuniform import parity_table
from vitcompress.quantizers import Affine, Codebook
from vitcompress.recipe import Recipe
from vitcompress.report import ExportEntry

WIDTHS = [
    *(("deploy", scheme) for scheme in ("W8A8", "W4A8", "W3A8", "W2A8")),
    *(("repq_vit", scheme) for scheme in ("W4A4", "W3A3", "W6A6")),
]
TARGETS = ("ort-cpu", "generic")
LINEARS = [
    *(
        f"blocks.{i}.{name}"
        for i in (0, 1)
        for name in ("attn.qkv", "attn.proj", "fc1", "fc2")
    ),
    "head",
]


@pytest.fixture(
    scope="module",
    params=[(*width, target) for width in WIDTHS for target in TARGETS],
    ids="-".join,
)
def exported(request, export):
    return export(*request.param)


def test_file_passes_its_verification(exported):
    found = exported.result.verification

    assert found.images == 64
    assert found.cosine > 0.999
    assert found.linears == len(LINEARS)
    assert found.runtime == f"onnxruntime {onnxruntime.__version__} CPU"
    assert exported.result.size_bytes == exported.path.stat().st_size


def test_every_linear_runs_as_integers_where_the_target_promises_it(exported):
    found = exported.result.verification

    if exported.result.target == "ort-cpu":
        assert (found.integer_linears, found.float_linears) == (found.linears, {})
        assert found.integer_ops["QGemm"] == len(LINEARS)
        assert ExportEntry.of(exported.result).execution == "executed"
    else:
        assert found.integer_linears + len(found.float_linears) == found.linears


def test_file_is_valid_onnx_of_standard_operators_and_fused_attention(exported):
    model, _ = load_file(exported.path)
    fused = {"com.microsoft"} if exported.result.fused_attention else set()

    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {"", *fused}
    assert [function.name for function in model.functions] == []
    assert model.producer_name == "vitcompress"


def test_batch_is_dynamic_and_images_do_not_mix(exported):
    model, _ = load_file(exported.path)
    x = images(7, seed=11)

    run = onnx_predictor(exported.path)

    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    whole = run(x)
    for size in (1, 3):
        # Kernels differ with the batch in the last bits, and a rounding can turn on them.
        torch.testing.assert_close(run(x[:size]), whole[:size], atol=2e-2, rtol=1e-2)


def test_images_get_the_same_answer_as_in_torch(exported):
    x = images(64, seed=7)

    found, expected = onnx_predictor(exported.path)(x), exported.model(x)

    # Where the bias is int32 its rounding differs from torch's float bias; a random model has
    # images between two classes.
    least = 0.99 if exported.model.recipe.scheme.weight_bits < 8 else 0.9
    assert (found.argmax(1) == expected.argmax(1)).double().mean() >= least


def test_weights_are_stored_in_the_narrowest_type(exported):
    model, graph = load_file(exported.path)
    bits = exported.model.recipe.scheme.weight_bits
    direct = exported.result.target == "generic"

    found = Counter(
        TensorProto.DataType.Name(t.data_type)
        for name, t in graph.initializers.items()
        if name.endswith(".codes")
    )

    expected = "INT8" if bits > 4 else "INT4"
    if bits == 2 and not direct:
        expected = "INT2"
    assert found == {expected: 10}
    assert exported.result.opset == (25 if expected == "INT2" else 21)
    assert model.opset_import[0].version == exported.result.opset


def test_stored_codes_are_those_of_the_model(exported):
    _, graph = load_file(exported.path)

    for node in graph.of_type("DequantizeLinear"):
        source = graph.made_by.get(node.input[0])
        name = node.input[0] if source is None else source.input[0]
        if not name.endswith(".codes"):
            continue
        values = numpy_helper.to_array(graph.initializers[name]).astype(np.int16)
        points = numpy_helper.to_array(graph.initializers[node.input[2]]).astype(np.int16)
        target = f"quantizers.{name.removesuffix('.codes').replace('.', '_')}"
        quantizer = exported.model.graph.quantizers()[target]
        codes = exported.model.graph.parameter(name.removesuffix(".codes")).numpy()
        shape = (-1,) + (1,) * (codes.ndim - 1)
        # Unsigned codes are shifted, and their zero points with them.
        expected = codes.astype(np.int16) - quantizer.zero_point.numpy().reshape(shape)
        assert (values - points.reshape(shape) == expected).all()


def test_every_linear_reads_one_scalar_scale_and_zero_point(exported):
    _, graph = load_file(exported.path)
    op = "Gemm" if exported.result.target == "ort-cpu" else "MatMul"

    for linear in LINEARS:
        node = graph.named(linear)
        dequantize = graph.behind_reshapes(node.input[0])
        scale, point = (graph.initializers[name] for name in dequantize.input[1:])
        assert node.op_type == op
        assert dequantize.op_type == "DequantizeLinear"
        assert (list(scale.dims), list(point.dims)) == ([], [])
        assert scale.data_type == TensorProto.FLOAT


def test_activations_are_unsigned_bytes(exported):
    _, graph = load_file(exported.path)
    affine = [
        q
        for q in exported.model.graph.quantizers().values()
        if isinstance(q, Affine) and not q.frozen
    ]

    found = graph.of_type("QuantizeLinear")

    assert {node.name for node in found} == {q.site for q in affine}
    for node in found:
        assert graph.initializers[node.input[2]].data_type == TensorProto.UINT8


def test_logarithmic_table_is_the_quantizers_bit_for_bit(exported):
    _, graph = load_file(exported.path)
    tables = [q for q in exported.model.graph.quantizers().values() if isinstance(q, Codebook)]

    for quantizer in tables:
        codes = graph.named(quantizer.site)
        (gather,) = [n for n in graph.of_type("Gather") if codes.output[0] in n.input]
        table = torch.from_numpy(
            numpy_helper.to_array(graph.initializers[gather.input[0]]).copy()
        )
        bits = quantizer.spec.bits
        assert len(table) == 2**bits
        assert torch.equal(table, quantizer.unit_table() * quantizer.scale)
        assert torch.equal(table, parity_table(quantizer.scale, bits=bits, strict=True))

    assert len(tables) == (2 if exported.model.recipe.name == "repq_vit" else 0)


def test_codes_at_every_quantizer_equal_those_of_torch(exported):
    assert_codes_agree(exported.path, exported.model, images(64, seed=7))


def test_file_says_what_it_is(export, models):
    exported = export("deploy", "W8A8", "ort-cpu")
    model, _ = load_file(exported.path)

    (entry,) = [p for p in model.metadata_props if p.key == METADATA_KEY]

    assert json.loads(entry.value) == {
        "model": "tiny",
        "recipe": "deploy-w8a8",
        "preprocessing": None,
    }


def test_narrow_weights_make_small_files(export):
    sizes = {
        scheme: export("deploy", scheme, "ort-cpu").result.size_bytes
        for scheme in ("W8A8", "W4A8", "W2A8")
    }

    # 17 k linear weights; the rest (convolution included) is a fixed part.
    assert sizes["W8A8"] - sizes["W4A8"] > 8000
    assert sizes["W4A8"] - sizes["W2A8"] > 4000


def test_bias_of_eight_bit_linears_is_int32(export):
    _, graph = load_file(export("deploy", "W8A8", "ort-cpu").path)

    for linear in LINEARS:
        bias = graph.made_by[graph.named(linear).input[2]]
        assert bias.op_type == "DequantizeLinear"
        assert graph.initializers[bias.input[0]].data_type == TensorProto.INT32


@pytest.mark.parametrize(("recipe", "scheme"), [("deploy", "W4A8"), ("repq_vit", "W4A4")])
def test_narrow_linears_have_an_exact_int32_bias(export, recipe, scheme):
    """Steps of s_x s_w are coarse there; the graph holds whole steps, so none is rounded."""
    exported = export(recipe, scheme, "ort-cpu")
    _, graph = load_file(exported.path)

    assert all(len(graph.named(linear).input) == 3 for linear in LINEARS)
    assert exported.result.verification.code_mismatch < 1e-4
    assert exported.result.verification.in_step_cosine > 1.0 - 1e-9


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

    result = model.export_onnx(tmp_path / "m.onnx", images=images(4, seed=3))

    _, graph = load_file(tmp_path / "m.onnx")
    assert all(len(graph.named(linear).input) == 2 for linear in LINEARS)
    assert result.verification.integer_linears == len(LINEARS)
    assert result.verification.code_mismatch < 1e-4


@pytest.fixture(scope="module")
def overflowing(vit_graph, source, tmp_path_factory):
    """A file whose first fc1 has steps too small for its bias, and a named output."""
    graph = vit_graph.clone()
    graph.output_names = ("logits",)
    graph.set_parameter("blocks.0.fc1.weight", 1e-7 * graph.parameter("blocks.0.fc1.weight"))
    graph.set_parameter("blocks.0.fc1.bias", 10 * graph.parameter("blocks.0.fc1.bias"))
    path = tmp_path_factory.mktemp("overflow") / "m.onnx"
    result = quantized(graph, source, bits=8).export_onnx(path, images=images(8, seed=3))
    return result, path


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
def shared(source, tmp_path_factory):
    """Return the verification and the graph of a file of shared paths and tensors."""
    torch.manual_seed(0)
    model = enliven(Shared())
    for pair in (model.biased, model.zeros):
        pair[1].bias = pair[0].bias
    torch.nn.init.zeros_(model.zeros[0].bias)
    path = tmp_path_factory.mktemp("shared") / "m.onnx"
    compressed = quantized(capture(model, images(2)), source, bits=8)
    result = compressed.export_onnx(path, images=images(8, seed=3))
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


MIXED = {
    "schema": 1,
    "name": "mixed",
    "scheme": "W4A8",
    "passes": [
        {
            "pass": "attach",
            "rules": [
                {
                    "roles": ["weight"],
                    "bits": 4,
                    "granularity": "per_group",
                    "group_size": 16,
                    "symmetric": True,
                },
                {"roles": ["query", "key", "value"], "granularity": "per_head", "bits": 6},
                {"roles": ["probs"], "format": "log2", "bits": 3},
                {"roles": ["act_output"], "symmetric": True, "bits": 5},
                {"roles": ["norm_output"], "granularity": "per_channel", "symmetric": True},
                {"roles": ["proj_input"], "bits": 7},
                {"roles": ["patch_input"], "symmetric": True},
                {"sites": ["patch_embed:weight"], "granularity": "per_channel"},
            ],
        },
        {"pass": "calibrate", "method": "minmax"},
        {"pass": "freeze"},
    ],
}


@pytest.fixture(scope="module")
def mixed(vit_graph, source):
    model = quantized(vit_graph, source, recipe=vitcompress.Recipe.from_dict(MIXED))
    return model, exporter.marked_model(model.graph, opset=21)


@pytest.mark.parametrize("target", TARGETS)
def test_groups_heads_signs_and_powers_of_two_are_written(
    mixed, tmp_path, monkeypatch, target
):
    model, trace = mixed
    monkeypatch.setattr(exporter, "marked_model", lambda *_, **__: trace.clone())
    path = tmp_path / "m.onnx"

    result = model.export_onnx(path, target=target, images=images(16, seed=3))

    proto, graph = load_file(path)
    onnx.checker.check_model(proto, full_check=True)
    blocks = [
        attribute.i
        for node in graph.of_type("DequantizeLinear")
        for attribute in node.attribute
        if attribute.name == "block_size" and attribute.i
    ]
    heads = graph.named("blocks.0.attn:query")
    assert blocks == [16] * len(LINEARS)
    assert list(graph.initializers[heads.input[1]].dims) == [2]
    assert result.verification.max_difference < 1e-3
    assert result.verification.top1_agreement_percent == 100.0
    assert set(result.verification.float_linears) <= set(LINEARS)
    if target == "ort-cpu":
        reasons = result.verification.float_linears
        assert reasons["blocks.0.fc1"] == "its input is quantized as s8 per_channel"
        assert reasons["blocks.0.fc2"] == "its weight is quantized as s4 per_group(16)"
        assert ExportEntry.of(result).execution == "simulated"
    assert_codes_agree(path, model, images(16, seed=3))


def test_swin_is_written_and_verified(tmp_path):
    source = make_source(zoo_images("timm_swin", 8))
    model = quantized(zoo_graph("timm_swin"), source, scheme="W4A4")
    path = tmp_path / "swin.onnx"

    result = model.export_onnx(path, images=zoo_images("timm_swin", 8))

    found = result.verification
    assert found.cosine > 0.99
    # Two blocks and a half: qkv, proj, fc1, fc2, one patch merging, the head.
    assert (found.integer_linears, found.float_linears) == (found.linears, {})
    assert found.linears == 3 * 4 + 1 + 1
    assert onnx_predictor(path)(zoo_images("timm_swin", 1)).shape == (1, 10)
