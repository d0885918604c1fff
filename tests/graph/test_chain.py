"""The whole program as blocks that run one after the other."""

import pytest
import torch
from families import FAMILIES, family_graph
from tiny import images, run_steps
from zoo import ZOO, zoo_graph

from vitcompress.errors import UnsupportedModelError
from vitcompress.graph.partition import chain, extract_block
from vitcompress.graph.patterns import Block, blocks

MODELS = [
    "timm_swin",
    "timm_cait",
    pytest.param("timm_vit", marks=pytest.mark.slow),
    pytest.param("hf_vit", marks=pytest.mark.slow),
    pytest.param("timm_deit_distilled", marks=pytest.mark.slow),
    pytest.param("timm_swin_padded", marks=pytest.mark.slow),
    pytest.param("timm_volo", marks=pytest.mark.slow),
]


def model(name):
    return zoo_graph(name) if name in ZOO else family_graph(name)


def computed(graph, found, x):
    """Run a chain and return the outputs of the graph."""
    values = {graph.input_node: x}
    for block in found:
        program = extract_block(graph, block)
        results = program.module(*(values[node] for node in program.inputs))
        values.update(zip(program.outputs, results, strict=True))
    return [values[node] for node in graph.output_node.args[0]]


@pytest.mark.parametrize("name", MODELS)
def test_a_chain_computes_what_the_graph_does(name):
    graph = model(name)
    x = images(3, (ZOO.get(name) or FAMILIES[name])[1])

    found = computed(graph, chain(graph, blocks(graph)), x)

    for value, expected in zip(found, graph.module(x), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_computation_is_in_exactly_one_block(name):
    graph = model(name)

    nodes = [node for block in chain(graph, blocks(graph)) for node in block.nodes]

    expected = [
        node
        for node in graph.graph.nodes
        if node.op in ("call_function", "call_module") and "symbol" not in node.meta
    ]
    assert sorted(nodes, key=expected.index) == expected


def test_what_lies_between_blocks_is_called_by_its_first_weight():
    found = [block.path for block in chain(model("timm_swin"), blocks(model("timm_swin")))]

    assert found == [
        "patch_embed.proj",
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.downsample.reduction",
        "layers.1.blocks.0",
        "head.fc",
    ]


def test_a_token_that_no_image_reaches_goes_with_its_first_reader():
    graph = model("timm_cait")
    found = chain(graph, blocks(graph))

    by_path = {block.path: extract_block(graph, block) for block in found}

    # Alone, the expanded class token would be a step without inputs.
    assert all(program.inputs for program in by_path.values())
    assert len(by_path["blocks_token_only.1"].inputs) == 2


def test_quantized_weights_go_with_the_layer_that_reads_them(vit_graph, source):
    rules = [{"roles": ["weight", "head_input", "patch_input"], "bits": 4}]
    graph = run_steps(
        [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}], vit_graph, source
    )[0]
    x = images(3)

    found = chain(graph, blocks(graph))

    assert [block.path for block in found] == ["patch_embed", "blocks.0", "blocks.1", "head"]
    assert torch.equal(computed(graph, found, x)[0], graph(x))
    assert all(len(extract_block(graph, block).inputs) == 1 for block in found)


def test_other_units_can_be_chosen(vit_graph):
    linears = [n for n in vit_graph.graph.nodes if "linear" in str(n.target)]
    units = [Block("first", tuple(linears[2:3])), Block("second", tuple(linears[5:6]))]

    found = chain(vit_graph, units)

    assert [b.path for b in found] == [
        "patch_embed", "first", "blocks.0.fc2", "second", "blocks.1.fc1",
    ]  # fmt: skip
    assert torch.equal(computed(vit_graph, found, images(2))[0], vit_graph(images(2)))


def test_blocks_that_need_each_other_are_refused(vit_graph):
    ordered = [n for n in vit_graph.graph.nodes if "linear" in str(n.target)][2:4]
    between = next(iter(ordered[0].users))
    crossed = [Block("outside", tuple(ordered)), Block("inside", (between,))]

    with pytest.raises(
        UnsupportedModelError, match=r"\['outside', 'inside'\] need each other's values"
    ):
        chain(vit_graph, crossed)
