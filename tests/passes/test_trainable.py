"""A block that can be trained; item numbers are those of the method's test list."""

import pytest
import torch
from tasks import tasks_of
from tiny import images, make_source, ranged, run_steps

from vitcompress.graph import enumerate_sites
from vitcompress.passes.trainable import Coin, SoftRounding, TrainableBlock
from vitcompress.quantizers import PerChannel

EVERYTHING = torch.arange(12)
ATTACH = {
    "pass": "attach",
    "rules": [
        {"roles": ["weight"], "bits": "w", "granularity": "per_channel"},
        {"roles": ["query", "key", "value", "proj_input", "act_output"], "bits": "a"},
        {"roles": ["norm_output", "head_input", "patch_input"], "bits": "a"},
        {"roles": ["probs"], "bits": "a", "format": "log_sqrt2"},
    ],
}


@pytest.fixture(scope="module")
def quantized(vit_graph):
    steps = [ATTACH, {"pass": "calibrate", "method": "mse"}]
    return run_steps(steps, vit_graph, make_source(images(8)), "W3A4")[0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def in_block(quantized, vit_graph, use, path="blocks.0", **settings):
    def chosen(task):
        return use(task) if task.path == path else None

    return tasks_of(quantized.clone(), vit_graph, chosen, **settings)[path]


def soft_rounding(bits=3, rows=6, columns=40, clip=1.0):
    weight = torch.randn(rows, columns, generator=generator())
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    quantizer = ranged(clip * low, clip * high, bits=bits, granularity=PerChannel(0))
    return SoftRounding(quantizer, weight), weight, quantizer


# AdaRound (item 1)


@pytest.mark.parametrize("clip", [1.0, 0.6], ids=["whole range", "clipped"])
def test_soft_rounding_starts_at_the_weight_itself_inside_the_range(clip):
    rounding, weight, quantizer = soft_rounding(clip=clip)

    found = rounding(weight)

    scale, zero_point = quantizer.scale[:, None], quantizer.zero_point[:, None]
    low, high = -zero_point * scale, (7 - zero_point) * scale
    inside = (weight >= low) & (weight <= high)
    assert inside.float().mean() > 0.7
    assert ((found - weight).abs() / scale)[inside].max() <= 1e-6
    torch.testing.assert_close(found, weight.clamp(low, high), rtol=0.0, atol=1e-5)


def test_decided_at_once_it_rounds_to_nearest():
    rounding, weight, quantizer = soft_rounding()

    # At exactly halfway either neighbour is nearest; no weight of the seed lies there.
    torch.testing.assert_close(rounding.hardened(), quantizer(weight), rtol=0.0, atol=1e-6)


def test_a_decision_is_one_of_the_two_neighbours():
    rounding, weight, quantizer = soft_rounding()
    with torch.no_grad():
        rounding.rounding.copy_(torch.randn(rounding.rounding.shape, generator=generator(3)))

    found = rounding.hardened()

    steps = (found - weight).abs() / quantizer.scale[:, None]
    assert steps.max() <= 1.0 + 1e-5
    assert steps.max() > 0.6
    torch.testing.assert_close(quantizer(found), found, rtol=0.0, atol=1e-6)


def test_the_penalty_is_zero_where_everything_is_decided_and_largest_halfway():
    rounding, _, _ = soft_rounding(rows=1, columns=3)

    def penalty(*logits):
        with torch.no_grad():
            rounding.rounding.copy_(torch.tensor([logits]))
        return rounding.penalty(2.0).item()

    assert penalty(5.0, -5.0, 5.0) == 0.0
    assert penalty(0.0, -5.0, 5.0) == pytest.approx(1.0)
    assert penalty(0.0, 0.0, 0.0) == pytest.approx(3.0)


def test_gradients_stop_where_a_weight_is_clipped():
    rounding, weight, quantizer = soft_rounding(clip=0.5)

    rounding(weight).sum().backward()

    codes = torch.floor(weight / quantizer.scale[:, None]) + quantizer.zero_point[:, None]
    clipped = (codes < -1) | (codes > 7)
    assert bool(clipped.any())
    assert bool((rounding.rounding.grad[clipped] == 0.0).all())
    assert bool((rounding.rounding.grad[(codes >= 0) & (codes < 7)] > 0.0).all())


# Learned scales


def test_the_gradient_of_a_scale_is_that_of_learned_step_sizes(quantized, vit_graph):
    """By hand: round(x/s) - x/s inside, the clipped code outside."""
    x = torch.tensor([0.26, -0.1, 9.0, -9.0])
    quantizer = ranged(torch.tensor(-0.5), torch.tensor(1.0), bits=4)
    scale, zero_point = quantizer.scale.item(), quantizer.zero_point.item()

    def use(task):
        block = TrainableBlock(task, weights="straight_through", scales=True)
        site = enumerate_sites(quantized)["blocks.0.fc2:input"].quantizer
        learned = block.module.get_submodule(site)
        learned.quantizer = quantizer
        values = x.clone().requires_grad_()
        learned(values).sum().backward()
        return learned.log_ratio.grad, values.grad

    of_log_scale, of_x = in_block(quantized, vit_graph, use)

    ratios = x[:2] / scale
    inside = (ratios.round() - ratios).sum().item()
    outside = (15 - zero_point) + (0 - zero_point)
    assert of_log_scale.item() == pytest.approx(scale * (inside + outside), rel=1e-5)
    assert of_x.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("weights", ["adaround", "straight_through"])
def test_what_is_learned_is_what_was_asked_for(quantized, vit_graph, weights):
    def use(task):
        block = TrainableBlock(task, weights=weights, scales=True)
        return (
            len(block.rounding_parameters),
            len(block.weight_parameters),
            len(block.bias_parameters),
            len(block.scale_parameters),
        )

    found = in_block(quantized, vit_graph, use)

    # Four linears; seven affine activation sites (the probabilities are a table).
    assert found == ((4, 0, 4, 7) if weights == "adaround" else (0, 4, 4, 11))


def test_scales_stay_unless_asked_for(quantized, vit_graph):
    def use(task):
        block = TrainableBlock(task, weights="adaround", scales=False)
        return block.scale_parameters, block.outcome({}).quantizers

    assert in_block(quantized, vit_graph, use) == ([], {})


# QDrop (item 2)


def test_with_everything_quantized_a_block_is_the_plain_one_bit_for_bit(quantized, vit_graph):
    def use(task):
        x = [rows.take(EVERYTHING) for rows in task.inputs]
        plain = task.unit.module(*x)[0]
        block = TrainableBlock(
            task, weights="straight_through", scales=True, coin=Coin(1.0, generator())
        )
        return torch.equal(block(*x), plain) and torch.equal(block.quantized(*x), plain)

    assert in_block(quantized, vit_graph, use)


def test_with_nothing_quantized_only_the_weights_are(quantized, vit_graph):
    def use(task):
        x = [rows.take(EVERYTHING) for rows in task.float_inputs]
        coin = Coin(0.0, generator())
        block = TrainableBlock(task, weights="straight_through", scales=True, coin=coin)
        return block(*x)

    found = in_block(quantized, vit_graph, use)

    rules = [{"roles": ["weight"], "bits": 3, "granularity": "per_channel"}]
    steps = [{"pass": "attach", "rules": rules}, {"pass": "calibrate", "method": "mse"}]
    weights_only = run_steps(steps, vit_graph, make_source(images(8)))[0]

    def plain(task):
        return task.unit.module(*(rows.take(EVERYTHING) for rows in task.float_inputs))[0]

    assert torch.equal(found, in_block(weights_only, vit_graph, plain))


@pytest.mark.parametrize("weights", ["adaround", "straight_through", "float"])
def test_a_settled_block_is_what_the_graph_computes_with_the_outcome(
    quantized, vit_graph, weights
):
    if weights == "float":
        rules = [ATTACH["rules"][2]]
        steps = [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}]
        quantized = run_steps(steps, vit_graph, make_source(images(8)))[0]

    def use(task):
        coin = Coin(0.5, generator())
        block = TrainableBlock(task, weights=weights, scales=True, coin=coin)
        with torch.no_grad():
            for parameter in block.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator(1))
                    parameter.add_(0.05 * noise)
            x = [rows.take(EVERYTHING) for rows in task.inputs]
            settled[task.path] = x, block.settled(*x)
        return block.outcome({})

    settled, graph = {}, quantized.clone()
    tasks_of(graph, vit_graph, use)

    def check(task):
        x, expected = settled[task.path]
        return torch.equal(task.unit.module(*x)[0], expected)

    assert all(tasks_of(graph, vit_graph, check).values())
    assert len(settled) == 4 if weights != "float" else len(settled) >= 3


def test_the_graph_is_untouched_until_the_outcome_is_put_in(quantized, vit_graph):
    graph = quantized.clone()
    before = {name: value.clone() for name, value in graph.tensors().items()}

    def use(task):
        block = TrainableBlock(task, weights="straight_through", scales=True)
        x = [rows.take(EVERYTHING) for rows in task.inputs]
        block(*x).square().sum().backward()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(1.0)

    tasks_of(graph, vit_graph, use)

    assert all(torch.equal(value, before[name]) for name, value in graph.tensors().items())
    assert torch.equal(graph(images(2)), quantized(images(2)))


def test_coins_fall_as_often_as_asked_and_again_from_the_same_seed():
    like = torch.zeros(1001, 101)

    for probability in (0.25, 0.5, 0.75):
        tossed = Coin(probability, generator(5)).toss(like)
        assert tossed.float().mean().item() == pytest.approx(probability, abs=0.005)
        assert torch.equal(tossed, Coin(probability, generator(5)).toss(like))
    assert not torch.equal(tossed, Coin(0.75, generator(6)).toss(like))
    rows = Coin(0.5, generator(1)).toss(like).float()
    assert rows.mean(dim=0).std() == pytest.approx(0.5 / 1001**0.5, rel=0.3)
    assert Coin(1.0, generator()).toss(like) is None
    assert not Coin(0.0, generator()).toss(like).any()


def test_mixing_takes_each_element_from_one_or_the_other():
    quantized, plain = torch.ones(40, 50), torch.zeros(40, 50)

    found = Coin(0.5, generator()).mix(quantized, plain)

    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(Coin(1.0, generator()).mix(quantized, plain), quantized)


def test_a_shared_weight_stays_as_it_is_and_is_named(quantized, vit_graph):
    graph = quantized.clone()
    for node in graph.graph.find_nodes(op="get_attr", target="blocks.1.fc1.weight"):
        node.target = "blocks.0.fc1.weight"
    graph.module.recompile()

    def use(task):
        block = TrainableBlock(task, weights="adaround", scales=False)
        return block.untrained, set(block.outcome({}).tensors)

    untrained, trained = tasks_of(graph, vit_graph, use)["blocks.0"]

    assert untrained == {"blocks.0.fc1.weight": "another block reads it too"}
    assert "blocks.0.fc1.weight" not in trained
    assert "blocks.0.fc2.weight" in trained


def test_weights_in_a_table_format_have_no_neighbours(vit_graph):
    rules = [{"roles": ["weight"], "bits": 4, "format": "log2"}]
    graph = run_steps(
        [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}],
        vit_graph,
        make_source(images(4)),
    )[0]

    def use(task):
        return TrainableBlock(task, weights="adaround", scales=False).untrained

    assert tasks_of(graph, vit_graph, use)["head"] == {
        "head.weight": "format log2 has no neighbours"
    }
