"""The first images of a source."""

import pytest
import torch
from tiny import images, make_source

from vitcompress.calibration import FirstImages


@pytest.mark.parametrize(
    ("count", "batches"), [(4, [4]), (6, [4, 2]), (1, [1]), (99, [4, 4, 2])]
)
def test_as_many_images_as_asked_come_in_the_order_of_the_source(count, batches):
    x = images(10)
    source = FirstImages(make_source(x, torch.arange(10)), count)

    for _ in range(2):  # again, as every source
        found = list(source)
        assert [len(batch.images) for batch in found] == batches
        assert torch.equal(torch.cat([batch.images for batch in found]), x[:count])
        assert torch.cat([b.labels for b in found]).tolist() == list(range(min(count, 10)))
        assert sum(len(batch.ids) for batch in found) == len(source) == min(count, 10)


def test_its_digest_is_its_own():
    source = make_source(images(8))

    digests = {FirstImages(source, count).digest() for count in (2, 3)}

    assert len(digests | {source.digest()}) == 3
    assert FirstImages(source, 3).batch_size == 3
    assert FirstImages(source, 7).batch_size == 4
