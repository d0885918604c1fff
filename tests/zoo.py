"""Small models of every library and family, with weights that all matter."""

from collections.abc import Callable
from functools import cache

import timm
import torch
from tiny import enliven, images
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vitcompress.graph import CapturedGraph, capture


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=32, num_classes=10, embed_dim=48
    )


def timm_deit_distilled() -> nn.Module:
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", depth=2, img_size=32, num_classes=10, embed_dim=48
    )


def timm_swin(img_size: int = 56, always_partition: bool = False) -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=img_size,
        window_size=7,
        patch_size=4,
        embed_dim=24,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=10,
        always_partition=always_partition,
    )


def timm_swin_padded() -> nn.Module:
    # 12 x 12 tokens in windows of 7 x 7: zeros are padded between norm1 and qkv.
    return timm_swin(img_size=48, always_partition=True)


def torchvision_vit() -> nn.Module:
    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


def torchvision_swin() -> nn.Module:
    return SwinTransformer([4, 4], 24, [2, 1], [2, 4], [7, 7], num_classes=10)


def hf_vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def hf_swin() -> nn.Module:
    config = SwinConfig(
        image_size=56,
        patch_size=4,
        embed_dim=24,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=7,
        num_labels=10,
    )
    return SwinForImageClassification(config)


def mobilevit() -> nn.Module:
    return timm.create_model("mobilevit_xxs", num_classes=10)


#: Name -> constructor and image size.
ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm_vit": (timm_vit, 32),
    "timm_deit_distilled": (timm_deit_distilled, 32),
    "timm_swin": (timm_swin, 56),
    "timm_swin_padded": (timm_swin_padded, 48),
    "torchvision_vit": (torchvision_vit, 32),
    "torchvision_swin": (torchvision_swin, 56),
    "hf_vit": (hf_vit, 32),
    "hf_swin": (hf_swin, 56),
    "mobilevit": (mobilevit, 64),
}
#: Captured in more than a few seconds.
SLOW = frozenset({"mobilevit"})


@cache
def zoo_model(name: str) -> nn.Module:
    """Return the model, in evaluation mode. Not to be changed."""
    torch.manual_seed(0)
    return enliven(ZOO[name][0]())


@cache
def zoo_graph(name: str) -> CapturedGraph:
    """Return the captured model. Not to be changed: clone it."""
    return capture(zoo_model(name), images(2, ZOO[name][1]), model_id=name)


def zoo_images(name: str, count: int) -> Tensor:
    return images(count, ZOO[name][1], seed=5)
