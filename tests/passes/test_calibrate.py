import pytest
import torch
from tiny import images, make_source, run_pass, run_steps
from zoo import zoo_graph, zoo_images

from vitcompress.calibration import Samples
from vitcompress.errors import ConfigError, PassError
from vitcompress.graph import Role, enumerate_sites
from vitcompress.passes import Attach, Calibrate
from vitcompress.passes.attach import AttachConfig, AttachRule
from vitcompress.passes.base import Fact, holds
from vitcompress.passes.calibrate import CalibrateConfig
from vitcompress.quantizers import Sulq

FLOAT_ROLES = [role for role in Role if role is not Role.WEIGHT]


def attached(graph, bits=4, **settings):
    rules = (AttachRule(roles=tuple(Role), bits=bits, **settings),)
    run_pass(Attach(AttachConfig(rules=rules)), graph, None)
    return graph


def calibrate(graph, source, **settings):
    return run_pass(Calibrate(CalibrateConfig(**settings)), graph, source)


def parameters(graph):
    return {
        q.site: (q.scale.clone(), q.zero_point.clone()) for q in graph.quantizers().values()
    }


def differing(first, second):
    return {
        site
        for site in first
        if not all(torch.equal(a, b) for a, b in zip(first[site], second[site], strict=True))
    }


def test_every_quantizer_is_set(graph, source):
    report = calibrate(attached(graph), source)

    assert holds(Fact.CALIBRATED, graph)
    assert report.changed == report.found == len(graph.quantizers())
    assert all(q.defect() is None for q in graph.quantizers().values())


def test_min_max_covers_exactly_what_was_seen(vit_graph, source):
    parallel, sequential = (attached(vit_graph.clone(), bits=8) for _ in range(2))

    calibrate(parallel, source, method="minmax")
    calibrate(sequential, source, method="minmax", sequential=True)

    # The first quantizer sees the images themselves in both forms.
    pixels = torch.cat([batch.images for batch in source])
    for graph in (parallel, sequential):
        quantizer = graph.quantizers()[enumerate_sites(graph)["patch_embed:input"].quantizer]
        torch.testing.assert_close(quantizer.scale, (pixels.max() - pixels.min()) / 255)


def test_sequential_ranges_see_upstream_errors_parallel_ones_do_not(vit_graph, source):
    found = {}
    for sequential in (False, True):
        for bits in (2, 8):
            graph = attached(vit_graph.clone(), bits=8)
            weights = AttachRule(roles=(Role.WEIGHT,), bits=bits)
            rules = (AttachRule(roles=tuple(FLOAT_ROLES), bits=8), weights)
            graph = vit_graph.clone()
            run_pass(Attach(AttachConfig(rules=rules)), graph, None)
            calibrate(graph, source, method="minmax", sequential=sequential)
            found[sequential, bits] = parameters(graph)

    weights = {site for site in found[True, 8] if site.endswith(":weight")}
    assert differing(found[False, 8], found[False, 2]) == weights
    behind = differing(found[True, 8], found[True, 2]) - weights
    assert behind == set(found[True, 8]) - weights - {"patch_embed:input"}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "output_mse"])
def test_ranges_do_not_depend_on_batching(vit_graph, method, sequential):
    found = []
    for batch_size in (3, 8):
        graph = attached(vit_graph.clone())
        source = make_source(images(8), batch_size=batch_size)
        calibrate(graph, source, method=method, sequential=sequential)
        found.append(parameters(graph))

    for site in found[0]:
        # Kernels add in an order that depends on the batch; a search may take the neighbour
        # of a candidate that is as good. Neighbours are 10 % apart.
        torch.testing.assert_close(found[0][site][0], found[1][site][0], rtol=0.11, atol=1e-6)


def test_only_the_wanted_roles_are_set_and_no_fact_is_claimed(graph, source):
    attached(graph)
    step = Calibrate(CalibrateConfig(roles=(Role.WEIGHT,)))

    run_pass(step, graph, source)

    set_now = {q.site for q in graph.quantizers().values() if q.calibrated}
    assert set_now == {
        q.site for q in graph.quantizers().values() if q.site.endswith(":weight")
    }
    assert step.provides == frozenset()
    assert Calibrate(CalibrateConfig()).provides == {Fact.CALIBRATED}


def test_quantizers_that_are_set_already_are_left_alone(graph, source):
    attached(graph)
    calibrate(graph, source, roles=(Role.WEIGHT,), method="minmax")
    before = _calibrated(graph)

    report = calibrate(graph, source, method="mse")

    assert report.changed == len(graph.quantizers()) - len(before)
    assert differing(before, parameters(graph)) == set()


def _calibrated(graph):
    return {
        q.site: (q.scale.clone(), q.zero_point.clone())
        for q in graph.quantizers().values()
        if q.calibrated
    }


def test_mse_beats_min_max_on_the_model(vit_graph, source):
    x = images(32, seed=3)
    expected, errors = vit_graph(x), {}
    for method in ("minmax", "mse", "output_mse"):
        graph = attached(vit_graph.clone(), bits=3)
        calibrate(graph, source, method=method)
        errors[method] = float((graph(x) - expected).square().mean())

    assert errors["mse"] < errors["minmax"]
    assert errors["output_mse"] < errors["minmax"]


def test_channel_wise_activations_may_leave_out_zero_but_weights_may_not(graph, source):
    attached(graph, granularity="per_channel")

    calibrate(graph, source, method="minmax")

    by_site = {q.site: q for q in graph.quantizers().values()}
    assert by_site["blocks.0.fc1:weight"].defect() is None
    outside = by_site["patch_embed:input"].spec.granularity
    assert outside.axis == 1
    assert any(q.defect() for s, q in by_site.items() if not s.endswith(":weight"))


def test_images_that_are_not_finite_name_the_site(graph, monkeypatch):
    broken = images(4)
    broken[1, 0, 0, 0] = float("nan")

    class Source:
        batch_size = 4

        def __iter__(self):
            yield type("Batch", (), {"images": broken})

    for sequential in (False, True):
        with pytest.raises(
            PassError, match="patch_embed:input: calibration saw values that are"
        ):
            calibrate(attached(graph.clone()), Source(), sequential=sequential)


@pytest.mark.parametrize("name", ["timm_swin", "torchvision_vit"])
def test_samples_are_whole_images_whatever_the_layout(name):
    """Swin puts windows on the first axis, torchvision tokens: neither is an image."""
    graph = attached(zoo_graph(name).clone(), granularity="per_channel")
    step = Calibrate(CalibrateConfig(method="minmax", sample_images=2))
    sites = enumerate_sites(graph)

    for request in step.statistics(graph):
        observer = request.observer()
        extents = sites[request.site].value.meta["info"].shape
        axis = next(i for i, e in enumerate(extents) if isinstance(e, str))
        per_image = int(extents[axis].removesuffix("B").removesuffix("*") or 1)

        assert isinstance(observer, Samples)
        assert observer.axis == axis
        assert observer.limit == 2 * per_image


@pytest.mark.parametrize("sequential", [False, True])
def test_tokens_on_the_first_axis_survive_a_last_batch_that_is_smaller(sequential):
    graph = attached(zoo_graph("torchvision_vit").clone(), granularity="per_channel")
    source = make_source(zoo_images("torchvision_vit", 5), batch_size=3)

    calibrate(graph, source, method="minmax", sequential=sequential)

    assert holds(Fact.CALIBRATED, graph)


def test_the_whole_pass_runs_through_the_engine(vit_graph, source):
    steps = [
        {"pass": "attach", "rules": [{"roles": [str(role) for role in Role]}]},
        {"pass": "calibrate", "roles": ["weight"], "method": "mse"},
        {"pass": "calibrate", "method": "output_mse"},
    ]

    graph, records = run_steps(steps, vit_graph, source)

    assert holds(Fact.CALIBRATED, graph)
    assert [record.report.changed > 0 for record in records] == [True, True, True]


@pytest.mark.parametrize("name", ["sample_images", "sample_tokens"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        CalibrateConfig(**{name: 0})


def test_only_the_first_images_are_looked_at_where_fewer_are_asked_for(vit_graph):
    x = images(8)
    x[2:] *= 10.0
    rules = [{"roles": ["patch_input"], "bits": 8}]
    step = {"pass": "calibrate", "method": "minmax", "sequential": True}

    def scale(**settings):
        steps = [{"pass": "attach", "rules": rules}, {**step, **settings}]
        graph = run_steps(steps, vit_graph, make_source(x))[0]
        return next(iter(graph.quantizers().values())).scale.item()

    assert scale(images=2) == pytest.approx(scale() / 10.0, rel=0.3)


@pytest.mark.parametrize("settings", [{"images": 0, "sequential": True}, {"images": 4}])
def test_a_number_of_images_is_for_the_sequential_form(settings):
    with pytest.raises(ConfigError, match="images: expected at least 1, with sequential"):
        CalibrateConfig(**settings)


def test_a_shifted_logarithm_is_searched_in_parallel_too(vit_graph, source):
    steps = [
        {"pass": "attach", "rules": [{"roles": ["probs"], "bits": 4, "format": "sulq"}]},
        {"pass": "calibrate"},
    ]

    graph = run_steps(steps, vit_graph, source)[0]

    for quantizer in graph.quantizers().values():
        assert isinstance(quantizer, Sulq)
        assert quantizer.calibrated
        assert quantizer.high > quantizer.low
