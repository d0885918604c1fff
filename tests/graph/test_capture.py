import pytest
import torch
import torch.nn.functional as F
from tiny import TinyViT, enliven, images, relative_error, tiny_vit
from torch import nn
from zoo import SLOW, ZOO, zoo_graph, zoo_images, zoo_model

from vitcompress.errors import InputError, UnsupportedModelError
from vitcompress.graph import Role, capture, enumerate_sites
from vitcompress.graph.metadata import module_path

MODELS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ZOO]


def targets(graph):
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


# The function is the model's


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_captured_equals_eager(name, batch):
    x = zoo_images(name, batch)
    expected = logits(zoo_model(name)(x))

    found = zoo_graph(name).logits(x)

    assert expected.abs().mean() > 0.1, "a model that says nothing proves nothing"
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_tensors_keep_their_names(name):
    state = zoo_model(name).state_dict()
    graph = zoo_graph(name)

    for key, value in graph.tensors().items():
        # New are the constants computed ahead, and the bias that a folded batch norm brings.
        created = "constant" in key or (key.endswith("conv.bias") and key not in state)
        assert created or value.shape == state[key].shape
    weights = {key for key in state if key.endswith(".weight") and state[key].dim() >= 2}
    assert weights <= set(graph.tensors())


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_in_normal_form(name):
    found = targets(zoo_graph(name))

    assert not [
        target
        for target in found
        if any(
            word in target
            for word in (
                "scaled_dot",
                "dropout",
                "batch_norm",
                "bmm",
                "assert",
                "aten.view",
                "clone",
                "contiguous",
                "detach",
                "_to_copy",
                "aten.to.",
                "addmm",
            )
        )
    ]


@pytest.mark.parametrize("name", MODELS)
def test_no_operation_reads_constants_alone(name):
    for node in zoo_graph(name).graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and sources:
            assert any(source.op != "get_attr" for source in sources), node.format_node()


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_knows_its_module(name):
    model = zoo_model(name)

    for node in zoo_graph(name).graph.nodes:
        if "linear" in str(node.target) or "layer_norm" in str(node.target):
            path = module_path(node)
            assert type(model.get_submodule(path.path)).__name__ == path.kind


def test_a_distilled_model_answers_with_the_mean_of_both_heads():
    sites = enumerate_sites(zoo_graph("timm_deit_distilled")).values()

    heads = [site.module for site in sites if site.role is Role.HEAD_INPUT]
    assert heads == ["head", "head_dist"]


def test_named_outputs_keep_their_names():
    graph = zoo_graph("hf_vit")

    output = graph(zoo_images("hf_vit", 2))

    assert graph.output_names == ("logits",)
    assert output.logits.shape == (2, 10)
    with pytest.raises(AttributeError, match="no output 'loss'; there are"):
        output.loss  # noqa: B018


# The model is left as it was


def test_the_mode_of_every_module_is_restored():
    model = tiny_vit().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]

    capture(model, images(2))

    assert [module.training for module in model.modules()] == before


def test_dropout_and_batch_norm_are_captured_in_evaluation_mode():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 8, 8)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.drop(self.norm(self.conv(x)).mean((2, 3))))

    model = enliven(Noisy())
    expected = model(images(3))

    graph = capture(model.train(), images(2))

    assert model.training
    assert model.norm.training
    assert model.norm.num_batches_tracked == 0
    torch.testing.assert_close(graph(images(3)), expected, rtol=1e-5, atol=1e-6)


def test_parameters_are_copied_by_reference_and_replaced_not_written(vit, vit_graph):
    before = vit.head.weight.detach().clone()
    graph = vit_graph.clone()

    graph.set_parameter("head.weight", torch.zeros_like(before))

    assert torch.equal(vit.head.weight, before)
    assert torch.equal(vit_graph.parameter("head.weight"), before)
    assert graph(images(2)).std(dim=0).max() < 1e-6  # only the bias is left
    shared = vit_graph.clone().parameter("head.bias")
    assert shared.data_ptr() == vit_graph.parameter("head.bias").data_ptr()


def test_one_image_is_enough_to_capture_a_dynamic_batch(vit):
    graph = capture(vit, images(1))

    assert graph(images(5)).shape == (5, 10)
    assert graph.input_shape == (3, 32, 32)


# Batch norm


class Normed(nn.Module):
    """A batch norm behind a linear or convolution, through a reshape."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 8, 8, bias=False)
        self.linear = nn.Linear(16, 6)
        features = {"linear": 6, "tokens": 24, "map": 64, "pixel": 4, "rows": 6}[kind]
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "map":
            return self.norm(x.flatten(1))
        if self.kind == "pixel":
            return self.norm(x[:, :, :1, :1].flatten(1))
        tokens = self.linear(x.flatten(2))
        if self.kind == "rows":
            return self.norm(tokens.flatten(0, 1))
        return self.norm(tokens.flatten(1) if self.kind == "tokens" else tokens[:, 0])


@pytest.mark.parametrize("kind", ["linear", "tokens", "map", "pixel", "rows"])
def test_batch_norm_through_a_reshape_is_folded_or_kept_but_never_wrong(kind):
    model = enliven(Normed(kind))

    graph = capture(model, images(2))

    torch.testing.assert_close(graph(images(3)), model(images(3)), rtol=1e-5, atol=1e-5)


def test_batch_norm_behind_rows_of_a_linear_is_folded():
    graph = capture(enliven(Normed("rows")), images(2))

    assert not [target for target in targets(graph) if "batch_norm" in target]


# Attention


class OneAttention(nn.Module):
    """One attention core of a chosen kind, without the rest of a block."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.qkv = nn.Linear(16, 48)
        self.mix = nn.Linear(4, 4, bias=False)
        self.proj = nn.Linear(16, 5)
        self.register_buffer("bias", torch.randn(16, 16))

    def heads(self, x):
        return x.reshape(x.shape[0], 16, 4, 4).transpose(1, 2)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (self.heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        attended = getattr(self, self.kind)(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2).mean(dim=1))

    def plain(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def own_factor(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.9)

    def bool_mask(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias > -0.5)

    def float_mask(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)

    def five_axes(self, q, k, v):
        q, k, v = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2, 3)

    def probs_on_the_right(self, q, k, v):
        probs = torch.softmax(q @ k.transpose(-2, -1), dim=-1)
        return (v.transpose(-2, -1) @ probs.transpose(-2, -1)).transpose(-2, -1)

    def scaled_query(self, q, k, v):
        return torch.softmax((0.5 * q) @ k.transpose(-2, -1) + self.bias, dim=-1) @ v

    def talking_heads(self, q, k, v):
        probs = torch.softmax(q @ k.transpose(-2, -1), dim=-1)
        return self.mix(probs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v

    def linear_attention(self, q, k, v):
        return torch.relu(q) @ (torch.relu(k).transpose(-2, -1) @ v) / q.shape[-2]

    def causal(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def grouped(self, q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)

    def dropped(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


RECOGNISED = (
    "plain",
    "own_factor",
    "bool_mask",
    "float_mask",
    "five_axes",
    "probs_on_the_right",
    "scaled_query",
)


@pytest.mark.parametrize("kind", [*RECOGNISED, "talking_heads", "linear_attention"])
def test_every_spelling_of_attention_keeps_its_function(kind):
    model = enliven(OneAttention(kind))

    graph = capture(model, images(2))

    for batch in (1, 3):
        assert relative_error(graph(images(batch)), model(images(batch))) <= 1e-5


@pytest.mark.parametrize("kind", RECOGNISED)
def test_attention_is_recognised(kind):
    sites = enumerate_sites(capture(enliven(OneAttention(kind)), images(2)))

    roles = {site.role for site in sites.values()}
    assert {Role.QUERY, Role.KEY, Role.PROBS, Role.VALUE, Role.OTHER} >= roles - {
        Role.WEIGHT,
        Role.PATCH_INPUT,
        Role.HEAD_INPUT,
    }
    assert {Role.QUERY, Role.KEY, Role.PROBS, Role.VALUE} <= roles


def test_the_softmax_side_of_a_product_is_the_probs_side():
    graph = capture(enliven(OneAttention("probs_on_the_right")), images(2))

    by_role = {site.role: site for site in enumerate_sites(graph).values()}

    assert by_role[Role.PROBS].index == 1
    assert by_role[Role.PROBS].shape == (None, 4, 16, 16)
    assert by_role[Role.VALUE].shape == (None, 4, 4, 16)


def test_a_product_without_softmax_is_no_attention():
    graph = capture(enliven(OneAttention("linear_attention")), images(2))

    sites = enumerate_sites(graph)

    products = {name: site.role for name, site in sites.items() if site.operation == "matmul"}
    assert list(products.values()) == [Role.PRODUCT] * 4
    assert list(products) == [":left", ":right", ":left.1", ":right.1"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("causal", "is_causal=True"),
        ("grouped", "enable_gqa=True"),
        ("dropped", "dropout_p=0.1"),
    ],
)
def test_attention_that_cannot_be_lowered_is_refused(kind, reason):
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        capture(enliven(OneAttention(kind)), images(2))

    assert str(caught.value).startswith("OneAttention: scaled_dot_product_attention")
    assert "\n" not in str(caught.value)


# What cannot be captured


def test_two_inputs_are_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(UnsupportedModelError, match=r"two: torch\.export cannot trace it"):
        capture(Two(), images(2), model_id="two")


def test_a_branch_on_values_is_refused_with_the_line_and_the_cure():
    class Branching(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(UnsupportedModelError, match=r"Branching: .*torch\.where") as caught:
        capture(Branching(), images(2))

    assert "test_capture.py" in str(caught.value)


def test_a_model_that_fixes_the_batch_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 3, -1)

    with pytest.raises(UnsupportedModelError, match="Fixed"):
        capture(Fixed(), images(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value):
    model = TinyViT()
    with torch.no_grad():
        model.blocks[1].fc1.weight[0, 0] = value

    with pytest.raises(InputError, match=r"damaged: 1 tensors .*: blocks\.1\.fc1\.weight;"):
        capture(model, images(2), model_id="damaged")


def test_outputs_that_overflow_are_refused():
    model = tiny_vit()
    with torch.no_grad():
        model.head.weight.fill_(3e38)

    with pytest.raises(UnsupportedModelError, match="TinyViT: the output is not finite"):
        capture(model, images(2))


class Caching(nn.Module):
    """Keeps the table of biases it has picked, as some libraries do in evaluation."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))
        self.cache = {}

    def forward(self, x):
        if "table" not in self.cache:
            self.cache["table"] = self.table[torch.arange(3).flip(0)][:, None, None]
        return (x * self.cache["table"]).mean((2, 3))


@torch.no_grad()
def test_a_model_that_caches_tensors_is_captured_and_still_runs():
    model = Caching().eval()
    expected = images(3) * model.table[:3].flip(0)[:, None, None]

    graph = capture(model, images(2))

    for found in (graph.logits(images(3)), model(images(3))):
        torch.testing.assert_close(found, expected.mean((2, 3)))
