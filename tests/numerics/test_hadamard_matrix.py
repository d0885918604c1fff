import pytest
import torch

from vitcompress.numerics.hadamard import hadamard_matrix, random_rotation

SIZES = [1, 2, 4, 8, 12, 20, 24, 32, 48, 64, 96, 192, 768]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_signs_and_orthogonal(size):
    matrix = hadamard_matrix(size)

    assert matrix.shape == (size, size)
    assert bool((matrix.abs() == 1.0).all())
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 5, 6, 7, 10, 18, 36, 100])
def test_other_sizes_have_none(size):
    assert hadamard_matrix(size) is None
    assert random_rotation(size, torch.Generator()) is None


def test_a_rotation_is_orthogonal_seeded_and_spreads_one_channel_over_all():
    rotation = random_rotation(192, torch.Generator().manual_seed(3))

    again = random_rotation(192, torch.Generator().manual_seed(3))
    eye = torch.eye(192, dtype=torch.float64)
    assert torch.equal(rotation, again)
    assert (rotation.T @ rotation - eye).abs().max() < 1e-12
    assert (rotation[7].abs() * 192**0.5 - 1.0).abs().max() < 1e-12
    assert not torch.equal(rotation, random_rotation(192, torch.Generator().manual_seed(4)))
