"""ERQ as a pass: it undoes activation error where it has the data, and rounds what follows."""

import pytest
import torch
from tiny import make_source, run_pass, run_steps, smooth_images

from vitcompress.errors import ConfigError
from vitcompress.numerics.rounding import Grid
from vitcompress.passes import Erq
from vitcompress.passes.base import quantizers_of
from vitcompress.passes.erq import ErqConfig, rounded_by_halves

STEPS = [
    {
        "pass": "attach",
        "rules": [
            {"roles": ["weight"], "bits": 4, "granularity": "per_channel"},
            {"roles": ["norm_output", "proj_input", "act_output", "head_input"], "bits": 3},
            {"roles": ["patch_input"], "bits": 8},
        ],
    },
    {"pass": "calibrate"},
]


@pytest.fixture(scope="module")
def many():
    return make_source(smooth_images(48, seed=3), batch_size=8)


@pytest.fixture(scope="module")
def plain(vit_graph, many):
    return run_steps(STEPS, vit_graph, many)[0]


def logits_error(graph, reference, seed):
    x = smooth_images(32, seed=seed)
    return (graph.logits(x) - reference.logits(x)).square().mean().item()


def test_logits_come_closer_on_unseen_images(vit_graph, plain, many):
    repaired = plain.clone()

    report = run_pass(Erq(ErqConfig()), repaired, many)

    assert report.changed == report.found == 10
    assert logits_error(repaired, vit_graph, 4) < 0.8 * logits_error(plain, vit_graph, 4)


def test_the_first_step_alone_brings_them_closer_and_leaves_weights_off_the_grid(
    vit_graph, plain, many
):
    corrected = plain.clone()

    run_pass(Erq(ErqConfig(round_weights=False)), corrected, many)

    assert logits_error(corrected, vit_graph, 4) < logits_error(plain, vit_graph, 4)
    quantizer = next(q for q in quantizers_of(corrected).values() if "fc1:weight" in q.site)
    weight = corrected.parameter("blocks.0.fc1.weight")
    assert (quantizer(weight) - weight).abs().max() > 0.1 * quantizer.scale.min()


def test_what_is_left_of_the_activation_error_is_reported_and_below_one(plain, many):
    report = run_pass(Erq(ErqConfig()), plain.clone(), many)

    left = report.details["activation_error_left"]
    assert len(left) == 9
    assert all(0.0 < share < 1.0 for share in left.values())


def test_a_head_that_reads_one_token_of_each_image_is_not_corrected(plain, many):
    # 32 images, 32 channels: a regression would go through every point.
    report = run_pass(Erq(ErqConfig()), plain.clone(), many)
    bold = run_pass(Erq(ErqConfig(rows_per_column=1.0)), plain.clone(), many)

    assert report.details["not_corrected"] == ["head"]
    assert bold.details["not_corrected"] == []


def test_an_infinite_ridge_leaves_the_first_step_without_effect(plain, many):
    unchanged = plain.clone()

    run_pass(Erq(ErqConfig(activation_strength=1e12, round_weights=False)), unchanged, many)

    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(unchanged.parameter(name), tensor, rtol=1e-5, atol=1e-7)


def test_inputs_are_those_of_the_float_network(vit_graph, plain, many):
    # The correction of a layer must not depend on how coarse the layers before it are.
    name = "blocks.1.fc2.weight"
    found = []
    for bits in (2, 4):
        rules = [
            {"sites": ["blocks.0.*:weight"], "bits": bits},
            {"sites": ["blocks.1.fc2:weight"], "bits": 4},
            {"sites": ["blocks.1.fc2:input"], "bits": 3},
        ]
        steps = [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}]
        graph, _ = run_steps(steps, vit_graph, many)
        run_pass(Erq(ErqConfig(round_weights=False)), graph, many)
        found.append(graph.parameter(name))

    assert torch.equal(*found)
    assert not torch.allclose(found[0], vit_graph.parameter(name), rtol=1e-3)


def test_float_inputs_need_no_correction(vit_graph, many):
    rules = [{"roles": ["weight"], "bits": 4, "granularity": "per_channel"}]
    steps = [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}]
    plain, _ = run_steps(steps, vit_graph, many)
    repaired = plain.clone()

    report = run_pass(Erq(ErqConfig()), repaired, many)

    assert report.details["activation_error_left"] == {}
    assert logits_error(repaired, vit_graph, 4) < logits_error(plain, vit_graph, 4)


def test_the_bias_is_never_rounded_by_halves():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 9, generator=generator).double()
    # A mean far from zero: most of the error is a constant, which the bias can take back.
    x = torch.randn(200, 8, generator=generator).double() + 3.0
    x = torch.cat([x, torch.ones(200, 1)], dim=1)
    shape = (4, 8)
    grid = Grid(torch.full(shape, 0.5).double(), torch.full(shape, 8.0).double(), 0, 15)

    found = rounded_by_halves(matrix, x.T @ x / 200, grid, 8, ErqConfig())

    steps = found[:, :8] / 0.5
    torch.testing.assert_close(steps, steps.round())
    assert ((found[:, 8] / 0.5) % 1 != 0).all()
    nearest = matrix.clone()
    nearest[:, :8] = grid.nearest(matrix[:, :8], slice(None))
    before, after = ((x @ (m - matrix).T).square().mean() for m in (nearest, found))
    assert after < 0.5 * before


def test_bounds_of_the_settings():
    for setting in ("activation_strength", "weight_strength"):
        with pytest.raises(ConfigError, match=setting):
            ErqConfig(**{setting: 0.0})
    with pytest.raises(ConfigError, match="rows_per_column"):
        ErqConfig(rows_per_column=0.5)
    with pytest.raises(ConfigError, match="refinements"):
        ErqConfig(refinements=-1)
    with pytest.raises(ConfigError, match="output_mse"):
        ErqConfig(method="output_mse")
