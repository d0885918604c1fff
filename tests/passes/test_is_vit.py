"""I&S-ViT in three stages; item numbers are those of the method's test list."""

import pytest
import torch
from tiny import images, make_source, relative_error, run_pass, run_steps, smooth_images
from zoo import zoo_graph, zoo_images

from vitcompress.calibration.interpreter import run
from vitcompress.demo import load_digits, load_model
from vitcompress.engine import LocalEngine
from vitcompress.errors import ConfigError
from vitcompress.graph import capture, enumerate_sites
from vitcompress.passes import Calibrate, RepqVit
from vitcompress.passes.calibrate import CalibrateConfig
from vitcompress.passes.is_vit import IsVitConfig, float_weights
from vitcompress.passes.repq_vit import RepqVitConfig
from vitcompress.quantizers import PerChannel, PerTensor, Sulq

ATTACH = {
    "pass": "attach",
    "rules": [
        {"roles": ["weight"], "bits": "w", "granularity": "per_channel"},
        {"roles": ["query", "key", "value", "proj_input", "act_output"], "bits": "a"},
        {"roles": ["head_input", "other"], "bits": "a"},
        {"roles": ["norm_output"], "bits": "a", "granularity": "per_channel"},
        {"roles": ["probs"], "bits": "a", "format": "sulq"},
    ],
}
STEP = {
    "pass": "is_vit",
    "iterations": 60,
    "rate": 1e-3,
    "batch_size": 16,
    "calibration_images": 32,
    "device": "cpu",
}
FOLDED = [f"blocks.{i}.{name}:input" for i in (0, 1) for name in ("attn.qkv", "fc1")]


def norms_of(graph):
    return {n: v.clone() for n, v in graph.tensors().items() if "norm" in n}


class Recorder(LocalEngine):
    """Notes what each walk through the blocks was given and what it left."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def map_blocks(self, graph, teacher, source, fit, *, inputs, **settings):
        sites = enumerate_sites(graph).values()
        quantizers = graph.quantizers()
        stage = {
            "inputs": inputs,
            "weights quantized": any(
                hasattr(quantizers[s.quantizer], "spec") for s in sites if s.stored
            ),
            "activations quantized": all(
                quantizers[s.quantizer].calibrated
                for s in sites
                if s.quantizer and not s.stored
            ),
            "before": parameters_of_activations(graph),
            "norms before": norms_of(graph),
            "blocks": [],
        }

        def noted(task):
            rows = (task.inputs or task.float_inputs)[0]
            outcome = fit(task)
            stage["blocks"].append((task.path, rows.take(torch.arange(4)), outcome))
            return outcome

        records = super().map_blocks(graph, teacher, source, noted, inputs=inputs, **settings)
        stage["after"] = parameters_of_activations(graph)
        stage["norms after"] = norms_of(graph)
        self.stages.append(stage)
        return records


def parameters_of_activations(graph):
    return {
        site.name: {n: getattr(q, n).clone() for n in q.parameter_names}
        for site in enumerate_sites(graph).values()
        if site.quantizer and not site.stored
        for q in [graph.quantizers()[site.quantizer]]
    }


@pytest.fixture(scope="module")
def many():
    return make_source(smooth_images(128, seed=2), batch_size=32)


@pytest.fixture(scope="module")
def tuned(vit_graph, many):
    """The tiny ViT at W3A3: graph, report, stages."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitcompress.engine.pipeline.LocalEngine", lambda *_: recorder)
        graph, records = run_steps([ATTACH, STEP], vit_graph, many, "W3A3")
    return graph, records[-1].report, recorder.stages


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[site][n], right[site][n]) for site in left for n in left[site]
    )


# Item 5: the order of the stages


def test_float_weights_learn_from_float_inputs_then_all_from_quantized_ones(tuned):
    _, _, (first, third) = tuned

    assert (first["inputs"], third["inputs"]) == ("float", "quantized")
    assert (first["weights quantized"], third["weights quantized"]) == (False, True)
    assert first["activations quantized"]
    assert third["activations quantized"]
    for stage in (first, third):
        paths = [path for path, *_ in stage["blocks"]]
        assert paths == ["patch_embed", "blocks.0", "blocks.1", "head"][-len(paths) :]


def test_what_a_block_reads_in_the_third_stage_depends_on_the_blocks_in_front(
    tuned, vit_graph, many
):
    _, _, (first, third) = tuned
    untuned = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitcompress.engine.pipeline.LocalEngine", lambda *_: untuned)
        run_steps([ATTACH, {**STEP, "rate": 0.0}], vit_graph, many, "W3A3")

    def read(stage, path):
        return next(x for found, x, _ in stage["blocks"] if found == path)

    again = untuned.stages
    assert torch.equal(read(first, "blocks.1"), read(again[0], "blocks.1"))
    assert not torch.equal(read(third, "blocks.1"), read(again[1], "blocks.1"))


def test_ranges_of_activations_change_once_and_those_behind_norms_alone(tuned):
    _, _, (first, third) = tuned

    assert same(first["before"], first["after"])
    assert same(third["before"], third["after"])
    changed = {
        site
        for site, parameters in first["after"].items()
        if not same({site: parameters}, {site: third["before"][site]})
    }
    assert changed == set(FOLDED)


def test_norms_change_in_the_second_stage_alone(tuned):
    _, report, (first, third) = tuned

    def equal(left, right):
        return {name for name in left if torch.equal(left[name], right[name])}

    assert equal(first["norms before"], first["norms after"]) == set(first["norms before"])
    assert equal(third["norms before"], third["norms after"]) == set(first["norms before"])
    unchanged = equal(first["norms after"], third["norms before"])
    assert unchanged == {"norm.weight", "norm.bias"}
    assert report.details["folded"] == [f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]


# Item 6: the second stage is lossless


def stage_one(vit_graph, many):
    """Return the tiny ViT with activations calibrated by channel, weights in float."""
    graph = run_steps([ATTACH], vit_graph, many, "W3A4")[0]
    with float_weights(graph):
        run_pass(Calibrate(CalibrateConfig(method="percentile", sequential=True)), graph, many)
    return graph


@pytest.mark.parametrize(("mode", "low", "high"), [("strict", 0, 1e-4), ("paper", 1e-2, 1)])
def test_the_fold_keeps_the_answers_unless_its_zero_point_is_no_code(
    vit_graph, many, mode, low, high
):
    graph, x = stage_one(vit_graph, many), images(32, seed=5)
    with float_weights(graph):
        expected = graph(x)

    run_pass(RepqVit(RepqVitConfig(mode=mode)), graph, many)

    with float_weights(graph):
        assert low <= relative_error(graph(x), expected) <= high
    site = enumerate_sites(graph)[FOLDED[0]]
    quantizer = graph.quantizers()[site.quantizer]
    assert type(quantizer.spec.granularity) is PerTensor


def test_weights_are_float_only_for_a_while(vit_graph, many):
    graph = run_steps([ATTACH, {"pass": "calibrate"}], vit_graph, many, "W2A8")[0]
    x = images(4)
    expected = graph(x)

    with float_weights(graph):
        inside = graph(x)

    assert torch.equal(graph(x), expected)
    weights = {s.quantizer for s in enumerate_sites(graph).values() if s.stored}
    nodes = {n: (lambda v: v) for n in graph.graph.nodes if str(n.target) in weights}
    assert torch.equal(run(graph, x, replaced=nodes)[0], inside)
    assert (inside - expected).abs().max() > 0.1


# Item 7: training helps


@pytest.mark.parametrize("stage", ["stage_1", "stage_3"])
def test_the_loss_of_blocks_falls_and_so_does_their_error_on_held_out_images(tuned, stage):
    _, report, _ = tuned
    blocks = report.details[stage]["blocks"]

    for path in ("blocks.0", "blocks.1"):
        assert blocks[path]["loss_last"] < 0.9 * blocks[path]["loss_first"]
        assert blocks[path]["held_out_after"] < blocks[path]["held_out_before"]


@pytest.mark.slow
def test_on_a_trained_network_the_loss_of_every_block_falls_below_seven_tenths():
    graph = capture(load_model(), load_digits("train")[0][:2])
    source = make_source(load_digits("train")[0][:128], batch_size=32)
    step = {**STEP, "iterations": 400, "rate": 2e-3, "held_out": 0.25}

    _, records = run_steps([ATTACH, step], graph, source, "W3A3")

    for stage in ("stage_1", "stage_3"):
        blocks = records[-1].report.details[stage]["blocks"]
        for path in (f"blocks.{i}" for i in range(6)):
            assert blocks[path]["loss_last"] < 0.7 * blocks[path]["loss_first"]
            assert blocks[path]["held_out_after"] < blocks[path]["held_out_before"]


def test_the_patch_embedding_is_untouched_in_the_first_stage(tuned):
    _, report, (first, third) = tuned
    (_, _, before), *_ = first["blocks"]
    (_, _, after), *_ = third["blocks"]

    assert "nothing to train yet" in before.details["untrained"]["all"]
    assert "patch_embed.weight" in after.tensors
    assert "held_out_after" in report.details["stage_3"]["blocks"]["patch_embed"]


def test_three_stages_beat_one_and_none(vit_graph, many, tuned):
    """Item 8 on a toy: no training, then weights and all from the start, then three stages."""
    x = smooth_images(256, seed=9)
    expected = vit_graph(x)
    one = {
        "pass": "reconstruct",
        "weights": "straight_through",
        "iterations": 60,
        "weight_rate": 1e-3,
        "bias_rate": 1e-3,
        "scale_rate": 0.0,
        "batch_size": 16,
        "quantized_input": 1.0,
        "quantized_inside": 1.0,
        "device": "cpu",
    }
    calibrated = [
        ATTACH,
        {"pass": "calibrate", "sequential": True, "method": "percentile", "images": 32},
        {"pass": "repq_vit"},
    ]

    def error(graph):
        return (graph(x) - expected).square().mean()

    none = error(run_steps(calibrated, vit_graph, many, "W3A3")[0])
    single = error(run_steps([*calibrated, one], vit_graph, many, "W3A3")[0])

    assert error(tuned[0]) < none
    assert single < none


# The rest


def test_the_result_is_strict_and_its_activations_per_tensor(tuned):
    graph, _, _ = tuned

    quantizers = graph.quantizers().values()
    assert all(quantizer.defect() is None for quantizer in quantizers)
    assert sum(isinstance(quantizer, Sulq) for quantizer in quantizers) == 2
    for site in enumerate_sites(graph).values():
        if site.quantizer:
            granularity = graph.quantizers()[site.quantizer].spec.granularity
            assert type(granularity) is (PerChannel if site.stored else PerTensor)


def test_the_shift_is_searched_by_the_product_with_the_values(vit_graph, many):
    graph = stage_one(vit_graph, many)
    site = enumerate_sites(graph)["blocks.0.attn:probs"]
    value = enumerate_sites(graph)["blocks.0.attn:value"]
    seen = {}
    batch = torch.cat([b.images for b in many])
    with float_weights(graph):
        taps = {s.value: (lambda v, n=s.name: seen.update({n: v})) for s in (site, value)}
        run(graph, batch, taps=taps)
    chosen = graph.quantizers()[site.quantizer]
    probs, values = seen[site.name], seen[value.name]
    expected = probs @ values

    again = Sulq(chosen.spec, "again")
    errors = again.search(probs, lambda p: p @ values)

    assert again.shift == chosen.shift
    found = (chosen(probs) @ values - expected).square().mean().item()
    assert found == pytest.approx(min(errors.values()), rel=1e-3)


def test_a_hierarchical_network_goes_through_all_stages():
    source = make_source(zoo_images("timm_swin", 8))
    step = {**STEP, "iterations": 1, "batch_size": 4}

    graph, records = run_steps([ATTACH, step], zoo_graph("timm_swin"), source, "W4A4")

    report = records[-1].report
    assert len(report.details["folded"]) == 7
    assert len(report.details["stage_3"]["blocks"]) == 6
    assert torch.isfinite(graph.logits(zoo_images("timm_swin", 2))).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("iterations", 0), ("rate", -1.0), ("calibration_images", 0), ("held_out", 1.0)],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=key if key != "rate" else "weight_rate"):
        IsVitConfig(**{key: value})


def test_the_defaults_are_the_published_schedule():
    config = IsVitConfig()

    assert (config.iterations, config.rate, config.batch_size) == (1000, 4e-5, 64)
    assert config.activation_percentiles == (0.999, 0.9999, 0.99999)
    assert len(config.weight_percentiles) == 9
