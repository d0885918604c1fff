from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import images, make_source, run_steps

from vitcompress.calibration import ChannelAbsMax, MinMax, Request
from vitcompress.calibration.interpreter import run
from vitcompress.engine import LocalEngine, run_recipe
from vitcompress.engine.memory import PeakMemory
from vitcompress.errors import ConfigError, PassError, UnsupportedModelError
from vitcompress.graph import Role, enumerate_sites
from vitcompress.passes import Attach, Fact, PassReport
from vitcompress.passes.attach import AttachConfig, AttachRule
from vitcompress.recipe import Recipe, Scheme

NOTHING: frozenset[Fact] = frozenset()


@dataclass(frozen=True)
class NoConfig:
    pass


class Stub:
    """A pass that does what it is told."""

    name: ClassVar[str] = "stub"
    config_type: ClassVar[type] = NoConfig

    def __init__(
        self, action=lambda graph: None, *, provides=NOTHING, preserves=True, asks=()
    ):
        self.config = NoConfig()
        self.action = action
        self.asks = asks
        self.requires = self.forbids = NOTHING
        self.provides = frozenset(provides)
        self.preserves_function = preserves

    def statistics(self, graph):
        return list(self.asks)

    def apply(self, graph, context):
        self.context = context
        self.action(graph)
        return PassReport(changed=1, found=1)


def run_stubs(graph, source, *steps):
    return run_recipe(Recipe("test", Scheme(4, 4), 0, tuple(steps)), graph, source)


def scale_head(factor):
    def action(graph):
        graph.set_parameter("head.weight", factor * graph.parameter("head.weight"))

    return action


def fail_with(error):
    def action(graph):
        raise error

    return action


def test_a_pass_that_moves_the_function_against_its_word_is_caught(vit_graph, source):
    with pytest.raises(
        PassError,
        match=r"passes\[1\] 'stub': promises to keep the function, .* moved by [23]\.\d\de-01",
    ):
        run_stubs(vit_graph, source, Stub(), Stub(scale_head(1.3)))


def test_a_pass_that_does_not_promise_may_move_the_function(vit_graph, source):
    graph, records = run_stubs(vit_graph, source, Stub(scale_head(1.3), preserves=False))

    assert not torch.allclose(graph(images(2)), vit_graph(images(2)))
    assert records[0].function_change is None


def test_rounding_is_no_breach_and_its_size_is_recorded(vit_graph, source):
    _, records = run_stubs(vit_graph, source, Stub(scale_head(1.00001)))

    assert 0 < records[0].function_change < 1e-3


def test_nan_is_a_breach_even_in_a_later_output(source):
    from torch import nn

    from vitcompress.graph import capture

    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x):
            x = x.mean(dim=(1, 2))
            return self.first(x), self.second(x)

    graph = capture(TwoOutputs(), images(2))
    for name in ("first.bias", "second.bias"):
        broken = Stub(lambda g, n=name: g.set_parameter(n, torch.full((4,), float("nan"))))

        with pytest.raises(PassError, match="outputs moved by nan"):
            run_stubs(graph, source, broken)


def test_outputs_that_are_not_finite_are_caught_without_a_promise(vit_graph, source):
    broken = Stub(scale_head(float("inf")), preserves=False)

    with pytest.raises(UnsupportedModelError, match="the output is not finite"):
        run_stubs(vit_graph, source, broken)


def test_a_fact_that_does_not_hold_is_caught(vit_graph, source):
    with pytest.raises(
        PassError, match=r"passes\[0\] 'stub': claims .*attached.* says otherwise"
    ):
        run_stubs(vit_graph, source, Stub(provides={Fact.ATTACHED}))


def test_an_error_carries_the_pass_its_position_and_what_was_done(vit_graph, source):
    error = UnsupportedModelError("blocks.0: what is this?")

    with pytest.raises(PassError) as caught:
        run_stubs(vit_graph, source, Stub(), Stub(fail_with(error)))

    assert str(caught.value) == (
        "passes[1] 'stub': blocks.0: what is this? (passes done before: stub)"
    )
    assert caught.value.__cause__ is error


def test_a_wrong_setting_stays_a_wrong_setting(vit_graph, source):
    with pytest.raises(ConfigError, match=r"passes\[0\] 'stub': glob"):
        run_stubs(vit_graph, source, Stub(fail_with(ConfigError("glob"))))


def test_a_pass_gets_the_float_model_and_a_seeded_generator(vit_graph, source):
    stubs = [Stub(), Stub()]

    for stub in stubs:
        run_stubs(vit_graph, source, stub)

    assert stubs[0].context.reference is vit_graph
    draws = {int(torch.randint(10**9, (1,), generator=s.context.generator)) for s in stubs}
    assert len(draws) == 1


def test_the_reference_is_not_edited(vit_graph, source):
    before = vit_graph.graph.python_code("self").src
    expected = vit_graph(images(2))

    run_stubs(vit_graph, source, Stub(scale_head(2.0), preserves=False))

    assert vit_graph.graph.python_code("self").src == before
    assert torch.equal(vit_graph(images(2)), expected)


def test_statistics_are_collected_with_quantizers_off(vit_graph, source):
    steps = [
        {"pass": "attach", "rules": [{"roles": [str(r) for r in Role], "bits": 2}]},
        {"pass": "calibrate", "method": "minmax"},
    ]
    graph, _ = run_steps(steps, vit_graph, source)
    requests = [Request("head:input", kind) for kind in (MinMax, ChannelAbsMax)]

    found = LocalEngine().collect(graph, requests, source)

    seen = []
    value = enumerate_sites(vit_graph)["head:input"].value
    for batch in source:
        run(vit_graph, batch.images, taps={value: seen.append})
    everything = torch.cat(seen)
    assert found.get("head:input", MinMax) == (everything.min(), everything.max())
    assert torch.equal(found.get("head:input", ChannelAbsMax), everything.abs().amax(dim=0))


def test_no_request_costs_no_data(vit_graph):
    class Unread:
        def __iter__(self):
            raise AssertionError("nobody asked for data")

    LocalEngine().collect(vit_graph, [], Unread())


def test_a_whole_recipe_gives_the_same_bits_twice(vit_graph, source):
    steps = [
        {"pass": "attach", "rules": [{"roles": [str(r) for r in Role], "bits": 4}]},
        {"pass": "calibrate", "method": "output_mse", "sample_tokens": 10},
        {"pass": "freeze"},
    ]

    first, second = (run_steps(steps, vit_graph, source)[0] for _ in range(2))

    assert torch.equal(first(images(4)), second(images(4)))


def test_records_tell_time_and_memory(vit_graph, source):
    _, records = run_stubs(vit_graph, source, Stub(), Stub())

    assert [record.name for record in records] == ["stub", "stub"]
    assert all(record.seconds > 0 for record in records)
    assert all(record.peak_memory_bytes > 2**20 for record in records)


def test_attach_promises_facts_that_hold(vit_graph, source):
    rules = (AttachRule(roles=(Role.WEIGHT,)),)

    graph, _ = run_stubs(vit_graph, source, Attach(AttachConfig(rules=rules)))

    assert graph.quantizers()


def test_peak_memory_sees_an_allocation_that_is_gone_again():
    with PeakMemory() as small:
        pass
    with PeakMemory() as large:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        del block

    assert large.peak_bytes >= small.peak_bytes + 32 * 2**20


def test_sources_of_any_batch_size_give_the_same_model(vit_graph):
    steps = [
        {"pass": "attach", "rules": [{"roles": ["weight", "norm_output"], "bits": 8}]},
        {"pass": "calibrate", "method": "minmax"},
    ]

    graphs = [
        run_steps(steps, vit_graph, make_source(images(8), batch_size=b))[0] for b in (3, 8)
    ]

    first, second = (graph(images(4)) for graph in graphs)
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-2)
