"""The walk through blocks: what each is given, and what becomes of what it gives back."""

from dataclasses import replace

import pytest
import torch
from tiny import images, make_source, run_steps
from zoo import zoo_graph, zoo_images

from vitcompress.calibration.interpreter import run
from vitcompress.engine import LocalEngine
from vitcompress.engine.blocks import BlockWalk, chosen_device
from vitcompress.engine.cache import RowStore
from vitcompress.errors import ConfigError, PassError
from vitcompress.graph import enumerate_sites
from vitcompress.graph.patterns import Block, blocks
from vitcompress.passes.blocks import BlockOutcome, BlockSettings

RULES = [{"roles": ["weight", "norm_output", "patch_input", "head_input"], "bits": 4}]
STEPS = [{"pass": "attach", "rules": RULES}, {"pass": "calibrate", "method": "minmax"}]
IMAGES = 10
EVERYTHING = torch.arange(IMAGES)


@pytest.fixture(scope="module")
def quantized(vit_graph):
    return run_steps(STEPS, vit_graph, make_source(images(8)))[0]


def walked(graph, teacher, fit, inputs="both", x=None, answers=False, **settings):
    x = images(IMAGES, seed=4) if x is None else x
    return LocalEngine().map_blocks(
        graph,
        teacher,
        make_source(x, batch_size=4),
        fit,
        inputs=inputs,
        settings=BlockSettings(batch_size=3, device="cpu", **settings),
        seed=5,
        answers=answers,
    )


def seen_by(graph, teacher, **settings):
    """Return what each block was given: path -> inputs, float inputs, targets."""
    found = {}

    def fit(task):
        found[task.path] = tuple(
            [rows.take(EVERYTHING) for rows in values]
            for values in (task.inputs, task.float_inputs, (task.targets,))
        )
        return BlockOutcome()

    walked(graph, teacher, fit, **settings)
    return found


def block_input(graph, path, x):
    """Return what the first norm of a block reads."""
    seen = []
    norm = next(n for n in graph.graph.nodes if n.meta["module"].path == f"{path}.norm1")
    run(graph, x, taps={norm.all_input_nodes[0]: seen.append})
    return seen[0]


def test_blocks_get_the_inputs_of_both_networks_and_the_float_output(quantized, vit_graph):
    x = images(IMAGES, seed=4)

    found = seen_by(quantized.clone(), vit_graph)

    assert list(found) == ["patch_embed", "blocks.0", "blocks.1", "head"]
    inputs, plain, target = found["blocks.1"]
    close = {"rtol": 1e-4, "atol": 1e-5}  # batches of 3 instead of 10
    torch.testing.assert_close(inputs[0], block_input(quantized, "blocks.1", x), **close)
    torch.testing.assert_close(plain[0], block_input(vit_graph, "blocks.1", x), **close)
    torch.testing.assert_close(found["blocks.0"][2][0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(found["head"][2][0], vit_graph(x), **close)
    assert (inputs[0] - plain[0]).abs().max() > 0.05
    assert target[0].shape == (IMAGES, 17, 32)


def test_only_the_inputs_that_were_asked_for_are_kept(quantized, vit_graph):
    plain = seen_by(quantized.clone(), vit_graph, inputs="float")["blocks.1"]
    fed = seen_by(quantized.clone(), vit_graph, inputs="quantized")["blocks.1"]

    assert (len(plain[0]), len(plain[1])) == (0, 1)
    assert (len(fed[0]), len(fed[1])) == (1, 0)
    assert torch.equal(plain[2][0], fed[2][0])


def test_files_and_memory_hold_the_same_bits(quantized, vit_graph):
    memory = seen_by(quantized.clone(), vit_graph)
    files = seen_by(quantized.clone(), vit_graph, cache_memory_mb=0)

    for path, groups in memory.items():
        for group, other in zip(groups, files[path], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(group, other, strict=True))


def test_half_precision_is_near(quantized, vit_graph):
    exact = seen_by(quantized.clone(), vit_graph)["blocks.1"]
    half = seen_by(quantized.clone(), vit_graph, cache_half=True)["blocks.1"]

    torch.testing.assert_close(half[2][0], exact[2][0], rtol=1e-2, atol=1e-2)
    assert not torch.equal(half[2][0], exact[2][0])


def test_an_outcome_is_put_into_the_graph_and_changes_what_the_next_block_reads(
    quantized, vit_graph
):
    graph = quantized.clone()
    site = enumerate_sites(graph)["blocks.0.fc2:weight"]
    seen = {}

    def fit(task):
        seen[task.path] = task.inputs[0].take(EVERYTHING)
        if task.path != "blocks.0":
            return BlockOutcome()
        weight = task.unit.module.get_buffer("blocks.0.fc2.weight")
        quantizer = {"scale": torch.tensor(0.5), "zero_point": torch.tensor(3.0)}
        return BlockOutcome(
            tensors={"blocks.0.fc2.weight": 2.0 * weight},
            quantizers={site.quantizer: quantizer},
            details={"figure": 1.5},
        )

    records = walked(graph, vit_graph, fit)

    before = quantized.parameter("blocks.0.fc2.weight")
    assert torch.equal(graph.parameter("blocks.0.fc2.weight"), 2.0 * before)
    assert graph.quantizers()[site.quantizer].scale.item() == 0.5
    assert quantized.quantizers()[site.quantizer].scale.item() != 0.5
    assert records[1].details["figure"] == 1.5
    unchanged = seen_by(quantized.clone(), vit_graph)
    assert torch.equal(seen["blocks.0"], unchanged["blocks.0"][0][0])
    assert (seen["blocks.1"] - unchanged["blocks.1"][0][0]).abs().max() > 0.1
    x = images(IMAGES, seed=4)
    torch.testing.assert_close(
        seen["blocks.1"], block_input(graph, "blocks.1", x), rtol=1e-4, atol=1e-5
    )


def test_the_last_images_are_held_out(quantized, vit_graph):
    seen = []

    def fit(task):
        seen.append((task.training, task.images, task.batches(), task.batches(held_out=True)))
        return BlockOutcome()

    walked(quantized.clone(), vit_graph, fit, held_out=0.4)

    training, count, batches, held_out = seen[0]
    assert (training, count) == (6, IMAGES)
    assert torch.cat(batches).tolist() == list(range(6))
    assert torch.cat(held_out).tolist() == [6, 7, 8, 9]


def test_images_that_a_source_leaves_out_are_not_missed(quantized, vit_graph):
    class Short:
        batch_size = 4

        def __init__(self):
            self.images = make_source(images(6, seed=4), batch_size=4)

        def __iter__(self):
            return iter(self.images)

        def __len__(self):
            return 9

    seen = []

    def fit(task):
        seen.append((task.training, task.images))
        assert torch.isfinite(task.targets.take(torch.arange(6))).all()
        return BlockOutcome()

    LocalEngine().map_blocks(
        quantized.clone(),
        vit_graph,
        Short(),
        fit,
        inputs="both",
        settings=BlockSettings(device="cpu", held_out=0.5),
        seed=0,
    )

    assert seen == [(3, 6)] * 4


def test_each_block_draws_from_a_generator_of_its_own(quantized, vit_graph):
    draws = []

    def fit(task):
        draws.append(torch.rand((), generator=task.generator).item())
        return BlockOutcome()

    walked(quantized.clone(), vit_graph, fit)
    walked(quantized.clone(), vit_graph, fit)

    assert draws[:4] == draws[4:]
    assert len(set(draws)) == 4


def test_blocks_without_quantizers_are_left_alone_with_a_reason(vit_graph, source):
    rules = [{"sites": ["blocks.1.*"], "bits": 4}]
    graph = run_steps(
        [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}], vit_graph, source
    )[0]
    visited = []

    def fit(task):
        visited.append(task.path)
        return BlockOutcome()

    records = walked(graph, vit_graph, fit)

    assert visited == ["blocks.0", "blocks.1"]
    assert {r.path: r.skipped for r in records if r.skipped} == {
        "patch_embed": "nothing in it is quantized",
        "head": "nothing in it is quantized",
    }


def test_a_block_that_several_values_leave_is_left_alone_with_a_reason(quantized, vit_graph):
    def pair(graph):
        norm = next(n for n in graph.graph.nodes if n.meta["module"].path == "blocks.0.norm2")
        return [Block("pair", (norm.all_input_nodes[0], norm))]

    records = LocalEngine().map_blocks(
        quantized.clone(),
        vit_graph,
        make_source(images(4)),
        lambda task: BlockOutcome(),
        inputs="both",
        settings=BlockSettings(device="cpu"),
        seed=0,
        units=pair,
    )

    assert [record.path for record in records] == ["patch_embed", "pair", "blocks.0.fc1"]
    assert records[1].skipped == "2 values leave it at once"


def test_every_block_knows_what_the_float_network_answers_if_asked(quantized, vit_graph):
    x = images(IMAGES, seed=4)
    found, unasked = [], []

    def fit(task):
        found.append(task.answers.take(EVERYTHING))
        return BlockOutcome()

    def fit_without(task):
        unasked.append(task.answers)
        return BlockOutcome()

    walked(quantized.clone(), vit_graph, fit, x=x, answers=True)
    walked(quantized.clone(), vit_graph, fit_without, x=x)

    assert unasked == [None] * 4
    assert len(found) == 4
    for answers in found:
        torch.testing.assert_close(answers, vit_graph(x), rtol=1e-4, atol=1e-5)


def test_tensors_that_another_block_reads_are_named(quantized, vit_graph):
    graph = quantized.clone()
    for node in graph.graph.find_nodes(op="get_attr", target="blocks.1.fc1.bias"):
        node.target = "blocks.0.fc1.bias"
    graph.module.recompile()
    shared = {}

    def fit(task):
        shared[task.path] = task.shared
        return BlockOutcome()

    walked(graph, vit_graph, fit)

    assert shared["blocks.0"] == shared["blocks.1"] == {"blocks.0.fc1.bias"}
    assert shared["head"] == frozenset()


def test_windows_of_a_hierarchical_network_are_cached_by_image():
    teacher = zoo_graph("timm_swin")
    graph = run_steps(STEPS, teacher, make_source(zoo_images("timm_swin", 4)))[0]
    x = zoo_images("timm_swin", IMAGES)

    found = {}

    def fit(task):
        found[task.path] = task.float_inputs[0].take(torch.tensor([5, 2]))
        return BlockOutcome()

    walked(graph, teacher, fit, x=x)

    seen = []
    block = blocks(teacher)[2]
    entry = next(n for n in block.nodes if "layer_norm" in str(n.target)).all_input_nodes[0]
    run(teacher, x, taps={entry: seen.append})
    torch.testing.assert_close(
        found[block.path], seen[0][torch.tensor([5, 2])], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("answers", [False, True])
def test_memory_does_not_grow_with_depth(quantized, vit_graph, monkeypatch, answers):
    counts = []
    room = RowStore.room

    def watched(self, *arguments, **keywords):
        rows = room(self, *arguments, **keywords)
        counts.append(len(self._rows))
        return rows

    monkeypatch.setattr(RowStore, "room", watched)

    walked(quantized.clone(), vit_graph, lambda task: BlockOutcome(), answers=answers)

    # The answers if asked for, the images, then at most two values of either network.
    assert max(counts) == 4 + answers
    assert counts[-1] <= 4 + answers


def test_a_teacher_of_another_structure_is_refused(quantized, vit_graph):
    other = vit_graph.clone()
    for node in other.graph.nodes:
        if node.meta["module"].path == "patch_embed":
            node.meta["module"] = replace(node.meta["module"], path="stem")

    with pytest.raises(PassError, match="patch_embed: the float network has 'stem"):
        walked(quantized.clone(), other, lambda task: BlockOutcome())


def test_holding_out_every_image_is_refused(quantized, vit_graph):
    with pytest.raises(PassError, match="1 images, 1 held out: none is left to train on"):
        walked(
            quantized.clone(),
            vit_graph,
            lambda task: BlockOutcome(),
            x=images(1),
            held_out=0.9,
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_unless_the_choice_was_left_open():
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device: cuda is not available here"):
        chosen_device("cuda")


@pytest.mark.gpu
def test_blocks_run_on_a_gpu(quantized, vit_graph):
    walk = BlockWalk(
        quantized.clone(), vit_graph, BlockSettings(device="cuda"), 0, None, blocks
    )

    def fit(task):
        assert task.targets.take(EVERYTHING).is_cuda
        return BlockOutcome()

    walk.run(make_source(images(IMAGES)), "both", fit)


@pytest.mark.parametrize(
    ("key", "value"),
    [("held_out", 1.0), ("held_out", -0.1), ("batch_size", 0), ("cache_memory_mb", -1)],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        BlockSettings(**{key: value})
