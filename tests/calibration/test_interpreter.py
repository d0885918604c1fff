import gc
import weakref

import pytest
import torch
from tiny import images, run_steps

from vitcompress.calibration.interpreter import run, walk
from vitcompress.errors import ConfigError
from vitcompress.graph import enumerate_sites
from vitcompress.graph.edit import insert_quantizer
from vitcompress.quantizers import QuantSpec, make_quantizer

ACTIVATIONS = [
    {
        "pass": "attach",
        "rules": [{"roles": ["weight", "norm_output", "act_output"], "bits": 3}],
    }
]


def attached(graph, *names, bits=3):
    """Put one quantizer on each named site."""
    sites = enumerate_sites(graph)
    quantizers = {}
    for name in names:
        quantizers[name] = make_quantizer(QuantSpec(bits=bits), name)
        site = sites[name]
        insert_quantizer(
            graph, site.value, [(site.reader, site.index)], name, quantizers[name]
        )
    graph.recompile()
    return quantizers


def recorder(graph, seen):
    """Return a visitor that keeps the inputs of each quantizer."""
    known = graph.quantizers()

    def visit(node, values):
        if node.target in known:
            seen.setdefault(node.target, values)

    return visit


@pytest.fixture(scope="module")
def quantized(vit_graph, source):
    steps = [*ACTIVATIONS, {"pass": "calibrate", "method": "minmax"}]
    return run_steps(steps, vit_graph, source)[0]


def test_run_equals_the_module(vit_graph):
    x = images(3)

    assert torch.equal(run(vit_graph, x)[0], vit_graph(x))


def test_taps_see_the_values_of_their_nodes(vit, vit_graph):
    x, seen = images(3), []
    expected = vit.norm(
        vit.blocks(
            torch.cat(
                [
                    vit.cls_token.expand(3, -1, -1),
                    vit.patch_embed(x).flatten(2).transpose(1, 2),
                ],
                dim=1,
            )
            + vit.pos_embed
        )
    )[:, 0]
    head_input = enumerate_sites(vit_graph)["head:input"].value

    run(vit_graph, x, taps={head_input: seen.append})

    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_bypass_is_the_float_function(vit_graph, quantized):
    x = images(3)

    assert torch.equal(run(quantized, x, bypass=True)[0], vit_graph(x))
    assert not torch.allclose(run(quantized, x)[0], vit_graph(x), rtol=1e-2)


def test_bypass_needs_no_parameters(graph):
    attached(graph, "head:input")

    run(graph, images(2), bypass=True)
    with pytest.raises(ConfigError, match="head:input: quantizer has no parameters yet"):
        run(graph, images(2))


def test_walk_visits_each_quantizer_once_with_all_batches(quantized):
    batches, visited = images(8).split(3), {}

    walk(quantized, batches, recorder(quantized, visited))

    assert list(visited) == list(quantized.quantizers())
    for target, values in visited.items():
        assert len(values) == (1 if target.endswith("_weight") else 3)


def test_walk_shows_what_the_plain_forward_computes(quantized):
    batches, walked, tapped = images(8).split(4), {}, {}
    quantizers = [n for n in quantized.graph.nodes if n.target in quantized.quantizers()]
    taps = {
        node.args[0]: tapped.setdefault(node.target, []).append
        for node in quantizers
        if node.args[0].op != "get_attr"
    }

    walk(quantized, batches, recorder(quantized, walked))
    for batch in batches:
        run(quantized, batch, taps=taps)

    for target, values in tapped.items():
        assert len(values) in (0, 2)  # of two readers of one value the later tap stays
        for found, expected in zip(walked[target], values, strict=False):
            assert torch.equal(found, expected)


def test_a_walk_shows_other_values_to_taps(quantized, vit_graph):
    batches, seen = images(8).split(4), []
    value = enumerate_sites(quantized)["blocks.1.attn:value"].value

    walk(quantized, batches, lambda *_: None, taps={value: seen.append})

    tapped = []
    for batch in batches:
        run(quantized, batch, taps={value: tapped.append})
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(seen[0], tapped, strict=True))


def test_a_walk_meets_a_quantizer_that_nobody_set(graph):
    attached(graph, "blocks.0.fc1:input")

    with pytest.raises(
        ConfigError, match=r"blocks\.0\.fc1:input: quantizer has no parameters yet"
    ):
        walk(graph, [images(2)], lambda node, values: None)


def test_a_later_quantizer_sees_the_error_of_an_earlier_one(graph, vit_graph):
    first, second = "blocks.0.attn.qkv:input", "blocks.0.fc1:input"
    by_target = {q.site: q for q in attached(graph, first, second, bits=2).values()}
    x, seen = images(4), {}

    def visit(node, values):
        if node.target not in graph.quantizers():
            return
        quantizer = graph.quantizers()[node.target]
        seen[quantizer.site] = values[0]
        quantizer.set_range(values[0].min(), values[0].max())

    walk(graph, [x], visit)

    plain = {}
    sites = enumerate_sites(vit_graph)
    run(
        vit_graph,
        x,
        taps={sites[s].value: (lambda v, s=s: plain.update({s: v})) for s in by_target},
    )
    assert torch.equal(seen[first], plain[first])
    assert (seen[second] - plain[second]).abs().max() > 0.05
    after = {}
    taps = {
        sites_value: (lambda v: after.update(value=v))
        for sites_value in [enumerate_sites(graph)[second].value]
    }
    run(graph, x, taps=taps)
    assert torch.equal(seen[second], after["value"])


def test_walk_frees_values_after_their_last_use(graph):
    attached(graph, "blocks.0.fc1:input", "head:input")
    alive = {}

    def visit(node, values):
        if node.target not in graph.quantizers():
            return
        quantizer = graph.quantizers()[node.target]
        quantizer.set_range(values[0].min(), values[0].max())
        gc.collect()
        alive[quantizer.site] = [name for name, ref in recorded if ref() is not None]
        recorded.extend((quantizer.site, weakref.ref(value)) for value in values)

    recorded = []
    walk(graph, [images(2), images(2, seed=2)], visit)

    assert alive["head:input"] == []


def test_run_frees_values_after_their_last_use(vit_graph):
    references, alive = [], []
    sites = enumerate_sites(vit_graph)

    def remember(value):
        references.append(weakref.ref(value))

    def look(value):
        gc.collect()
        alive.append(references[0]() is not None)

    run(
        vit_graph,
        images(2),
        taps={sites["blocks.0.fc2:input"].value: remember, sites["head:input"].value: look},
    )

    assert alive == [False]


def test_nothing_is_recorded_for_gradients(vit_graph):
    seen = []

    outputs = run(
        vit_graph, images(2).requires_grad_(), taps={vit_graph.input_node: seen.append}
    )

    assert not outputs[0].requires_grad
