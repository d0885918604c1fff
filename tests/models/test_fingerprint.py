import hashlib
import re

import pytest
import torch

from vitcompress.models.fingerprint import (
    CLASSIFIER_MODULES,
    INDEX_PATH,
    fingerprint,
    lookup,
    packaged_index,
)


def shapes_of(name, **settings):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state = timm.create_model(name, **settings).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def test_fingerprint_is_the_hash_written_in_its_docstring():
    shapes = {"norm.weight": (4,), "head.weight": (10, 4), "norm.num_batches_tracked": ()}
    lines = "head.weight:num_classes,4\nnorm.num_batches_tracked:\nnorm.weight:4"

    expected = hashlib.sha256(lines.encode()).hexdigest()[:16]

    assert fingerprint(shapes) == expected


def test_architectures_with_equal_tensors_are_all_listed():
    found = lookup(shapes_of("vit_tiny_patch16_224"))

    assert {"timm/vit_tiny_patch16_224", "timm/deit_tiny_patch16_224"} <= set(found)
    assert found == sorted(found)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",  # two heads
        "levit_128s",  # normalised heads
        "swin_tiny_patch4_window7_224",
        "mobilevit_s",
        "resnet18",
    ],
)
def test_other_class_counts_are_still_identified(name):
    assert f"timm/{name}" in lookup(shapes_of(name, num_classes=10))


def test_a_classifier_added_to_a_feature_extractor_is_identified():
    name = "vit_small_patch14_dinov2"
    registered, extended = shapes_of(name), shapes_of(name, num_classes=10)

    assert "head.weight" not in registered
    assert f"timm/{name}" in lookup(registered)
    assert f"timm/{name}" in lookup(extended)


def test_torchvision_classifiers_are_identified():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        state = models.get_model("vit_b_16", weights=None, num_classes=10).state_dict()

    assert "torchvision/vit_b_16" in lookup({key: t.shape for key, t in state.items()})


def test_a_renamed_key_is_not_identified():
    shapes = shapes_of("vit_tiny_patch16_224")
    shapes["blocks.0.attn.query_key_value.weight"] = shapes.pop("blocks.0.attn.qkv.weight")

    assert lookup(shapes) == []


@pytest.mark.parametrize("change", [{"norm.bias": None}, {"norm.bias": (96,)}, {"more": (1,)}])
def test_a_missing_resized_or_extra_tensor_is_not_identified(change):
    shapes = {**shapes_of("vit_tiny_patch16_224"), **change}

    assert lookup({key: shape for key, shape in shapes.items() if shape is not None}) == []


def test_order_of_keys_and_kind_of_sequence_are_irrelevant():
    shapes = shapes_of("vit_tiny_patch16_224")
    shuffled = {key: torch.Size(shapes[key]) for key in reversed(shapes)}

    assert list(shuffled) != list(shapes)
    assert fingerprint(shuffled) == fingerprint(shapes)


def test_only_the_leading_dimension_of_a_classifier_is_masked():
    def linear(module, outputs, inputs=4):
        return fingerprint(
            {f"{module}.weight": (outputs, inputs), f"{module}.bias": (outputs,)}
        )

    for module in CLASSIFIER_MODULES:
        assert linear(module, 10) == linear(module, 1000)
        assert linear(module, 10) != linear(module, 10, inputs=5)
    assert linear("blocks.0.mlp.fc1", 10) != linear("blocks.0.mlp.fc1", 1000)


def test_convolution_is_a_classifier_only_if_one_pixel_wide():
    assert fingerprint({"fc.weight": (10, 4, 1, 1)}) == fingerprint(
        {"fc.weight": (7, 4, 1, 1)}
    )
    assert fingerprint({"fc.weight": (10, 4, 3, 3)}) != fingerprint(
        {"fc.weight": (7, 4, 3, 3)}
    )


def test_index_is_small_sorted_and_names_each_architecture_once_per_entry():
    index = packaged_index()

    assert len(index) > 1000
    assert INDEX_PATH.stat().st_size < 150_000
    assert list(index) == sorted(index)
    for key, names in index.items():
        assert re.fullmatch("[0-9a-f]{16}", key)
        assert names == sorted(set(names))
        assert all(name.startswith(("timm/", "torchvision/")) for name in names)
