import pytest
import torch

from vitcompress.calibration import ChannelAbsMax, Histogram, MinMax, Samples, SecondMoment

CUTS = (0, 1, 5, 11, 12)


@pytest.fixture
def data():
    # Heavy tails, both signs, exact zeros: 12 images of 3 tokens and 4 channels.
    values = torch.randn(12, 3, 4) ** 3
    values[2] = 0.0
    return values


def observed(observer, data, batch=4):
    for part in data.split(batch):
        observer.update(part)
    return observer


def results(observer):
    found = observer.result()
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", [MinMax, ChannelAbsMax, Histogram])
def test_split_anywhere_and_merged_equals_the_whole(kind, cut, data):
    whole = observed(kind(), data)

    left, right = kind(), kind()
    for half, part in ((left, data[:cut]), (right, data[cut:])):
        if len(part):
            observed(half, part, batch=2)
    left.merge(right)

    for found, expected in zip(results(left), results(whole), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("cut", CUTS)
def test_split_second_moments_merge_to_rounding(cut, data):
    whole = observed(SecondMoment(), data)

    left, right = SecondMoment(), SecondMoment()
    for half, part in ((left, data[:cut]), (right, data[cut:])):
        if len(part):
            observed(half, part)
    left.merge(right)

    torch.testing.assert_close(left.result()[0], whole.result()[0])
    assert left.result()[1] == whole.result()[1] == 36


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("limit", [1, 5, 12, 100])
def test_split_samples_merge_to_the_same_images(limit, cut, data):
    whole = observed(Samples(limit), data)

    left, right = Samples(limit), Samples(limit, first=cut)
    left.update(data[:cut])
    right.update(data[cut:])
    left.merge(right)

    assert torch.equal(left.result(), whole.result())


@pytest.mark.parametrize("batch", [1, 3, 4, 12])
def test_samples_do_not_depend_on_batching(batch, data):
    assert torch.equal(
        observed(Samples(5), data, batch).result(), observed(Samples(5), data, 12).result()
    )


def test_samples_keep_order_limit_and_seed(data):
    first, second = (observed(Samples(5, seed=seed), data).result() for seed in (0, 20000))

    assert first.shape == second.shape == (5, 3, 4)
    assert not torch.equal(first, second)
    assert torch.equal(observed(Samples(100), data).result(), data)


def test_samples_follow_the_axis_of_the_images(data):
    tokens_first = data.transpose(0, 1)

    sampled = Samples(5, axis=1)
    for part in tokens_first.split(4, dim=1):
        sampled.update(part)

    assert torch.equal(sampled.result(), observed(Samples(5), data).result().transpose(0, 1))


def test_samples_are_copies(data):
    sampled = observed(Samples(12), data)
    expected = data.clone()

    data.zero_()

    assert torch.equal(sampled.result(), expected)


def test_extremes_and_moments_by_hand():
    x = torch.tensor([[[1.0, -4.0], [3.0, 2.0]]])

    low, high = observed(MinMax(), x).result()
    total, count = observed(SecondMoment(), x).result()

    assert (low.item(), high.item()) == (-4.0, 3.0)
    assert observed(ChannelAbsMax(), x).result().tolist() == [3.0, 4.0]
    assert total.tolist() == [[10.0, 2.0], [2.0, 20.0]]
    assert count == 2


def test_histogram_counts_everything_in_order_with_exact_extrema(data):
    values, counts = observed(Histogram(), data).result()

    assert counts.sum() == data.numel()
    assert torch.equal(values, values.sort().values)
    assert (values[0], values[-1]) == (data.min(), data.max())


def test_histogram_bins_are_narrow_relative_to_their_values():
    x = torch.logspace(-6.0, 6.0, 3001)
    x = torch.cat([-x, x])

    values, counts = observed(Histogram(), x).result()

    nearest = torch.repeat_interleave(values, counts)
    error = (nearest - x.sort().values).abs() / x.sort().values.abs()
    # Eight bits of mantissa: a bin is 2^-8 of its value wide, its centre half of that away.
    assert error.max() <= 2**-8


def test_histogram_keeps_zeros_of_either_sign():
    values, counts = observed(Histogram(), torch.tensor([[0.0, -0.0, 1.0, -1.0]])).result()

    assert counts.sum() == 4
    assert (values.abs() < 1e-30).sum() >= 1
    assert (values[0], values[-1]) == (-1.0, 1.0)
