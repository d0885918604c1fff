"""The toys by name, each built, captured and quantized once."""

from functools import cache, partial

import attention_toys as attention
import layer_toys as layers
import torch
from scaffold import SIZE, Toy, TwoHeaded
from tiny import enliven, images, make_source, run_steps
from torch import Tensor, nn

import vitcompress
from vitcompress.api import CompressedModel
from vitcompress.engine import PassRecord
from vitcompress.graph import CapturedGraph, QuantizationSite, Role, capture, enumerate_sites

on_map = partial(Toy, on_map=True)

TOYS = {
    "separate_projections": partial(Toy, attention.SeparateProjections),
    "norms_behind": partial(Toy, attention.PostNorm, attention.SandwichNorm),
    "layer_scale": partial(Toy, layers.LayerScale, layers.KeptLayerScale),
    "map_layer_scale": partial(on_map, layers.MapLayerScale, layers.PoolMixer),
    "talking_heads": partial(Toy, attention.TalkingHeads, attention.TalkingMaps),
    "class_attention": partial(Toy, attention.ClassAttention, class_token=True),
    "cosine_attention": partial(Toy, attention.CosineAttention),
    "shifted_windows": partial(Toy, attention.ShiftedWindows),
    "padded_windows": partial(Toy, attention.PaddedWindows),
    "blocked_attention": partial(Toy, attention.BlockedAttention),
    "outlook_attention": partial(Toy, attention.OutlookAttention),
    "norm_behind_linear": partial(Toy, layers.NormBehindLinear),
    "norm_before_layers": partial(on_map, layers.NormBeforeLayers),
    "kept_norms": partial(on_map, layers.NormBeforePadding, layers.NormReadTwice),
    "separable_attention": partial(on_map, layers.SeparableAttention),
    "additive_attention": partial(Toy, attention.AdditiveAttention),
    "relu_linear_attention": partial(Toy, attention.ReluLinearAttention),
    "gated_mlp": partial(Toy, layers.GeGlu, layers.SwiGlu),
    "composed_activations": partial(Toy, layers.QuickGelu, layers.StarRelu),
    "standardised_conv": partial(on_map, layers.StandardisedConv),
    "stored_product": partial(TwoHeaded, layers.StoredProduct),
    "library_attention": partial(Toy, attention.LibraryAttention),
    "computed_positions": partial(Toy, attention.PositionMlp, attention.FourierPositions),
    "learned_query": partial(Toy, attention.LearnedQuery),
    "einsum": partial(Toy, attention.EinsumAttention, attention.EinsumPositions),
    "gated_conv": partial(Toy, layers.GatedConv),
}

SOURCE = make_source(images(8, SIZE))


@cache
def toy(name: str) -> nn.Module:
    """Return the toy, in evaluation mode. Not to be changed."""
    torch.manual_seed(0)
    return enliven(TOYS[name]())


@cache
def toy_graph(name: str) -> CapturedGraph:
    """Return the captured toy. Not to be changed: clone it."""
    return capture(toy(name), toy_images(2), model_id=name)


@cache
def toy_model(name: str, recipe: str = "deploy") -> CompressedModel:
    """Return the toy at eight bits. Not to be changed."""
    return vitcompress.quantize(toy_graph(name), scheme="W8A8", recipe=recipe, source=SOURCE)


#: Per-channel quantizers behind each norm, folded into it.
FOLDING = (
    {
        "pass": "attach",
        "rules": [{"roles": ["norm_output", "weight"], "granularity": "per_channel"}],
    },
    {"pass": "calibrate", "method": "minmax"},
    {"pass": "repq_vit"},
)


@cache
def folded(name: str) -> tuple[CapturedGraph, PassRecord]:
    """Return the toy with quantizers folded into its norms, and what the fold reports."""
    graph, records = run_steps(FOLDING, toy_graph(name), SOURCE, scheme="W8A8")
    return graph, records[-1]


def toy_images(count: int) -> Tensor:
    return images(count, SIZE, seed=5)


def toy_sites(name: str) -> dict[str, QuantizationSite]:
    return enumerate_sites(toy_graph(name))


def roles(name: str) -> dict[str, Role]:
    """Return the role of each site."""
    return {site.name: site.role for site in toy_sites(name).values()}


def operations(name: str) -> list[str]:
    """Return the operators that the captured toy calls: ``linear``, ``batch_norm``, ..."""
    return [
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in toy_graph(name).nodes_of_kind("call_function")
    ]
