"""Hadamard matrices, and the rotations made of them."""

import torch
from torch import Tensor

__all__ = ["hadamard_matrix", "random_rotation"]


def hadamard_matrix(size: int) -> Tensor | None:
    """Return a matrix of ones and minus ones with orthogonal rows, ``[size, size]`` float64.

    Sylvester's doubling of 1 or of one of Paley's (q + 1, q a prime that leaves 3 mod 4): 12,
    20, 24, ... and their multiples by powers of two. ``None`` for other sizes.
    """
    doublings = 0
    while size % 2 == 0 or size == 1:
        core = _paley(size)
        if core is not None:
            for _ in range(doublings):
                core = torch.cat([torch.cat([core, core]), torch.cat([core, -core])], dim=1)
            return core
        size, doublings = size // 2, doublings + 1
    return None


def _paley(size: int) -> Tensor | None:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = size - 1
    if size % 4 or any(q % divisor == 0 for divisor in range(2, int(q**0.5) + 1)):
        return None
    squares = {number * number % q for number in range(1, q)}
    character = [0, *(1 if number in squares else -1 for number in range(1, q))]
    skew = torch.zeros(size, size, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    for row in range(q):
        for column in range(q):
            skew[row + 1, column + 1] = character[(row - column) % q]
    return skew + torch.eye(size, dtype=torch.float64)


def random_rotation(size: int, generator: torch.Generator) -> Tensor | None:
    """Return ``D H / sqrt(size)``, D random signs: orthogonal, ``[size, size]`` float64.

    ``None`` where there is no Hadamard matrix of this size.
    """
    matrix = hadamard_matrix(size)
    if matrix is None:
        return None
    signs = 2.0 * torch.randint(2, (size, 1), generator=generator).double() - 1.0
    rotation: Tensor = signs * matrix / size**0.5
    return rotation
