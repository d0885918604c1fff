"""Attention in all its spellings: what is recognised, what is folded, what stays float."""

import pytest
import torch
from scaffold import DIM, HEAD_DIM, HEADS, SIDE, TOKENS
from tiny import float_outputs, relative_error
from toys import (
    folded,
    operations,
    roles,
    toy,
    toy_graph,
    toy_images,
    toy_model,
    toy_sites,
)

from vitcompress.calibration.interpreter import run
from vitcompress.graph import Role, enumerate_sites
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import module_path
from vitcompress.graph.patterns import attentions, norm_linear_groups
from vitcompress.quantizers import Affine

CORE = {Role.QUERY, Role.KEY, Role.PROBS, Role.VALUE}
BLOCKS = ("blocks.0", "blocks.1")


def shapes(name, block):
    """Return the shape of each operand of attention in a block, by role."""
    return {
        site.role: site.shape
        for site in toy_sites(name).values()
        if site.role in CORE and site.name.startswith(block)
    }


def stored_under(name, prefix):
    return [v for key, v in toy_graph(name).tensors().items() if key.startswith(prefix)]


def specs(name, recipe):
    """Return the spec of each site's quantizer, ``None`` where it stays float."""
    return {site.site: site.spec for site in toy_model(name, recipe).report.sites}


# Separate projections


def test_query_key_and_value_share_the_quantizer_of_the_norm_they_read():
    sites = enumerate_sites(toy_model("separate_projections").graph)

    for block in BLOCKS:
        shared = {sites[f"{block}.{part}_proj:input"].quantizer for part in "qkv"}
        assert len(shared) == 1
        assert shared != {None}


def test_a_fold_scales_the_columns_of_query_key_and_value_alike():
    before, (after, _) = toy_graph("separate_projections"), folded("separate_projections")

    for block in BLOCKS:
        names = [f"{block}.{part}_proj.weight" for part in "qkv"]
        ratios = torch.cat([after.parameter(n) / before.parameter(n) for n in names])
        assert ratios.shape == (3 * DIM, DIM)
        assert ratios[0].std() > 0.05
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


# Norms around attention


def test_norms_behind_attention_are_rejected_with_the_reason():
    groups, rejected = norm_linear_groups(toy_graph("norms_behind"))

    assert [module_path(group.norm).path for group in groups] == ["blocks.1.norm"]
    reasons = {module_path(norm).path: reason for norm, reason in rejected}
    assert set(reasons) == {"blocks.0.norm", "blocks.1.norm_after"}
    assert all(reason.startswith("read by add") for reason in reasons.values())


def test_norms_behind_attention_are_reported_as_left_out_of_the_fold():
    entry = next(p for p in toy_model("norms_behind").report.passes if p.name == "repq_vit")

    assert entry.details["folded"] == ["blocks.1.norm"]
    assert set(entry.skipped) == {"blocks.0.norm", "blocks.1.norm_after"}


def test_a_projection_behind_a_post_norm_block_reads_no_norm():
    found = roles("norms_behind")

    assert found["blocks.0.qkv:input"] is Role.OTHER
    assert found["blocks.1.qkv:input"] is Role.NORM_OUTPUT


# Talking heads


@pytest.mark.parametrize("block", BLOCKS)
def test_linears_over_the_heads_are_recognised_and_attention_around_them(block):
    found = {
        name.removeprefix(block): role
        for name, role in roles("talking_heads").items()
        if name.startswith(block)
    }

    mixing = {name for name, role in found.items() if role is Role.HEAD_MIXING}
    assert mixing == {
        f".{mixer}:{port}"
        for mixer in ("mix_scores", "mix_probs")
        for port in ("input", "weight")
    }
    assert (found[":query"], found[":key"], found[":value"]) == (
        *(Role.QUERY, Role.KEY),
        Role.VALUE,
    )
    # No longer between 0 and 1, which a logarithm would need.
    assert found[":left"] is Role.PRODUCT
    assert Role.PROBS not in found.values()


@pytest.mark.parametrize("recipe", ["deploy", "repq_vit"])
def test_linears_over_the_heads_stay_float(recipe):
    found = specs("talking_heads", recipe)

    mixing = {name: spec for name, spec in found.items() if ".mix_" in name}
    assert len(mixing) == 8
    assert set(mixing.values()) == {None}


def test_mixed_probabilities_are_quantized_like_any_other_operand():
    found = specs("talking_heads", "repq_vit")

    assert found["blocks.0:left"] == found["blocks.0:query"]
    assert found["blocks.0:left"] is not None


# Other attention


def test_one_query_asks_in_class_attention():
    for block in BLOCKS:
        assert shapes("class_attention", block) == {
            Role.QUERY: (None, HEADS, 1, HEAD_DIM),
            Role.KEY: (None, HEADS, HEAD_DIM, 1 + TOKENS),
            Role.PROBS: (None, HEADS, 1, 1 + TOKENS),
            Role.VALUE: (None, HEADS, 1 + TOKENS, HEAD_DIM),
        }


def test_a_norm_read_through_a_selected_token_has_all_its_readers():
    groups, rejected = norm_linear_groups(toy_graph("class_attention"))

    assert rejected == []
    assert [len(group.consumers) for group in groups] == [3, 3]


@pytest.mark.parametrize(
    "name",
    ["cosine_attention", "shifted_windows", "padded_windows", "library_attention", "einsum"],
)
def test_attention_is_recognised_in_both_blocks(name):
    for block in BLOCKS:
        assert set(shapes(name, block)) == CORE


def test_a_clamped_temperature_becomes_a_constant():
    expected = torch.tensor([5.0, 10.0, 100.0])[:, None, None]

    assert {"exp", "clamp", "clamp_max"}.isdisjoint(operations("cosine_attention"))
    for block in BLOCKS:
        (temperature,) = stored_under("cosine_attention", f"{block}.constant")
        torch.testing.assert_close(temperature, expected)


def test_the_library_module_has_its_projections_recognised():
    found = roles("library_attention")

    for block in BLOCKS:
        assert found[f"{block}.attn:input"] is Role.NORM_OUTPUT
        assert found[f"{block}.attn:weight"] is Role.WEIGHT
        assert found[f"{block}.attn:input.1"] is Role.PROJ_INPUT
    groups, rejected = norm_linear_groups(toy_graph("library_attention"))
    assert ([len(group.consumers) for group in groups], rejected) == ([1, 1], [])


# Windows and blocks of tokens


def test_a_bias_picked_by_index_becomes_one_constant_per_block():
    assert "index" not in operations("shifted_windows")
    for path, block in zip(BLOCKS, toy("shifted_windows").blocks, strict=True):
        bias = block.table[block.index].permute(2, 0, 1)[None]
        mask = block.mask[None, :, None]

        stored = stored_under("shifted_windows", f"{path}.constant")

        assert len(stored) == 2
        assert torch.equal(stored[0], bias)
        assert torch.equal(stored[1], mask)


@pytest.mark.parametrize("recipe", ["deploy", "repq_vit"])
def test_the_mask_between_torn_windows_widens_no_range(recipe):
    model = toy_model("shifted_windows", recipe)
    assert min(v.min() for v in model.graph.tensors().values()) == -100.0

    lows = [site.low for site in model.report.sites if site.low is not None]
    quantizers = [q for q in model.graph.quantizers().values() if isinstance(q, Affine)]
    starts = [(q.bounds[0] - q.zero_point.double()) * q.scale.double() for q in quantizers]

    assert min(lows) > -50.0
    assert min(float(start.min()) for start in starts) > -50.0


@pytest.mark.parametrize("recipe", ["deploy", "repq_vit"])
def test_torn_windows_do_not_see_each_other_after_quantization(recipe):
    graph = toy_model("shifted_windows", recipe).graph
    seen = {attention.softmax: [] for attention in attentions(graph)}

    run(graph, toy_images(3), taps={node: seen[node].append for node in seen})

    assert len(seen) == 2
    torn = toy("shifted_windows").blocks[0].mask < 0
    for (probs,) in seen.values():
        windows = probs.unflatten(0, (3, -1)).amax(dim=(0, 2))
        assert windows[torn].max() < 1e-20
        assert windows[~torn].min() > 1e-3


def test_zeros_padded_behind_a_norm_are_moved_with_the_norm():
    x = toy_images(3)
    with torch.no_grad():
        expected = toy("padded_windows")(x)
    groups, _ = norm_linear_groups(toy_graph("padded_windows"))
    graph, record = folded("padded_windows")
    forgetful = graph.clone()
    for name in [name for name in graph.tensors() if "pad_value" in name]:
        forgetful.set_parameter(name, torch.zeros(DIM))

    assert [len(consumer.pads) for group in groups for consumer in group.consumers] == [1, 1]
    assert record.report.details["folded"] == ["blocks.0.norm", "blocks.1.norm"]
    assert relative_error(float_outputs(graph, x), expected) <= 1e-4
    assert relative_error(float_outputs(forgetful, x), expected) > 1e-2


def test_attention_on_blocks_of_tokens_keeps_its_five_axes_and_exports(export):
    for block in BLOCKS:
        found = shapes("blocked_attention", block)
        assert found[Role.QUERY] == (None, HEADS, 2, TOKENS // 2, HEAD_DIM)
        assert found[Role.PROBS] == (None, HEADS, 2, TOKENS // 2, TOKENS // 2)
    # Patches, head; qkv and proj of each block.
    assert export("blocked_attention").verification.integer_linears == 2 + 2 * 2


def test_outlook_attention_has_probabilities_and_values_but_no_query(export):
    for block in BLOCKS:
        assert shapes("outlook_attention", block) == {
            Role.PROBS: (None, HEADS, TOKENS, 9, 9),
            Role.VALUE: (None, HEADS, TOKENS, 9, HEAD_DIM),
        }
    # Patches, head; attn, v and proj of each block.
    assert export("outlook_attention").verification.integer_linears == 2 + 2 * 3


def test_neighbourhoods_that_overlap_are_sums_and_no_attention_output():
    found = operations("outlook_attention")

    assert (found.count("im2col"), found.count("col2im")) == (2, 2)
    assert roles("outlook_attention")["blocks.0.proj:input"] is Role.OTHER


# Einsum


def test_einsum_is_spelled_as_products():
    found = operations("einsum")

    assert "einsum" not in found
    assert found.count("matmul") == 5


def test_a_query_that_meets_a_table_of_positions_is_a_product_of_its_own():
    sites = toy_sites("einsum")

    tables = {name: site for name, site in sites.items() if site.role is Role.PRODUCT}
    assert list(tables) == ["blocks.1:left"]
    assert tables["blocks.1:left"].shape == (None, SIDE, SIDE, HEAD_DIM)
    assert shapes("einsum", "blocks.1")[Role.QUERY] == (None, HEADS, TOKENS, HEAD_DIM)


def test_a_product_with_a_bare_parameter_is_a_linear_whose_norm_folds():
    found = roles("stored_product")

    assert "matmul" not in operations("stored_product")
    for block in BLOCKS:
        assert found[f"{block}:input"] is Role.NORM_OUTPUT
        assert found[f"{block}:weight"] is Role.WEIGHT
    assert folded("stored_product")[1].report.details["folded"] == [
        f"{block}.norm" for block in BLOCKS
    ]


# Without softmax


def test_a_learned_vector_that_weighs_queries_is_a_weight():
    sites = toy_sites("additive_attention")

    for block in BLOCKS:
        assert sites[f"{block}:weight"].role is Role.WEIGHT
        assert sites[f"{block}:weight"].shape == (1, DIM)
    assert CORE.isdisjoint(roles("additive_attention").values())
    assert "matmul" not in operations("additive_attention")


def test_products_of_linear_attention_are_visible_and_stay_float():
    found = roles("relu_linear_attention")

    products = [name for name, role in found.items() if role is Role.PRODUCT]
    assert products == [
        f"{block}:{side}"
        for block in BLOCKS
        for side in ("left", "right", "left.1", "right.1")
    ]
    assert CORE.isdisjoint(found.values())
    deployed = specs("relu_linear_attention", "deploy")
    assert {deployed[name] for name in products} == {None}


def test_the_division_of_linear_attention_is_untouched():
    graph = toy_model("relu_linear_attention", "repq_vit").graph

    divisions = [n for n in graph.nodes_of_kind("call_function") if ".div." in str(n.target)]

    assert len(divisions) == 2
    for node in divisions:
        assert not any(is_quantizer(source) for source in node.all_input_nodes)


# Constants


def test_a_network_on_constant_coordinates_becomes_a_bias():
    block = toy("computed_positions").blocks[0]
    table = 16 * torch.sigmoid(block.cpb2(torch.relu(block.cpb1(block.grid))))
    expected = table[block.index].permute(2, 0, 1)[None]

    (stored,) = stored_under("computed_positions", "blocks.0.constant")

    torch.testing.assert_close(stored, expected)
    assert not [name for name in toy_sites("computed_positions") if "cpb" in name]
    assert {"sigmoid", "relu", "index"}.isdisjoint(operations("computed_positions"))


def test_waves_over_a_mask_of_the_batch_become_one_row():
    found = operations("computed_positions")

    assert {"sin", "cos", "arange", "cumsum", "zeros", "pow"}.isdisjoint(found)
    assert [v.shape for v in stored_under("computed_positions", "blocks.1.constant")] == [
        (1, TOKENS, DIM)
    ]
    assert not [name for name in toy_sites("computed_positions") if "waves" in name]
    assert found.count("conv2d") == 1  # the patch embedding


def test_a_learned_query_repeated_for_every_image_is_projected_once():
    block = toy("learned_query").blocks[1]
    expected = block.q_proj(block.latent).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)

    (stored,) = stored_under("learned_query", "blocks.1.constant")

    torch.testing.assert_close(stored, expected)
    assert not [name for name in toy_sites("learned_query") if "q_proj" in name]
    assert "expand" not in operations("learned_query")
    for part in (Role.KEY, Role.PROBS, Role.VALUE):
        assert part in shapes("learned_query", "blocks.1")
