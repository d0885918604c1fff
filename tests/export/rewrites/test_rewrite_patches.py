"""Patch embeddings as linears: which convolutions, and with which codes and scales."""

import pytest
import torch
from drawn import Drawing, extents
from frozen import assert_same_function, bytes_of, frozen_network, weighted
from small import assert_shapes_are_recorded, called, noise
from tiny import ranged

from vitcompress.export.rewrites.patches import linear_patches
from vitcompress.quantizers import PerChannel, PerGroup, PerTensor

aten = torch.ops.aten

ROWS, KERNEL = 5, 4
BY_ROWS = PerChannel(0)


def patched(before):
    """Return a copy with linears for patches, and how many there are."""
    after = before.clone()
    count = linear_patches(after)
    after.recompile()
    assert_same_function(before, after)
    assert_shapes_are_recorded(after)
    return after, count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("timm_vit", 1),
        ("timm_pvt", 2),  # the stem overlaps; both reductions of keys do not
        ("timm_convnext", 4),  # the stem and three reductions
    ],
)
def test_networks_have_as_many_separate_patches(name, count):
    before = frozen_network(name)

    after, found = patched(before)

    assert found == count
    convolutions = len(called(before, "conv2d")), len(called(after, "conv2d"))
    assert convolutions[0] - convolutions[1] == count
    assert {site: len(nodes) for site, nodes in weighted(before).items()} == {
        site: len(nodes) for site, nodes in weighted(after).items()
    }


# Drawn convolutions


@pytest.fixture
def draw():
    return Drawing(3, 12, 8)


def kernel(draw, *shape, granularity=BY_ROWS, is_stored=True):
    """Return a weight ``[O, I, KH, KW]`` of eight bits."""
    codes = noise(*shape, seed=3).mul(40).round().clamp(-127, 127)
    quantizer = ranged(
        torch.tensor(-1.0), torch.tensor(1.0), bits=8, symmetric=True, granularity=granularity
    )
    count = granularity.parameter_shape(shape)
    scale = torch.linspace(0.005, 0.02, max(torch.Size(count).numel(), 1)).reshape(count)
    quantizer.load(scale=scale, zero_point=torch.zeros(count))
    quantizer.frozen = is_stored
    stored = draw.tensor(codes if is_stored else codes / 64)
    return draw.quantized(stored, quantizer, f"weight_{len(draw._tensors)}")


def convolution(draw, *arguments, image=None, weight=None, bias=True):
    image = bytes_of(draw, draw.images, "image") if image is None else image
    weight = kernel(draw, ROWS, 3, KERNEL, KERNEL) if weight is None else weight
    stored = draw.stored(ROWS) if bias else None
    arguments = arguments or ([KERNEL, KERNEL],)
    return draw(aten.conv2d.default, image, weight, stored, *arguments)


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0)], ids=["per_tensor", "per_channel"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_patches_times_a_matrix_are_the_convolution(draw, granularity, bias):
    weight = kernel(draw, ROWS, 3, KERNEL, KERNEL, granularity=granularity)
    before = draw.captured(convolution(draw, weight=weight, bias=bias))

    after, count = patched(before)

    assert count == 1
    (linear,) = called(after, "linear")
    assert extents(linear) == ("B", 6, ROWS)
    assert len(linear.args) == 3
    assert (linear.args[2] is None) != bias
    # The codes are the kernel's, a row for each output channel; the input's are the image's.
    stored = linear.args[1].args[0]
    own = before.parameter(str(stored.target))
    assert torch.equal(after.parameter(str(stored.target)), own.flatten(1))
    assert [q.site for q in after.quantizers().values() if not q.frozen] == ["image"]


def test_kernels_that_are_no_squares_are_cut_along_both_axes(draw):
    weight = kernel(draw, ROWS, 3, 6, 2)
    before = draw.captured(convolution(draw, [6, 2], weight=weight))

    after, count = patched(before)

    assert count == 1
    assert extents(called(after, "linear")[0]) == ("B", 8, ROWS)


def test_the_graph_that_was_copied_keeps_its_kernel(draw):
    before = draw.captured(convolution(draw))
    (target,) = [name for name, value in before.tensors().items() if value.dim() == 4]

    patched(before)

    assert before.parameter(target).shape == (ROWS, 3, KERNEL, KERNEL)


def convolutions_that_stay():
    def overlapping(draw):
        return convolution(draw, [2, 2])

    def with_gaps(draw):
        return convolution(draw, [6, 6])

    def padded(draw):
        return convolution(draw, [KERNEL, KERNEL], [2, 2])

    def dilated(draw):
        return convolution(draw, [KERNEL, KERNEL], [0, 0], [2, 2])

    def grouped(draw):
        weight = kernel(draw, 6, 1, KERNEL, KERNEL)
        arguments = ([KERNEL, KERNEL], [0, 0], [1, 1], 3)
        return convolution(draw, *arguments, weight=weight, bias=False)

    def pointwise(draw):
        return convolution(draw, [1, 1], weight=kernel(draw, ROWS, 3, 1, 1))

    def of_a_part_of_the_image(draw):
        return convolution(draw, [5, 5], weight=kernel(draw, ROWS, 3, 5, 5))

    def of_a_float_image(draw):
        return convolution(draw, image=draw.images)

    def of_float_weights(draw):
        return convolution(draw, weight=draw.stored(ROWS, 3, KERNEL, KERNEL))

    def of_an_image_with_scales_by_channel(draw):
        image = bytes_of(draw, draw.images, "image", granularity=PerChannel(1))
        draw._tensors[image.target].load(
            scale=torch.tensor([0.02, 0.03, 0.04]), zero_point=torch.full((3,), 128.0)
        )
        return convolution(draw, image=image)

    def of_weights_with_scales_by_group(draw):
        groups = kernel(draw, ROWS, 3, KERNEL, KERNEL, granularity=PerGroup(16))
        return convolution(draw, weight=groups)

    def of_weights_with_scales_by_column(draw):
        columns = kernel(draw, ROWS, 3, KERNEL, KERNEL, granularity=PerChannel(1))
        return convolution(draw, weight=columns)

    def of_weights_that_are_no_codes_yet(draw):
        return convolution(draw, weight=kernel(draw, ROWS, 3, KERNEL, KERNEL, is_stored=False))

    return list(locals().values())


@pytest.mark.parametrize("made", convolutions_that_stay(), ids=lambda made: made.__name__)
def test_another_convolution_stays(draw, made):
    before = draw.captured(made(draw))
    after = before.clone()

    assert linear_patches(after) == 0
    assert len(called(after, "conv2d")) == 1


def test_a_kernel_of_two_convolutions_stays_for_both(draw):
    """One module that is called twice: each would need the kernel in its own shape."""
    weight = kernel(draw, ROWS, 3, KERNEL, KERNEL)
    first = convolution(draw, weight=weight)
    other = bytes_of(draw, draw(aten.sigmoid.default, draw.images), "other")
    second = convolution(draw, [2, 2], image=other, weight=weight)

    after, count = patched(draw.captured(first, second))

    assert (count, len(called(after, "conv2d"))) == (0, 2)


def test_two_patch_sizes_of_one_image_have_quantizers_of_their_own(draw):
    """They hold the same codes in different shapes."""
    image = bytes_of(draw, draw.images, "image")
    first = convolution(draw, image=image)
    second = convolution(draw, [2, 2], image=image, weight=kernel(draw, ROWS, 3, 2, 2))

    after, count = patched(draw.captured(first, second))

    assert (count, len(called(after, "conv2d"))) == (2, 0)
    quantizers = [q for q in after.quantizers().values() if not q.frozen]
    assert [q.site for q in quantizers] == ["image:patches", "image"]
    assert all(torch.equal(q.scale, quantizers[0].scale) for q in quantizers)


def test_patches_beside_a_convolution_leave_it_its_quantizer(draw):
    image = bytes_of(draw, draw.images, "image")
    first = convolution(draw, image=image)
    second = convolution(draw, [1, 1], image=image, weight=kernel(draw, ROWS, 3, 3, 3))

    after, count = patched(draw.captured(first, second))

    assert (count, len(called(after, "conv2d"))) == (1, 1)
    sites = sorted(q.site for q in after.quantizers().values() if not q.frozen)
    assert sites == ["image", "image:patches"]
