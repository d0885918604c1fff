"""Closed-form repair of quantized weights: GPTQ, and the two ridge steps of ERQ.

Sources: Frantar et al., "GPTQ", ICLR 2023, arXiv:2210.17323; Zhong et al., "ERQ: Error
Reduction for Post-Training Quantization of Vision Transformers", ICML 2024, arXiv:2407.06794.
All of it needs the data only through second moments of a layer's input, one row for each
token. Everything is in double precision: moments of a few hundred correlated channels are
close to singular.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcompress.numerics.affine import dequantize_affine, quantize_affine

__all__ = [
    "Grid",
    "activation_correction",
    "damped",
    "gptq",
    "halving_rounds",
    "refined_rounding",
    "weight_correction",
]

#: Columns between two updates of all that follow, as in the GPTQ paper.
_BLOCK = 64


@dataclass(frozen=True)
class Grid:
    """The values that each weight of a matrix can take.

    Attributes:
        scale: ``[O, I]`` double.
        zero_point: ``[O, I]`` double, whole numbers.
        qmin: Least code.
        qmax: Largest code.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def nearest(self, values: Tensor, columns: slice | Tensor) -> Tensor:
        """Return the nearest values on the grid.

        Args:
            values: ``[O, k]`` double.
            columns: Which columns of the matrix these are.
        """
        scale, zero_point = self.scale[:, columns], self.zero_point[:, columns]
        codes = quantize_affine(values, scale, zero_point, qmin=self.qmin, qmax=self.qmax)
        return dequantize_affine(codes, scale, zero_point)

    def other(self, values: Tensor, rounded: Tensor, columns: slice | Tensor) -> Tensor:
        """Return the neighbour on the other side of each value; ``rounded`` at the ends."""
        step = torch.sign(values - rounded) * self.scale[:, columns]
        return self.nearest(rounded + step, columns)


def damped(moment: Tensor, damping: float, columns: int) -> Tensor:
    """Return the second moment with ``damping`` of its mean diagonal added to the diagonal.

    Channels that never fire get the mean diagonal: their weights are then rounded by
    themselves.

    Args:
        moment: ``[I, I]`` double.
        damping: Fraction, at least 0.
        columns: The mean is over this many leading channels; a column of ones is not one.
    """
    diagonal = torch.diagonal(moment)
    mean = diagonal[:columns].mean().clamp(min=torch.finfo(torch.float64).tiny)
    dead = diagonal == 0
    return moment + torch.diag(damping * mean + torch.where(dead, mean, 0.0))


# GPTQ


def gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, *, columns: int, descending: bool
) -> Tensor:
    """Return weights on the grid whose output error is small, column by column.

    Args:
        weight: ``[O, I]`` double; columns from ``columns`` on (a bias) stay off the grid and
            take what the others leave.
        hessian: Damped second moment of the input, ``[I, I]`` double, positive definite.
        grid: The values weights can take.
        columns: How many leading columns are put on the grid.
        descending: Take columns by descending diagonal of the Hessian instead of in order.

    Returns:
        ``[O, I]`` double.
    """
    order = torch.arange(len(hessian))
    if descending:
        order[:columns] = torch.argsort(torch.diagonal(hessian)[:columns], descending=True)
    factor = torch.linalg.cholesky(hessian[order][:, order])
    # Row j of the upper factor of H^-1 says how the columns behind j make good for j.
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    left = weight[:, order].clone()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(len(weight), stop - start, dtype=weight.dtype)
        for column in range(start, stop):
            value = left[:, column]
            rounded = grid.nearest(value[:, None], order[column : column + 1])[:, 0]
            error = (value - rounded) / upper[column, column]
            left[:, column] = rounded
            left[:, column + 1 : stop] -= torch.outer(error, upper[column, column + 1 : stop])
            errors[:, column - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(left)
    result[:, order] = left
    return result


# ERQ, "Activation quantization error reduction" (Aqer)


def activation_correction(
    weight: Tensor, moment: Tensor, lost: Tensor, strength: float
) -> Tensor:
    """Return what to add to a weight so that it undoes the quantization of its input.

    Ridge regression of the output error ``(X - Q) W^T`` on the quantized input Q.

    Args:
        weight: ``[O, I]`` double, the bias as last column where Q and X have a column of ones.
        moment: Q^T Q over rows, ``[I, I]`` double, divided by their number.
        lost: Q^T (X - Q), likewise.
        strength: Of the regularisation, in units of the mean square of a channel; at least 0.

    Returns:
        ``[O, I]``.
    """
    return _solved(moment, strength, lost @ weight.T).T


# ERQ, "Weight quantization error reduction" (Wqer)


def weight_correction(
    error: Tensor, moment: Tensor, done: Tensor, rest: Tensor, strength: float
) -> Tensor:
    """Return what to add to the columns ``rest`` against the rounding error of ``done``.

    Args:
        error: Rounded minus exact values, ``[O, len(done)]`` double.
        moment: Q^T Q over rows, ``[I, I]`` double, divided by their number.
        done: Columns just rounded.
        rest: Columns that are still free.
        strength: As in :func:`activation_correction`.

    Returns:
        ``[O, len(rest)]``.
    """
    free = moment[rest][:, rest]
    known = moment[rest][:, done] @ error.T
    return -_solved(free, strength, known).T


def halving_rounds(columns: int) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of each round: the first half of what is left, down to one."""
    rounds, start = [], 0
    while start < columns:
        stop = start + max(1, (columns - start) // 2)
        rounds.append((start, stop))
        start = stop
    return rounds


def refined_rounding(
    values: Tensor, rounded: Tensor, other: Tensor, moment: Tensor, steps: int
) -> Tensor:
    """Return a rounding that moves single values to their other neighbour (Section 4.3).

    In each step each row moves the value that promises most among those whose error points
    along the gradient, and stops where the output error ``d^T K d`` no longer falls.

    Args:
        values: ``[O, k]`` double.
        rounded: Nearest values on the grid.
        other: The neighbour on the other side of each value; equal to ``rounded`` where there
            is none.
        moment: K, second moment of these columns, ``[k, k]`` double.
        steps: Most moves of one row.
    """
    result = rounded.clone()
    rows = torch.arange(len(values))
    columns = torch.diagonal(moment)
    gradient = (rounded - values) @ moment  # half of that of d^T K d
    for _ in range(steps):
        error = result[rows] - values[rows]
        flipped = torch.where(result[rows] == rounded[rows], other[rows], rounded[rows])
        movable = (gradient * error > 0) & (flipped != result[rows])
        column = torch.where(movable, gradient.abs(), -1.0).argmax(dim=1, keepdim=True)
        change = (flipped - result[rows]).gather(1, column)
        gain = change * (2.0 * gradient.gather(1, column) + change * columns[column])
        better = ((gain < 0) & movable.gather(1, column))[:, 0]
        if not bool(better.any()):
            break
        rows, column, change = rows[better], column[better], change[better]
        result[rows[:, None], column] = flipped[better].gather(1, column)
        gradient = gradient[better] + change * moment[column[:, 0]]
    return result


def _solved(moment: Tensor, strength: float, right: Tensor) -> Tensor:
    """Return ``(M + strength * mean(diag M) I)^-1 right``."""
    diagonal = torch.diagonal(moment)
    ridge = torch.full_like(diagonal, strength) * diagonal.mean()
    # A channel that never fires makes the system singular whatever the strength.
    ridge = ridge + torch.where(diagonal == 0, 1.0, 0.0)
    return torch.cholesky_solve(right, torch.linalg.cholesky(moment + torch.diag(ridge)))
