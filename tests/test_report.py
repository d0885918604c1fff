import json

import pytest
import torch
from finished import quantized
from tiny import make_source, run_steps

import vitcompress
from vitcompress.calibration.interpreter import run
from vitcompress.errors import ArtifactError
from vitcompress.measure import measure_activations
from vitcompress.recipe import load_recipe
from vitcompress.report import CompressionReport, site_entries, size_of


@pytest.fixture(scope="module")
def model(vit_graph, source):
    return quantized(vit_graph, source, bits=4, recipe="deploy")


@pytest.fixture(scope="module")
def report(model):
    return model.report


def test_report_survives_json(report):
    assert CompressionReport.from_json(report.to_json()) == report


@pytest.fixture(scope="module")
def usual(vit_graph, source):
    """The report of who names no recipe."""
    return quantized(vit_graph, source, bits=4).report


def test_noise_of_weights_is_that_of_their_rounding_under_the_default_recipe(usual):
    noise = [site.sqnr_db for site in usual.sites if site.role == "weight"]

    assert len(noise) == 10
    assert all(5.0 < value < 40.0 for value in noise)


def test_report_of_the_default_recipe_survives_json(usual):
    assert CompressionReport.from_json(usual.to_json()) == usual


def test_report_of_an_exact_site_survives_json(report):
    """A site without noise has an infinite ratio, which JSON has no number for."""
    exact = report.sites[0].model_copy(update={"sqnr_db": float("inf")})
    changed = report.model_copy(update={"sites": (exact, *report.sites[1:])})

    found = CompressionReport.from_json(changed.to_json())

    assert found.sites[0].sqnr_db == float("inf")
    json.loads(changed.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda r: r.update(speedup=3.0), "speedup: Extra inputs are not permitted"),
        (lambda r: r["size"].update(megabytes=1), r"size\.megabytes: Extra"),
        (lambda r: r["sites"][2].update(colour="red"), r"sites\.2\.colour: Extra"),
        (lambda r: r.pop("size"), "size: Field required"),
        (lambda r: r.update(scheme=3), "scheme: Input should be a valid string"),
        (lambda r: r.update(schema_version=7), "schema_version 7; this version reads 1"),
    ],
)
def test_report_of_another_layout_is_refused_with_the_place(report, edit, reason):
    content = json.loads(report.to_json())
    edit(content)

    with pytest.raises(ArtifactError, match=reason) as caught:
        CompressionReport.from_json(json.dumps(content), "out/report.json")

    assert str(caught.value).startswith("out/report.json: ")


def test_report_of_an_earlier_version_lacks_the_command_and_is_read(report):
    content = json.loads(report.to_json())
    for name in ("model_digest", "resolved_recipe", "command"):
        del content["protocol"][name]

    found = CompressionReport.from_json(json.dumps(content))

    assert found.protocol.model_digest is None
    assert found.protocol.seed == report.protocol.seed


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_text_that_is_no_report_is_refused(text):
    with pytest.raises(ArtifactError, match=r"report\.json"):
        CompressionReport.from_json(text)


def test_protocol_says_under_which_conditions_the_figures_hold(model, report, source):
    protocol = report.protocol

    assert protocol.sample_ids == tuple(f"array[{n}]" for n in range(8))
    assert protocol.source_digest == source.digest()
    assert protocol.source == source.describe()
    assert len(protocol.model_digest) == 64
    assert protocol.resolved_recipe == model.recipe.to_yaml()
    assert protocol.command is None
    assert protocol.preprocessing is None
    assert protocol.seed == 0
    assert protocol.versions["torch"] == torch.__version__
    assert (report.model, report.recipe, report.scheme) == ("tiny", "deploy-w4a8", "W4A8")
    assert report.execution == "simulated"


def test_every_pass_and_stage_has_time_and_memory(report):
    names = [entry.name for entry in report.passes]

    assert names == [
        "attach",
        "calibrate",
        "repq_vit",
        "refine_ranges",
        "integer_bias",
        "freeze",
    ]
    assert [s.name for s in report.stages] == [
        *("read images", "capture", "compress", "measure", "compare"),
    ]
    for entry in (*report.passes, *report.stages):
        assert entry.seconds >= 0.0
        assert entry.peak_memory_bytes > 10_000_000


def test_skipped_sites_are_counted_with_their_reasons(report):
    attach, freeze = report.passes[0], report.passes[-1]

    # Per block 4 linears of two edges, 4 operands of attention; patch embedding and head.
    assert attach.found == 2 * (4 * 2 + 4) + 2 + 2 == len(report.sites)
    assert attach.skipped == {
        f"blocks.{i}.attn:{role}": "skipped by a rule"
        for i in (0, 1)
        for role in ("query", "key", "probs", "value")
    }
    assert attach.changed == attach.found - 8
    assert (freeze.changed, freeze.found) == (10, 10)


def test_norms_that_were_not_folded_are_counted(vit_graph, source):
    report = quantized(vit_graph, source, recipe="repq_vit").report
    (entry,) = [p for p in report.passes if p.name == "repq_vit"]

    # The final norm feeds the head, which is quantized per tensor from the start.
    assert (entry.changed, entry.found) == (4, 5)
    assert list(entry.skipped) == ["norm"]
    assert entry.function_change is not None
    assert entry.function_change < 1e-4


def test_sites_name_format_role_and_noise(report):
    by_name = {site.site: site for site in report.sites}

    weight, skipped = by_name["blocks.0.fc1:weight"], by_name["blocks.0.attn:probs"]
    activation = by_name["blocks.0.fc1:input"]

    assert (weight.role, weight.spec, weight.bits) == ("weight", "u4 per_channel", 4)
    assert weight.sqnr_db == pytest.approx(20.0, abs=6.0)
    assert weight.rms is None
    assert (skipped.role, skipped.spec, skipped.bits, skipped.sqnr_db) == (
        "probs",
        None,
        None,
        None,
    )
    assert (activation.role, activation.operation) == ("norm_output", "linear")
    assert activation.sqnr_db == pytest.approx(38.0, abs=8.0)
    assert activation.low < 0 < activation.high


def test_worst_sites_are_in_order_of_noise(report):
    worst = report.worst_sites(4)

    noise = [site.sqnr_db for site in report.sites if site.sqnr_db is not None and site.rms]
    assert [site.sqnr_db for site in worst] == sorted(noise)[:4]
    assert all(site.role != "weight" for site in worst)
    assert len(report.worst_sites(100)) == len(noise)


@pytest.mark.parametrize(("block", "unit"), [(0, 5), (1, 40)])
def test_worst_site_is_the_one_with_a_lone_outlier_channel(vit_graph, source, block, unit):
    graph = vit_graph.clone()
    name = f"blocks.{block}.fc1"
    for part in ("weight", "bias"):
        value = graph.parameter(f"{name}.{part}").clone()
        value[unit] *= 100
        graph.set_parameter(f"{name}.{part}", value)
    reader = graph.parameter(f"blocks.{block}.fc2.weight").clone()
    reader[:, unit] /= 100
    graph.set_parameter(f"blocks.{block}.fc2.weight", reader)

    worst = quantized(graph, source, recipe="deploy").report.worst_sites(1)[0]

    assert worst.site == f"blocks.{block}.fc2:input"
    assert worst.peak_channel == unit
    assert worst.peak_ratio > 10 * worst.runner_up_ratio


def test_measurements_by_hand(vit_graph):
    x = torch.zeros(2, 3, 32, 32)
    x[0, 1, 4, 5], x[1, 0, 3, 30] = -6.0, 2.0

    found = measure_activations(vit_graph, make_source(x, batch_size=1))["patch_embed:input"]

    rms = ((36 + 4) / x.numel()) ** 0.5
    assert (found.low, found.high) == (-6.0, 2.0)
    assert found.rms == pytest.approx(rms)
    assert found.peak_ratio == pytest.approx(6 / rms)
    assert found.sqnr_db is None


def test_noise_by_hand(vit_graph, source):
    rules = [{"roles": ["norm_output"], "bits": 4}]
    steps = [{"pass": "attach", "rules": rules}, {"pass": "calibrate", "method": "minmax"}]
    graph, _ = run_steps(steps, vit_graph, source)
    target = "quantizers.blocks_0_attn_qkv_input"
    (node,) = graph.graph.find_nodes(op="call_module", target=target)

    found = measure_activations(graph, source)["blocks.0.attn.qkv:input"]

    values = []
    for batch in source:
        run(graph, batch.images, taps={node.args[0]: values.append})
    x = torch.cat(values)
    noise = (graph.quantizers()[target](x) - x).double().square().sum()
    expected = 10 * torch.log10(x.double().square().sum() / noise)
    assert found.sqnr_db == pytest.approx(float(expected), abs=1e-3)
    assert found.rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-6)


def test_sizes_by_hand(report):
    size = report.size

    weights = 32 * 3 * 64 + 2 * (96 * 32 + 32 * 32 + 64 * 32 + 32 * 64) + 10 * 32
    rows = 32 + 2 * (96 + 32 + 64 + 32) + 10
    biases = rows
    others = 32 + 17 * 32 + 5 * 2 * 32
    activations = 2 * 4 + 2
    parameters = 2 * (rows + activations)
    assert size.quantized_weights == weights
    assert size.float_weights == biases + others
    assert size.float_bytes == 4 * (weights + biases + others)
    assert size.stored_bytes == weights // 2 + 4 * (biases + others) + 4 * parameters
    assert size.ratio == pytest.approx(size.stored_bytes / size.float_bytes, abs=1e-4)
    assert size.quantized_weight_bits == 4.0
    assert size.bits_per_weight == pytest.approx(
        8 * size.stored_bytes / (weights + biases + others), abs=1e-3
    )


def test_float_leftovers_are_listed_largest_first(report):
    found = report.size.largest_float_tensors

    assert next(iter(found.items())) == ("pos_embed", 17 * 32 * 4)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(found) == 5
    assert not any(name.endswith("weight") and "norm" not in name for name in found)


def test_weight_that_stays_float_is_a_leftover(vit_graph, source):
    rules = [
        {"roles": ["weight"], "bits": 4},
        {"sites": ["head:weight", "patch_embed:weight"], "skip": True},
    ]
    steps = [
        {"pass": "attach", "rules": rules},
        {"pass": "calibrate", "method": "minmax"},
        {"pass": "freeze"},
    ]
    graph, records = run_steps(steps, vit_graph, source)

    size = size_of(graph, 1)
    sites = {site.site: site for site in site_entries(graph, {}, {})}

    assert next(iter(size.largest_float_tensors)) == "patch_embed.weight"
    assert sites["patch_embed:weight"].spec is None
    assert records[0].report.skipped["head:weight"] == "skipped by a rule"


def test_agreement_on_the_calibration_images_is_reported(report):
    (entry,) = report.evaluations

    assert entry.data.startswith("calibration: ")
    assert entry.images == 8
    assert not entry.labelled
    assert entry.top1_percent is None
    assert 0.0 <= entry.agreement_percent <= 100.0
    assert entry.mean_kl >= 0.0


def test_report_is_the_same_twice_but_for_time_and_memory(vit_graph, source):
    def figures():
        content = json.loads(quantized(vit_graph, source, bits=4).report.to_json())
        for entry in (*content["passes"], *content["stages"], *content["evaluations"]):
            entry.pop("seconds")
            entry.pop("peak_memory_bytes", None)
        return content

    assert figures() == figures()


def test_report_opens_without_the_model(model, tmp_path):
    model.save(tmp_path / "a")

    text = (tmp_path / "a" / "report.json").read_text()

    assert CompressionReport.from_json(text) == model.report
    assert load_recipe(tmp_path / "a" / "recipe.yaml").label == model.report.recipe
    assert vitcompress.load(tmp_path / "a").report.worst_sites() == model.report.worst_sites()
