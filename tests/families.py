"""One small network of each further family, for the tables of sites alone."""

from collections.abc import Callable
from functools import cache, partial

import timm
import torch
from tiny import enliven, images
from torch import nn
from torchvision.models.maxvit import MaxVit

from vitcompress.graph import CapturedGraph, capture


def named(name: str, **settings: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=10, **settings)


def timm_volo() -> nn.Module:
    return timm.models.volo.VOLO(
        layers=(1, 1),
        img_size=32,
        embed_dims=(16, 32),
        num_heads=(2, 2),
        downsamples=(True, False),
        outlook_attention=(True, False),
        num_classes=10,
    )


def torchvision_maxvit() -> nn.Module:
    return MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )


#: Name -> constructor and image size.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm_beit": (
        named("beit_base_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=2),
        32,
    ),
    "timm_cait": (
        named("cait_xxs24_224", img_size=32, embed_dim=32, num_heads=2, depth=1),
        32,
    ),
    "timm_swinv2": (
        named(
            "swinv2_tiny_window8_256",
            img_size=32,
            window_size=4,
            embed_dim=16,
            depths=(2, 1),
            num_heads=(2, 4),
        ),
        32,
    ),
    "timm_levit": (
        named(
            "levit_128s",
            img_size=64,
            embed_dim=(32, 48),
            key_dim=8,
            num_heads=(2, 3),
            depth=(1, 1),
        ),
        64,
    ),
    "timm_volo": (timm_volo, 32),
    "timm_xcit": (
        named("xcit_nano_12_p16_224", img_size=32, embed_dim=32, num_heads=2, depth=1),
        32,
    ),
    "timm_pvt": (
        named("pvt_v2_b0", embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2)),
        32,
    ),
    "timm_convnext": (
        named("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        32,
    ),
    "timm_fastvit": (
        named("fastvit_t8", layers=(1, 1), embed_dims=(16, 32)),
        64,
    ),
    "torchvision_maxvit": (torchvision_maxvit, 32),
}


@cache
def family_model(name: str) -> nn.Module:
    """Return the network, in evaluation mode. Not to be changed."""
    torch.manual_seed(0)
    return enliven(FAMILIES[name][0]())


@cache
def family_graph(name: str) -> CapturedGraph:
    """Return the captured network. Not to be changed: clone it."""
    return capture(family_model(name), images(2, FAMILIES[name][1]), model_id=name)
