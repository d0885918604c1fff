"""RepQ-ViT against its algebra; numbers in headings are those of the method's test list."""

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    enliven,
    float_outputs,
    images,
    make_source,
    relative_error,
    run_pass,
    run_steps,
    tiny_vit,
)
from torch import nn
from zoo import zoo_graph, zoo_images

from vitcompress.calibration import RangeConfig, search_range
from vitcompress.calibration.interpreter import run
from vitcompress.errors import ConfigError
from vitcompress.graph import capture, enumerate_sites
from vitcompress.numerics.metrics import sqnr_db
from vitcompress.passes import RepqVit
from vitcompress.passes.repq_vit import (
    RepqVitConfig,
    _united,
    fold_linear,
    fold_norm,
    fold_parameters,
)
from vitcompress.quantizers import Affine, PerChannel, PerTensor, QuantSpec, make_quantizer

STRICT, PAPER = RepqVitConfig(mode="strict"), RepqVitConfig(mode="paper")
BITS = 4
QMAX = 2**BITS - 1

ATTACH = {
    "pass": "attach",
    "rules": [
        {"roles": ["weight"], "bits": "w", "granularity": "per_channel"},
        {
            "roles": [
                "query",
                "key",
                "value",
                "proj_input",
                "act_output",
                "head_input",
                "other",
            ]
        },
        {"roles": ["norm_output"], "bits": "a", "granularity": "per_channel"},
        {"roles": ["probs"], "bits": "a", "format": "log_sqrt2"},
        {"roles": ["patch_input"], "bits": 8},
    ],
}
CALIBRATE = {"pass": "calibrate", "sequential": True, "method": "percentile"}
LINEARS_BEHIND_NORMS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "fc1")]


@pytest.fixture(scope="module")
def unbiased_graph():
    """The tiny ViT without biases in the linears behind its norms."""
    return capture(tiny_vit(bias=False), images(2))


def calibrated(graph, source, scheme="W4A4", attach=ATTACH, **calibrate):
    return run_steps([attach, {**CALIBRATE, **calibrate}], graph, source, scheme)[0]


def folded(graph, source, mode="strict", scheme="W4A4", **calibrate):
    step = {"pass": "repq_vit", "mode": mode}
    result, records = run_steps(
        [ATTACH, {**CALIBRATE, **calibrate}, step], graph, source, scheme
    )
    return result, records[-1]


def quantizer_at(graph, site):
    return graph.quantizers()[enumerate_sites(graph)[site].quantizer]


def codes_at(graph, sites, x):
    """Return the codes that the quantizers at ``sites`` give, on float inputs."""
    codes, taps, known = {}, {}, enumerate_sites(graph)
    for site in sites:
        quantizer = graph.quantizers()[known[site].quantizer]
        taps[known[site].value] = lambda value, s=site, q=quantizer: codes.update(
            {s: q.quantize(value)}
        )
    run(graph, x, taps=taps, bypass=True)
    return codes


def double_fold(config=STRICT, channels=24, seed=0, constant=()):
    """Return s and z of random per-channel ranges, and their fold, all float64."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(channels, generator=generator, dtype=torch.float64)
    width = torch.exp(0.8 * torch.randn(channels, generator=generator, dtype=torch.float64))
    scale = 4 * width / QMAX
    zero_point = torch.round(-(centre - 2 * width) / scale)
    degenerate = torch.zeros(channels, dtype=torch.bool)
    for channel in constant:
        scale[channel], zero_point[channel], degenerate[channel] = 1e-6, -1e6, True
    fold = fold_parameters(
        scale, zero_point, qmin=0, qmax=QMAX, degenerate=degenerate, config=config
    )
    return scale, zero_point, fold


def codes_of(x, scale, zero_point):
    return torch.clamp(torch.round(x / scale) + zero_point, 0, QMAX)


# Section 4, by hand


def test_fold_by_hand():
    scale = torch.tensor([0.1, 0.3], dtype=torch.float64)
    zero_point = torch.tensor([12.0, 3.0], dtype=torch.float64)
    alive = torch.zeros(2, dtype=torch.bool)

    fold = fold_parameters(
        scale, zero_point, qmin=0, qmax=QMAX, degenerate=alive, config=STRICT
    )

    assert fold.scale.item() == pytest.approx(0.2)
    assert fold.zero_point.item() == 8.0  # rne(7.5)
    assert fold.ratio.tolist() == pytest.approx([0.5, 1.5])
    # s * r2 = 0.1 * (12 - 8), 0.3 * (3 - 8): a channel that sits low moves up.
    assert fold.shift.tolist() == pytest.approx([0.4, -1.5])


def test_the_paper_keeps_the_mean_zero_point_as_a_real_number():
    scale = torch.tensor([0.1, 0.3], dtype=torch.float64)
    zero_point = torch.tensor([12.0, 3.0], dtype=torch.float64)
    alive = torch.zeros(2, dtype=torch.bool)

    fold = fold_parameters(
        scale, zero_point, qmin=0, qmax=QMAX, degenerate=alive, config=PAPER
    )

    assert fold.zero_point.item() == 7.5
    assert fold.shift.tolist() == pytest.approx([0.45, -1.35])


def test_norm_and_linear_by_hand():
    scale = torch.tensor([0.1, 0.3], dtype=torch.float64)
    zero_point = torch.tensor([12.0, 3.0], dtype=torch.float64)
    alive = torch.zeros(2, dtype=torch.bool)
    fold = fold_parameters(
        scale, zero_point, qmin=0, qmax=QMAX, degenerate=alive, config=STRICT
    )
    two = torch.tensor([2.0, 3.0], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)

    gamma, beta = fold_norm(two, torch.ones(2, dtype=torch.float64), fold)
    new_weight, new_bias = fold_linear(weight, torch.tensor([5.0], dtype=torch.float64), fold)

    assert gamma.tolist() == pytest.approx([4.0, 2.0])
    assert beta.tolist() == pytest.approx([2.8, -1 / 3])  # (1 + 0.4) / 0.5, (1 - 1.5) / 1.5
    assert new_weight.tolist() == [pytest.approx([0.5, 3.0])]
    # The correction multiplies the *old* weight: 5 - (1 * 0.4 + 2 * -1.5).
    assert new_bias.tolist() == pytest.approx([7.6])


def test_the_strict_zero_point_is_clamped_to_the_codes():
    scale = torch.ones(3, dtype=torch.float64)
    alive = torch.zeros(3, dtype=torch.bool)

    for offset, expected in ((-40.0, 0.0), (40.0, QMAX)):
        points = torch.full((3,), offset, dtype=torch.float64)
        fold = fold_parameters(
            scale, points, qmin=0, qmax=QMAX, degenerate=alive, config=STRICT
        )

        assert fold.zero_point.item() == expected


def test_extreme_ratios_are_clipped_and_the_algebra_stays_whole():
    scale = torch.tensor([1e-9, 1.0, 1.0], dtype=torch.float64)
    zero_point = torch.tensor([7.0, 7.0, 9.0], dtype=torch.float64)
    alive = torch.zeros(3, dtype=torch.bool)

    fold = fold_parameters(
        scale, zero_point, qmin=0, qmax=QMAX, degenerate=alive, config=STRICT
    )

    assert fold.ratio.min() == pytest.approx(1e-4)
    steps = fold.shift / (fold.ratio * fold.scale)
    torch.testing.assert_close(steps, steps.round(), rtol=0.0, atol=1e-9)


# 8.1 Float invariance


@pytest.mark.parametrize("shape", [(5, 7, 24), (2, 3, 4, 24)], ids=["3-D", "4-D"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [STRICT, PAPER], ids=["strict", "paper"])
def test_a_pair_of_norm_and_linear_is_unchanged_in_float64(config, bias, shape):
    _, _, fold = double_fold(config)
    x = torch.randn(shape, dtype=torch.float64)
    gamma, beta = torch.rand(24).double() + 0.1, torch.randn(24).double()
    weight = torch.randn(10, 24, dtype=torch.float64)
    offset = torch.randn(10, dtype=torch.float64) if bias else None
    expected = F.linear(F.layer_norm(x, (24,), gamma, beta), weight, offset)

    new_gamma, new_beta = fold_norm(gamma, beta, fold)
    new_weight, new_offset = fold_linear(weight, offset, fold)

    found = F.linear(F.layer_norm(x, (24,), new_gamma, new_beta), new_weight, new_offset)
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("mode", ["strict", "paper"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_whole_model_is_unchanged_in_float(mode, bias, vit_graph, unbiased_graph, source):
    reference = vit_graph if bias else unbiased_graph
    x = images(16, seed=3)

    graph, record = folded(reference, source, mode)

    assert record.report.changed == 4
    assert relative_error(float_outputs(graph, x), reference(x)) <= 1e-4
    for name in LINEARS_BEHIND_NORMS:
        assert not torch.equal(
            graph.parameter(f"{name}.weight"), reference.parameter(f"{name}.weight")
        )
        assert f"{name}.bias" in graph.tensors()


@pytest.mark.parametrize("mode", ["strict", "paper"])
@pytest.mark.parametrize("name", ["hf_vit", "timm_swin_padded", "timm_deit_distilled"])
def test_library_models_are_unchanged_in_float(name, mode):
    reference, x = zoo_graph(name), zoo_images(name, 3)

    graph, record = folded(reference, make_source(zoo_images(name, 4)), mode)

    assert record.report.warnings == ()
    assert relative_error(float_outputs(graph, x), reference.logits(x)) <= 1e-4


def test_three_consumers_share_one_quantizer_and_are_all_compensated():
    graph, _ = folded(zoo_graph("hf_vit"), make_source(zoo_images("hf_vit", 4)))

    sites = enumerate_sites(graph)
    targets = {
        sites[f"vit.layers.0.attention.{part}_proj:input"].quantizer
        for part in ("q", "k", "v")
    }
    assert len(targets) == 1
    for part in ("q", "k", "v"):
        name = f"vit.layers.0.attention.{part}_proj"
        for tensor in ("weight", "bias"):
            before = zoo_graph("hf_vit").parameter(f"{name}.{tensor}")
            assert not torch.equal(graph.parameter(f"{name}.{tensor}"), before)


def test_every_norm_of_a_swin_in_front_of_a_linear_is_folded_padding_or_not():
    graph, record = folded(
        zoo_graph("timm_swin_padded"), make_source(zoo_images("timm_swin_padded", 4))
    )

    assert record.report.changed == 7
    assert set(record.report.skipped) == {"patch_embed.norm", "norm"}
    # The reduction has no bias of its own.
    assert "layers.1.downsample.reduction.bias" not in zoo_graph("timm_swin_padded").tensors()
    assert graph.parameter("layers.1.downsample.reduction.bias").abs().max() > 0.01


# 8.2 Code invariance


def test_codes_are_identical_in_float64():
    scale, zero_point, fold = double_fold()
    x = 3 * torch.randn(20000, 24, dtype=torch.float64)

    before = codes_of(x, scale, zero_point)
    after = codes_of((x + fold.shift) / fold.ratio, fold.scale, fold.zero_point)

    assert torch.equal(after, before)


def test_a_real_zero_point_moves_codes():
    scale, zero_point, fold = double_fold(PAPER)
    x = 3 * torch.randn(20000, 24, dtype=torch.float64)

    before = codes_of(x, scale, zero_point)
    after = codes_of((x + fold.shift) / fold.ratio, fold.scale, fold.zero_point)

    assert (after != before).double().mean() > 0.5


def test_codes_of_the_model_are_identical_up_to_ties(vit_graph, source):
    sites, x = [f"{name}:input" for name in LINEARS_BEHIND_NORMS], images(16, seed=3)
    before_fold = calibrated(vit_graph, source)
    before = codes_at(before_fold, sites, x)

    run_pass(RepqVit(STRICT), before_fold, source)
    after = codes_at(before_fold, sites, x)

    for site in sites:
        quantizer = quantizer_at(before_fold, site)
        assert type(quantizer.spec.granularity) is PerTensor
        assert quantizer.scale.shape == ()
        # float32: a value within rounding of a tie may fall to the other side.
        assert (after[site] != before[site]).float().mean() <= 1e-4


def test_the_quantized_output_with_float_weights_is_unchanged(vit_graph, source):
    rules = [{"roles": ["norm_output"], "bits": "a", "granularity": "per_channel"}]
    attach = {"pass": "attach", "rules": rules}
    graph = calibrated(vit_graph, source, attach=attach)
    x = images(4)
    expected = graph(x)

    run_pass(RepqVit(STRICT), graph, source)

    assert relative_error(graph(x), expected) <= 1e-4
    assert relative_error(vit_graph(x), expected) > 1e-2


# 8.3 Level count


def test_no_strict_tensor_has_more_levels_than_its_bits_hold(vit_graph, source):
    graph, _ = folded(vit_graph, source)
    counted = {}
    nodes = {n.target: n for n in graph.graph.nodes if n.target in graph.quantizers()}
    taps = {n: (lambda v, t=t: counted.update({t: len(v.unique())})) for t, n in nodes.items()}

    run(graph, images(32, seed=3), taps=taps)

    for target, quantizer in graph.quantizers().items():
        assert quantizer.defect() is None
        if type(quantizer.spec.granularity) is PerTensor:
            assert counted[target] <= 2**quantizer.spec.bits


def test_the_paper_form_has_one_level_more_and_is_seen_to(vit_graph, source):
    attach = {
        **ATTACH,
        "rules": [
            *ATTACH["rules"],
            {"roles": ["probs"], "bits": "a", "format": "log_sqrt2", "strict": False},
        ],
    }
    steps = [
        attach,
        {**CALIBRATE, "include_zero": False},
        {"pass": "repq_vit", "mode": "paper"},
    ]
    graph, _ = run_steps(steps, vit_graph, source, "W4A3")
    wide = torch.linspace(-100.0, 100.0, 100001)

    for name in LINEARS_BEHIND_NORMS:
        quantizer = quantizer_at(graph, f"{name}:input")
        assert "not a whole number" in quantizer.defect()
        assert len(quantizer(wide).unique()) == 2**3 + 1
    probs = quantizer_at(graph, "blocks.0.attn:probs")
    assert len(probs(torch.linspace(0.0, 1.0, 100001)).unique()) == 2**3 + 1
    assert "9 levels, 3 bits hold 8" in probs.defect()


# 8.5 Error ordering


def test_the_fold_keeps_the_error_of_channel_wise_quantization():
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(0.8 * torch.randn(384, generator=generator))
    x = torch.randn(394, 384, generator=generator) * spread + torch.randn(
        384, generator=generator
    )
    config = RangeConfig(method="percentile", include_zero=False)
    channel = make_quantizer(QuantSpec(bits=4, granularity=PerChannel(-1)))
    channel.set_range(*search_range(channel, x, config))
    layer = make_quantizer(QuantSpec(bits=4))
    layer.set_range(*search_range(layer, x, RangeConfig(method="percentile")))
    fold = fold_parameters(
        channel.scale.double(),
        channel.zero_point.double(),
        qmin=0,
        qmax=QMAX,
        degenerate=torch.zeros(384, dtype=torch.bool),
        config=STRICT,
    )

    moved = (x.double() + fold.shift) / fold.ratio
    codes = codes_of(moved, fold.scale, fold.zero_point)
    back = (codes - fold.zero_point) * fold.scale * fold.ratio - fold.shift

    channel_codes = codes_of(x.double(), channel.scale.double(), channel.zero_point.double())
    channel_values = (channel_codes - channel.zero_point) * channel.scale.double()
    channel_error = (channel_values - x).square().mean()
    assert channel_error <= (layer(x) - x).square().mean() / 3
    torch.testing.assert_close((back - x).square().mean(), channel_error, rtol=1e-6, atol=0.0)


def test_the_method_beats_layer_wise_quantization_of_the_same_model(vit_graph, source):
    rules = [*ATTACH["rules"], {"roles": ["norm_output"], "bits": "a"}]
    plain = calibrated(vit_graph, source, "W8A3", attach={"pass": "attach", "rules": rules})
    method, _ = folded(vit_graph, source, scheme="W8A3")
    x = images(32, seed=3)
    expected = vit_graph(x)

    plain_error = (plain(x) - expected).square().mean()
    assert (method(x) - expected).square().mean() < plain_error


# 8.6 Row sums


def test_attention_of_the_model_keeps_its_row_sums_at_4_bits(vit_graph, source):
    graph, _ = folded(vit_graph, source)
    seen = []
    probs = enumerate_sites(graph)["blocks.0.attn:probs"]

    run(graph, next(iter(source)).images, taps={probs.reader.args[probs.index]: seen.append})

    assert 0.8 <= seen[0].sum(dim=-1).mean() <= 1.2


# 8.7 Only the right quantizers are set again


@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_only_folded_inputs_and_the_weights_behind_them_change(mode, vit_graph, source):
    graph = calibrated(vit_graph, source)
    before = {q.site: q.state_dict() for q in graph.quantizers().values()}

    run_pass(RepqVit(RepqVitConfig(mode=mode)), graph, source)

    changed = set()
    for quantizer in graph.quantizers().values():
        old, new = before[quantizer.site], quantizer.state_dict()
        if any(not torch.equal(old[key], new[key]) for key in old):
            changed.add(quantizer.site)
    assert changed == {
        f"{n}:{port}" for n in LINEARS_BEHIND_NORMS for port in ("input", "weight")
    }


def test_the_common_parameters_come_from_the_formula_not_from_new_statistics(
    vit_graph, source
):
    graph = calibrated(vit_graph, source)
    old = quantizer_at(graph, "blocks.0.fc1:input")

    run_pass(RepqVit(STRICT), graph, source)

    new = quantizer_at(graph, "blocks.0.fc1:input")
    torch.testing.assert_close(new.scale, old.scale.double().mean().float())
    assert new.zero_point == old.zero_point.double().mean().round().float()


def test_weights_behind_a_fold_are_searched_on_their_new_values(vit_graph, source):
    graph, _ = folded(vit_graph, source)
    quantizer = quantizer_at(graph, "blocks.0.fc1:weight")
    fresh = make_quantizer(quantizer.spec)

    fresh.set_range(*search_range(fresh, graph.parameter("blocks.0.fc1.weight"), STRICT))

    assert torch.equal(quantizer.scale, fresh.scale)
    assert torch.equal(quantizer.zero_point, fresh.zero_point)


# Traps


@pytest.mark.parametrize("mode", ["strict", "paper"])
@pytest.mark.parametrize("offset", [0.0, 0.7, -0.7, 1e-3])
def test_constant_channels_are_warned_about_and_leave_the_others_alone(
    offset, mode, vit_graph, source
):
    reference = vit_graph.clone()
    for tensor, value in (("weight", 0.0), ("bias", offset)):
        changed = reference.parameter(f"blocks.0.norm1.{tensor}").clone()
        changed[[3, 7]] = value
        reference.set_parameter(f"blocks.0.norm1.{tensor}", changed)
    x = images(4)
    lively = torch.ones(32, dtype=torch.bool)
    lively[[3, 7]] = False
    graph = calibrated(reference, source)
    mean_scale = quantizer_at(graph, "blocks.0.attn.qkv:input").scale[lively].mean()

    report = run_pass(RepqVit(RepqVitConfig(mode=mode)), graph, source)

    assert report.warnings == (
        "blocks.0.norm1: channels [3, 7] are constant; kept out of the means",
    )
    assert torch.isfinite(graph(x)).all()
    assert relative_error(float_outputs(graph, x), reference(x)) <= 1e-4
    common = quantizer_at(graph, "blocks.0.attn.qkv:input").scale
    torch.testing.assert_close(common, mean_scale)


@pytest.mark.parametrize("config", [STRICT, PAPER], ids=["strict", "paper"])
def test_a_degenerate_channel_does_not_enter_the_means(config):
    scale, zero_point, fold = double_fold(config, constant=(0, 5))
    lively = torch.ones(24, dtype=torch.bool)
    lively[[0, 5]] = False

    assert fold.scale == scale[lively].mean()
    expected = zero_point[lively].mean()
    assert fold.zero_point == (
        expected.round().clamp(0, QMAX) if config is STRICT else expected
    )
    for value in (fold.ratio, fold.shift):
        assert torch.isfinite(value).all()


def test_a_constant_channel_lands_on_a_code_whatever_its_value():
    scale, zero_point, fold = double_fold(constant=(0, 5))

    constant = -zero_point * scale
    codes = (constant + fold.shift) / (fold.ratio * fold.scale) + fold.zero_point

    assert codes[[0, 5]].tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert fold.ratio[[0, 5]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_a_norm_that_says_the_same_of_every_image_stays_exact(seed, source):
    model = enliven(NormThenLinears(), seed)
    model.norm.weight.zero_()
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, (16,), generator=generator) * 2 - 1
    model.norm.bias.copy_(sign * torch.rand(16, generator=generator))
    reference = capture(model, images(2))
    rules = [{"roles": ["norm_output"], "bits": 4, "granularity": "per_channel"}]
    graph = calibrated(reference, source, attach={"pass": "attach", "rules": rules})
    x = images(4)

    report = run_pass(RepqVit(STRICT), graph, source)

    assert report.warnings == (
        f"norm: channels {list(range(16))} are constant; kept out of the means",
    )
    ratio = graph.parameter("first.weight") / reference.parameter("first.weight")
    torch.testing.assert_close(ratio, torch.ones_like(ratio))
    assert relative_error(graph(x), reference(x)) <= 1e-5


def test_all_channels_constant_still_gives_a_finite_fold():
    ones = torch.ones(4, dtype=torch.float64)

    for config in (STRICT, PAPER):
        fold = fold_parameters(
            1e-6 * ones, 0 * ones, qmin=0, qmax=QMAX, degenerate=ones > 0, config=config
        )

        assert torch.isfinite(fold.shift).all()
        assert fold.scale == 1e-6


class NormThenLinears(nn.Module):
    def __init__(self, affine=True, bias=True, padded=False):
        super().__init__()
        self.padded = padded
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.norm = nn.LayerNorm(16, elementwise_affine=affine)
        self.first = nn.Linear(16, 12, bias=bias)
        self.second = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.patch(x).permute(0, 2, 3, 1))
        if self.padded:
            x = F.pad(x, (0, 0, 1, 2, 0, 3))
        return self.second(F.gelu(self.first(x)).flatten(1, 2).mean(dim=1))


@pytest.mark.parametrize("mode", ["strict", "paper"])
@pytest.mark.parametrize(
    "settings",
    [{"affine": False}, {"bias": False}, {"padded": True}, {"padded": True, "bias": False}],
    ids=str,
)
def test_missing_tensors_are_created_and_padding_pads_with_the_image_of_zero(
    settings, mode, source
):
    reference = capture(enliven(NormThenLinears(**settings)), images(2))
    x = images(3)

    graph, record = folded(reference, source, mode)

    assert record.report.details["folded"] == ["norm"]
    assert relative_error(float_outputs(graph, x), reference(x)) <= 1e-4
    assert {"norm.weight", "norm.bias", "first.bias"} <= set(graph.tensors())
    assert graph.parameter("first.bias").abs().max() > 0.01


class ClassQuery(nn.Module):
    """The class token alone asks; keys and values come from all tokens."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.norm = nn.LayerNorm(16)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        token = self.cls_token.expand(x.shape[0], -1, -1) + 0.3 * x[:, :1]
        y = self.norm(torch.cat([token, x], dim=1))
        q, k, v = self.q_proj(y[:, :1]), self.k_proj(y), self.v_proj(y)
        return self.head((torch.softmax(q @ k.mT / 4, dim=-1) @ v)[:, 0])


@pytest.fixture(scope="module")
def class_query():
    torch.manual_seed(0)
    return capture(enliven(ClassQuery()), images(2))


@pytest.mark.parametrize("method", ["percentile", "minmax"])
def test_one_fold_covers_what_the_query_and_the_others_read(class_query, source, method):
    graph = calibrated(class_query, source, method=method)
    own = {part: quantizer_at(graph, f"{part}_proj:input") for part in ("q", "k")}
    values, x = {}, torch.cat([batch.images for batch in source])
    for part in own:
        site = enumerate_sites(graph)[f"{part}_proj:input"]
        tap = {site.value: lambda value, part=part: values.update({part: value})}
        run(graph, x, taps=tap, bypass=True)

    run_pass(RepqVit(STRICT), graph, source)

    # In the terms of before: the fold is a map on channels, found in the columns of k.
    ratio = graph.parameter("k_proj.weight") / class_query.parameter("k_proj.weight")
    ratio = ratio.double().median(dim=0).values
    moved = {}
    for part in own:
        site = enumerate_sites(graph)[f"{part}_proj:input"]
        tap = {site.value: lambda value, part=part: moved.update({part: value})}
        run(graph, x, taps=tap, bypass=True)
        new = quantizer_at(graph, f"{part}_proj:input")
        assert type(new.spec.granularity) is PerTensor
        code = torch.round(moved[part] / new.scale) + new.zero_point
        saturated = (code < 0) | (code > QMAX)
        low, high = (
            ((end - own[part].zero_point) * own[part].scale).double() for end in (0, QMAX)
        )
        slack = 1e-3 * new.scale * ratio  # float32
        inside = (values[part] > low + slack) & (values[part] < high - slack)
        assert inside.float().mean() > 0.7  # minimum and maximum of 8 images are not
        assert not (saturated & inside).any()
    q, k = (quantizer_at(graph, f"{part}_proj:input") for part in ("q", "k"))
    assert (q.scale, q.zero_point) == (k.scale, k.zero_point)
    assert relative_error(float_outputs(graph, x), class_query(x)) <= 1e-4


def test_a_common_fold_beats_a_common_range_per_tensor(class_query, source):
    rules = [*ATTACH["rules"], {"roles": ["norm_output"], "bits": "a"}]
    plain = calibrated(class_query, source, "W8A4", attach={"pass": "attach", "rules": rules})
    method, _ = folded(class_query, source, scheme="W8A4")
    x = images(64, seed=3)
    expected = class_query(x)

    power = expected.square().mean().item()
    plain_db, method_db = (
        sqnr_db(power, (graph(x) - expected).square().mean().item())
        for graph in (plain, method)
    )
    assert method_db > plain_db + 1.0


def test_the_union_of_ranges_by_hand():
    spec = QuantSpec(bits=4, granularity=PerChannel(-1))
    first, second = make_quantizer(spec), make_quantizer(spec)
    first.load(scale=torch.tensor([0.1, 1.0]), zero_point=torch.tensor([0.0, 5.0]))
    second.load(scale=torch.tensor([0.2, 0.5]), zero_point=torch.tensor([15.0, 5.0]))

    scale, zero_point = _united([first, second])

    # [0, 1.5] with [-3, 0], and [-5, 10] with [-2.5, 5].
    assert scale.tolist() == pytest.approx([0.3, 1.0])
    assert zero_point.tolist() == [10.0, 5.0]


def test_codes_of_padded_zeros_are_those_of_before(source):
    graph = calibrated(capture(enliven(NormThenLinears(padded=True)), images(2)), source)
    before = codes_at(graph, ["first:input"], images(4))

    run_pass(RepqVit(STRICT), graph, source)

    # The value in front of the quantizer is now an addition, which is no norm's: look behind.
    after = codes_at(graph, ["first:input"], images(4))
    different = before["first:input"] != after["first:input"]
    assert different.float().mean() <= 1e-3
    assert not different[:, -3:].any()


def test_a_channel_wise_quantizer_that_no_norm_absorbs_becomes_per_tensor(vit_graph, source):
    rules = [
        *ATTACH["rules"],
        {"roles": ["act_output"], "granularity": "per_channel", "bits": 4},
    ]
    graph = calibrated(vit_graph, source, attach={"pass": "attach", "rules": rules})
    old = quantizer_at(graph, "blocks.0.fc2:input")

    report = run_pass(RepqVit(STRICT), graph, source)

    assert report.warnings == tuple(
        f"blocks.{i}.fc2:input: no norm to fold into; per tensor over all channels"
        for i in (0, 1)
    )
    new = quantizer_at(graph, "blocks.0.fc2:input")
    assert type(new.spec.granularity) is PerTensor
    assert new.defect() is None
    low = (-old.zero_point * old.scale).min()
    high = ((QMAX - old.zero_point) * old.scale).max()
    # Rounding of the zero point may move each end by half a step.
    assert -new.zero_point * new.scale <= low + 0.51 * new.scale
    assert (QMAX - new.zero_point) * new.scale >= high - 0.51 * new.scale


def test_norms_behind_per_tensor_quantizers_are_left_alone(vit_graph, source):
    rules = [*ATTACH["rules"], {"roles": ["norm_output"], "bits": 4}]
    graph = calibrated(vit_graph, source, attach={"pass": "attach", "rules": rules})
    before = graph.tensors()

    report = run_pass(RepqVit(STRICT), graph, source)

    assert report.changed == 0
    assert len(report.skipped) == 5
    assert all(torch.equal(value, before[name]) for name, value in graph.tensors().items())


def test_the_final_norm_is_left_to_the_head_unless_its_input_is_channel_wise(
    vit_graph, source
):
    left, record = folded(vit_graph, source)
    rules = [
        *ATTACH["rules"],
        {"roles": ["head_input"], "granularity": "per_channel", "bits": 4},
    ]
    graph = calibrated(vit_graph, source, attach={"pass": "attach", "rules": rules})
    x = images(4)

    report = run_pass(RepqVit(STRICT), graph, source)

    assert "norm" in record.report.skipped
    assert torch.equal(left.parameter("norm.weight"), vit_graph.parameter("norm.weight"))
    assert report.changed == 5
    assert relative_error(float_outputs(graph, x), vit_graph(x)) <= 1e-4


def test_the_reference_and_its_tensors_are_not_written(vit_graph, source):
    before = {name: value.clone() for name, value in vit_graph.tensors().items()}

    folded(vit_graph, source)

    assert all(torch.equal(value, before[name]) for name, value in vit_graph.tensors().items())


def test_symmetric_channel_quantizers_fold_without_a_shift(vit_graph, source):
    rules = [
        *ATTACH["rules"],
        {"roles": ["norm_output"], "bits": 4, "symmetric": True, "granularity": "per_channel"},
    ]
    graph = calibrated(vit_graph, source, attach={"pass": "attach", "rules": rules})

    run_pass(RepqVit(STRICT), graph, source)

    quantizer = quantizer_at(graph, "blocks.0.fc1:input")
    assert isinstance(quantizer, Affine)
    assert quantizer.spec.symmetric
    assert quantizer.zero_point == 0.0
    assert relative_error(float_outputs(graph, images(4)), vit_graph(images(4))) <= 1e-4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_ratio": 1.0}, "max_ratio"),
        ({"method": "output_mse"}, "output_mse"),
        ({"steps": 0}, "steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        RepqVitConfig(**settings)
