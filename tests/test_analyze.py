"""Which unit does harm: the right ones are found, each is measured as it would run alone."""

import json

import pytest
import torch
from tiny import TinyViT, enliven, images, make_source

import vitcompress
from vitcompress.analyze import Analysis, measuring, read_analysis
from vitcompress.analyze import run as running
from vitcompress.analyze.measuring import Bench
from vitcompress.calibration.interpreter import run
from vitcompress.engine import run_recipe
from vitcompress.errors import ConfigError, InputError
from vitcompress.evaluate import evaluate
from vitcompress.graph import capture
from vitcompress.passes.base import quantizers_of
from vitcompress.recipe import Recipe


def recipe(*rules, passes=({"pass": "freeze"},), scheme="W4A4"):
    """Return a recipe that quantizes plainly by rules."""
    steps = [
        {"pass": "attach", "rules": list(rules)},
        {"pass": "calibrate", "method": "minmax"},
    ]
    fields = {"schema": 1, "name": "test", "scheme": scheme, "passes": [*steps, *passes]}
    return Recipe.from_dict(fields)


PLAIN_RULES = (
    {"roles": ["weight"], "bits": "w", "granularity": "per_channel"},
    {"roles": ["norm_output", "act_output", "proj_input", "head_input"], "bits": "a"},
)
PLAIN = recipe(*PLAIN_RULES)
#: One site is given two bits, all others eight.
ONE_BAD = recipe(
    {"roles": ["weight"], "bits": 8, "granularity": "per_channel"},
    {"roles": ["norm_output", "act_output", "proj_input", "head_input"], "bits": 8},
    {"sites": ["blocks.1.fc2:input"], "bits": 2},
)
BLOCKS = ["patch_embed", "blocks.0", "blocks.1", "head"]


@pytest.fixture(scope="module")
def held_out():
    return make_source(images(16, seed=9), batch_size=8)


@pytest.fixture(scope="module")
def by_site(vit_graph, source, held_out):
    return vitcompress.analyze(vit_graph, recipe=PLAIN, source=source, evaluation=held_out)


@pytest.fixture
def slow(monkeypatch):
    """Let each measurement take a second by a clock of our own."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    distance = Bench.distance

    def measured(bench, off):
        found = distance(bench, off)
        clock.now += 1.0
        bench.slowest = 1.0
        return found

    monkeypatch.setattr(Bench, "distance", measured)
    monkeypatch.setattr(measuring, "time", clock)
    monkeypatch.setattr(running, "time", clock)
    return clock


def units(analysis, level):
    return [entry.unit for entry in analysis.entries if entry.level == level]


@pytest.mark.parametrize("mode", ["only", "except"])
@pytest.mark.parametrize(
    ("by", "worst"),
    [("site", "blocks.1.fc2:input"), ("layer", "blocks.1.fc2"), ("block", "blocks.1")],
)
def test_the_unit_that_does_the_harm_is_first(vit_graph, source, mode, by, worst):
    analysis = vitcompress.analyze(vit_graph, recipe=ONE_BAD, source=source, mode=mode, by=by)

    first, second = analysis.entries[:2]
    assert (first.unit, first.kl_rank, first.sqnr_rank) == (worst, 1, 1)
    if mode == "only":
        assert first.distance.mean_kl > 5 * second.distance.mean_kl
    else:
        assert first.distance.mean_kl < analysis.all_on.mean_kl / 5
        assert second.distance.mean_kl > analysis.all_on.mean_kl / 5
    assert analysis.not_measured == ()


def test_every_quantizer_is_measured_once(by_site, vit_graph, source):
    graph, _ = run_recipe(PLAIN, vit_graph, source)

    assert sorted(units(by_site, "site")) == sorted(
        quantizer.site for quantizer in quantizers_of(graph).values()
    )
    assert len(by_site.entries) == len(quantizers_of(graph))
    assert {entry.kl_rank for entry in by_site.entries} == set(
        range(1, len(by_site.entries) + 1)
    )
    assert {entry.sqnr_rank for entry in by_site.entries} == set(
        range(1, len(by_site.entries) + 1)
    )


def test_figures_are_those_of_that_quantizer_alone(by_site, vit_graph, source, held_out):
    """The reference is built the other way round: only that one site is quantized at all."""
    entry = next(e for e in by_site.entries if e.unit == "blocks.0.fc1:weight")
    alone = recipe({"sites": [entry.unit], "bits": 4, "granularity": "per_channel"})

    graph, _ = run_recipe(alone, vit_graph, source)
    expected = evaluate(graph.logits, held_out, reference=vit_graph.logits)

    assert entry.distance.mean_kl == pytest.approx(expected.mean_kl, rel=1e-6)
    assert entry.distance.logits_sqnr_db == pytest.approx(expected.logits_sqnr_db, rel=1e-6)
    assert entry.distance.agreement_percent == expected.agreement_percent
    assert len(entry.formats) == 1
    assert entry.sites == ("blocks.0.fc1:weight",)


def test_everything_on_is_what_quantize_makes(by_site, vit_graph, source, held_out):
    model = vitcompress.quantize(vit_graph, recipe=PLAIN, source=source)

    expected = evaluate(model, held_out, reference=vit_graph.logits)

    assert by_site.all_on.mean_kl == pytest.approx(expected.mean_kl, rel=1e-6)
    assert by_site.all_on.logits_sqnr_db == pytest.approx(expected.logits_sqnr_db, rel=1e-6)
    assert by_site.all_off.logits_sqnr_db == float("inf")
    assert by_site.all_off.mean_kl == 0.0


def test_what_passes_did_to_float_tensors_is_told(vit_graph, source):
    rounded = recipe(
        {"roles": ["weight"], "bits": 4, "granularity": "per_channel"},
        {"roles": ["norm_output", "act_output"], "bits": 4},
        passes=({"pass": "integer_bias"}, {"pass": "freeze"}),
    )

    analysis = vitcompress.analyze(vit_graph, recipe=rounded, source=source, by="block")

    assert 0.0 < analysis.all_off.mean_kl < analysis.all_on.mean_kl
    assert analysis.all_off.logits_sqnr_db < 100.0


def test_a_layer_is_its_weight_and_its_input(vit_graph, source):
    analysis = vitcompress.analyze(vit_graph, recipe=PLAIN, source=source, by="layer")

    entry = next(e for e in analysis.entries if e.unit == "blocks.0.fc2")
    assert set(entry.sites) == {"blocks.0.fc2:weight", "blocks.0.fc2:input"}
    assert units(analysis, "site") == []
    covered = [site for entry in analysis.entries for site in entry.sites]
    assert len(covered) == len(set(covered)) > len(analysis.entries)


def test_blocks_cover_every_quantizer(vit_graph, source):
    analysis = vitcompress.analyze(vit_graph, recipe=PLAIN, source=source, by="block")

    assert sorted(units(analysis, "block")) == sorted(BLOCKS)
    covered = [site for entry in analysis.entries for site in entry.sites]
    graph, _ = run_recipe(PLAIN, vit_graph, source)
    assert len(covered) == len(set(covered)) == len(quantizers_of(graph))


def test_a_unit_switched_off_leaves_the_others_on(vit_graph, source):
    """All but one, measured in full, is what a run with that node replaced gives."""
    graph, _ = run_recipe(recipe(*PLAIN_RULES, passes=()), vit_graph, source)
    bench = Bench(graph, vit_graph, list(source))
    target = bench.targets[3]
    node = next(n for n in graph.graph.nodes if str(n.target) == target)

    found = bench.distance(frozenset([target]))

    x = torch.cat([batch.images for batch in source])
    logits = run(graph, x, replaced={node: lambda value: value})[0]
    agreed = logits.argmax(-1) == vit_graph.logits(x).argmax(-1)
    assert found.agreement_percent == 100.0 * float(agreed.double().mean())
    assert found != bench.distance(frozenset())


# Time


def test_budget_measures_blocks_first_then_the_worst_in_detail(vit_graph, source, slow):
    # Two seconds for all and none, four for blocks, four for layers of the worst of them, two
    # for the sites of the worst of those.
    analysis = vitcompress.analyze(vit_graph, recipe=ONE_BAD, source=source, budget=12.0)

    assert sorted(units(analysis, "block")) == sorted(BLOCKS)
    assert units(analysis, "block")[0] == "blocks.1"
    assert set(units(analysis, "layer")) == {
        *("blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.fc1", "blocks.1.fc2"),
    }
    assert units(analysis, "site")[0] == "blocks.1.fc2:input"
    # The patch embedding is one quantizer: its block has told of it.
    assert set(units(analysis, "site")) == {
        *("blocks.1.fc2:input", "blocks.1.fc2:weight", "patch_embed:weight"),
    }
    assert len(units(analysis, "site")) + len(analysis.not_measured) == 19
    assert not set(units(analysis, "site")) & set(analysis.not_measured)
    assert analysis.budget_seconds == analysis.seconds == slow.now == 12.0


def test_budget_that_is_long_enough_measures_everything(vit_graph, source, slow, by_site):
    analysis = vitcompress.analyze(vit_graph, recipe=PLAIN, source=source, budget=1000.0)

    assert analysis.not_measured == ()
    assert sorted(units(analysis, "site")) == sorted(units(by_site, "site"))
    assert len(units(analysis, "block")) == 4
    # A block of one layer, or a layer of one site, is not measured again.
    distinct = {frozenset(entry.sites) for entry in analysis.entries}
    assert slow.now == 2 + len(distinct) < 2 + len(analysis.entries)


def test_budget_that_is_too_short_measures_nothing_and_says_so(vit_graph, source, slow):
    analysis = vitcompress.analyze(
        vit_graph, recipe=PLAIN, source=source, budget=0.5, by="block"
    )

    assert analysis.entries == ()
    assert sorted(analysis.not_measured) == sorted(BLOCKS)
    assert analysis.all_on.mean_kl > 0.0


# Records


def test_analysis_survives_json(by_site, tmp_path):
    (tmp_path / "a.json").write_text(by_site.model_dump_json())

    assert read_analysis(tmp_path / "a.json") == by_site


def test_analysis_says_where_it_comes_from(by_site, source, held_out):
    assert (by_site.model, by_site.recipe, by_site.scheme) == ("tiny", "test-w4a4", "W4A4")
    assert (by_site.mode, by_site.by, by_site.seed) == ("only", "site", 0)
    assert by_site.calibration.digest == source.digest()
    assert by_site.images.digest == held_out.digest()
    assert by_site.images.ids == tuple(held_out.sample_ids)
    assert "pass: freeze" in by_site.resolved_recipe
    assert "torch" in by_site.versions
    assert len(by_site.model_digest) == 64


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda a: a.update(schema_version=2), "schema_version 2; this version reads 1"),
        (lambda a: a.update(speed=1), "speed: Extra inputs"),
        (lambda a: a.pop("entries"), "entries: Field required"),
    ],
)
def test_file_of_another_layout_is_refused(by_site, tmp_path, edit, reason):
    content = json.loads(by_site.model_dump_json())
    edit(content)
    (tmp_path / "a.json").write_text(json.dumps(content))

    with pytest.raises(InputError, match=reason):
        read_analysis(tmp_path / "a.json")


def test_missing_file_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_analysis(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "both"}, r"mode: expected one of \['only', 'except'\], got 'both'"),
        ({"by": "head"}, r"by: expected one of \['block', 'layer', 'site'\], got 'head'"),
        ({"budget": 0.0}, "budget: expected seconds above 0, got 0"),
        ({"budget": float("nan")}, "budget: expected seconds above 0"),
        ({"scheme": "W4"}, "expected a form like W4A8"),
    ],
)
def test_wrong_setting_is_refused(vit_graph, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        vitcompress.analyze(vit_graph, **settings)


def test_module_is_analyzed_as_it_is(source):
    model = enliven(TinyViT(depth=1))
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    analysis = vitcompress.analyze(model, recipe=PLAIN, source=source, by="block")

    assert isinstance(analysis, Analysis)
    assert analysis.model == "TinyViT"
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())


def test_named_outputs_are_measured_at_the_logits(source):
    """The logits are the second output; the first must not be taken for them."""

    class Twin(TinyViT):
        def forward(self, x):
            logits = super().forward(x)
            return {"features": torch.zeros_like(logits), "logits": logits}

    torch.manual_seed(0)
    graph = capture(enliven(Twin(depth=1)), images(2), model_id="twin")

    analysis = vitcompress.analyze(graph, recipe=PLAIN, source=source, by="block")

    assert analysis.all_on.mean_kl > 0.0
