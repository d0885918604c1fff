import operator

import pytest
import torch
from tiny import images, run_steps
from zoo import SLOW, ZOO, zoo_graph, zoo_images

from vitcompress.calibration.interpreter import run
from vitcompress.errors import UnsupportedModelError
from vitcompress.graph import enumerate_sites
from vitcompress.graph.partition import extract_block
from vitcompress.graph.patterns import Block, blocks

MODELS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ZOO]


def recorded(graph, nodes, x):
    values = {}
    run(graph, x, taps={n: (lambda value, n=n: values.update({n: value})) for n in nodes})
    return values


@pytest.mark.parametrize("name", MODELS)
def test_each_block_alone_computes_what_it_did_in_the_whole(name):
    graph = zoo_graph(name)
    found = blocks(graph)
    x = zoo_images(name, 3)

    assert len(found) >= 2
    for block in found:
        program = extract_block(graph, block)
        values = recorded(graph, [*program.inputs, *program.outputs], x)

        outputs = program.module(*(values[node] for node in program.inputs))

        for output, node in zip(outputs, program.outputs, strict=True):
            assert torch.equal(output, values[node])


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "torchvision_vit", "hf_vit"])
def test_a_block_takes_and_returns_one_float_tensor_and_back_propagates(name):
    graph = zoo_graph(name)

    for block in blocks(graph):
        program = extract_block(graph, block)
        values = recorded(graph, program.inputs, zoo_images(name, 2))
        floats = [v.requires_grad_() for v in values.values() if v.is_floating_point()]
        (output,) = program.module(*(values[node] for node in program.inputs))
        output.square().sum().backward()

        assert len(floats) == 1
        assert floats[0].grad.abs().max() > 0


def test_block_paths_are_the_models_own():
    assert [block.path for block in blocks(zoo_graph("timm_swin"))] == [
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.blocks.0",
    ]
    assert [block.path for block in blocks(zoo_graph("hf_vit"))] == [
        "vit.layers.0",
        "vit.layers.1",
    ]


def test_tensors_are_shared_not_copied(vit_graph):
    program = extract_block(vit_graph, blocks(vit_graph)[0])

    name = "blocks.0.fc1.weight"
    assert program.module.get_buffer(name).data_ptr() == vit_graph.parameter(name).data_ptr()
    assert not [key for key, _ in program.module.named_buffers() if key.startswith("blocks.1")]


def test_the_whole_graph_is_not_changed(graph):
    before = graph.graph.python_code("self").src

    for block in blocks(graph):
        extract_block(graph, block)

    assert graph.graph.python_code("self").src == before


def test_quantizers_come_along(vit_graph, source):
    steps = [
        {
            "pass": "attach",
            "rules": [{"roles": ["weight", "norm_output", "probs"], "bits": 4}],
        },
        {"pass": "calibrate", "method": "minmax"},
    ]
    graph = run_steps(steps, vit_graph, source)[0]
    block = blocks(graph)[1]

    program = extract_block(graph, block)
    values = recorded(graph, [*program.inputs, *program.outputs], images(2))
    outputs = program.module(*(values[node] for node in program.inputs))

    assert torch.equal(outputs[0], values[program.outputs[0]])
    target = enumerate_sites(graph)["blocks.1.fc1:weight"].quantizer
    assert program.module.get_submodule(target) is graph.module.get_submodule(target)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_sizes_that_depend_on_the_batch_are_computed_anew(batch):
    graph = zoo_graph("timm_swin")

    for block in blocks(graph):
        program = extract_block(graph, block)
        values = recorded(
            graph, [*program.inputs, *program.outputs], zoo_images("timm_swin", batch)
        )
        outputs = program.module(*(values[node] for node in program.inputs))

        assert torch.equal(outputs[0], values[program.outputs[0]])


def test_the_batch_is_found_in_inputs_that_hold_a_multiple_of_it():
    graph = zoo_graph("timm_swin")
    whole = blocks(graph)[0]
    windows = next(
        node
        for node in whole.nodes
        if str(node.meta.get("info", "")).startswith("TensorInfo(shape=('4*B'")
    )
    behind = whole.nodes[whole.nodes.index(windows) + 1 :]
    block = Block("second half", behind)

    program = extract_block(graph, block)
    values = recorded(graph, [*program.inputs, *program.outputs], zoo_images("timm_swin", 3))
    outputs = program.module(*(values[node] for node in program.inputs))

    for output, node in zip(outputs, program.outputs, strict=True):
        assert torch.equal(output, values[node])


def test_a_cut_through_several_tensors_at_once_is_refused(vit_graph):
    block = blocks(vit_graph)[0]
    pick = next(i for i, node in enumerate(block.nodes) if node.target is operator.getitem)

    with pytest.raises(UnsupportedModelError, match="part: cannot cut at 'unbind"):
        extract_block(vit_graph, Block("part", block.nodes[pick:]))


def test_nodes_between_two_members_are_members(vit_graph):
    block = blocks(vit_graph)[0]
    ends = Block("ends", (block.nodes[0], block.nodes[-1]))

    program = extract_block(vit_graph, ends)
    values = recorded(vit_graph, [*program.inputs, *program.outputs], images(2))

    assert len(program.outputs) == 1
    outputs = program.module(*(values[node] for node in program.inputs))
    assert torch.equal(outputs[0], values[program.outputs[0]])
