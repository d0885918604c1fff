"""Training-time branches become the one convolution they add up to.

Parallel convolutions, batch norms and shortcuts that read one value and are summed are a
convolution written at length. Recognition looks at operations alone, so it does not matter
which of the papers a block comes from. All of it is exact up to rounding.

Source: Ding et al., CVPR 2021, arXiv:2101.03697, Sec. 3.3; Vasu et al., CVPR 2023,
arXiv:2206.04040; Vasu et al., ICCV 2023, arXiv:2303.14189 (a layer scale on the difference of
branches); Wang et al., CVPR 2024, arXiv:2307.09283 (a norm behind the sum).
Deviation: branches whose common kernel has more taps than they have together stay apart. The
sum of a 1x31 and a 31x1 convolution is a 31x31 one, and fifteen times the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import constant_node
from vitcompress.graph.folding import batch_norm_map, stored_tensor
from vitcompress.graph.kernels import Convolution, fused_convolution, identity
from vitcompress.graph.metadata import ModulePath, TensorInfo, info, module_path, node_argument
from vitcompress.graph.ops import is_op

__all__ = ["merge_branches"]


# Sums of branches


@dataclass(frozen=True)
class Branch:
    """One summand: ``scale * f(x)``, f a convolution without its bias, or the identity.

    Attributes:
        source: x.
        origin: The convolution; the batch norm that reads x; x itself for a plain shortcut.
        convolution: f; ``None`` for the identity.
        scale: ``[O]`` or ``[1]``, float64.
    """

    source: fx.Node
    origin: fx.Node
    convolution: Convolution | None
    scale: Tensor


@dataclass(frozen=True)
class BranchSum:
    """A value as the sum of branches (none for a constant) and ``shift``, as ``scale``."""

    branches: tuple[Branch, ...]
    shift: Tensor

    def affine(self, factor: Tensor, shift: Tensor) -> "BranchSum":
        """Return ``factor * self + shift``, each ``[O]`` or ``[1]``."""
        branches = (replace(branch, scale=branch.scale * factor) for branch in self.branches)
        return BranchSum(tuple(branches), self.shift * factor + shift)


def _number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _single(
    source: fx.Node, origin: fx.Node, convolution: Convolution | None = None
) -> BranchSum:
    return BranchSum((Branch(source, origin, convolution, _number(1.0)),), _number(0.0))


def _branch_sum(captured: CapturedGraph, node: fx.Node, is_root: bool = False) -> BranchSum:
    """Return a value as a sum, taken apart as far down as nothing else reads the parts.

    What is not linear, has a second reader or is spelled otherwise reads itself: to a sum
    above it, it is a shortcut.
    """
    found = None
    if "info" in node.meta and (is_root or len(node.users) == 1):
        if is_op(node, ops.ADD, ops.SUB, ops.MUL):
            found = _arithmetic(captured, node)
        elif is_op(node, ops.GETITEM):
            found = _normed(captured, node)
        elif is_op(node, ops.CONV):
            found = _convolved(captured, node)
    return found or _single(node, node)


def _arithmetic(captured: CapturedGraph, node: fx.Node) -> BranchSum | None:
    if any(alpha != 1 for alpha in (*node.args[2:], *node.kwargs.values())):
        return None
    left, right = (_operand(captured, operand, info(node)) for operand in node.args[:2])
    if left is None or right is None:
        return None
    if not is_op(node, ops.MUL):
        right = right.affine(_number(-1.0 if is_op(node, ops.SUB) else 1.0), _number(0.0))
        return BranchSum(left.branches + right.branches, left.shift + right.shift)
    if left.branches and right.branches:
        return None
    left, right = (left, right) if left.branches else (right, left)
    return left.affine(right.shift, _number(0.0))


def _operand(captured: CapturedGraph, operand: Any, result: TensorInfo) -> BranchSum | None:
    """Return an operand as a sum; ``None`` if it is broadcast otherwise than per channel."""
    if isinstance(operand, (int, float)):
        return BranchSum((), _number(operand))
    if not isinstance(operand, fx.Node) or "info" not in operand.meta:
        return None
    if operand.op != "get_attr":
        return _branch_sum(captured, operand) if info(operand) == result else None
    constant = captured.parameter(str(operand.target))
    shape = (*[1] * (len(result.shape) - constant.dim()), *constant.shape)
    if shape[1:2] not in ((1,), result.shape[1:2]) or shape[1:2] != (constant.numel(),):
        return None
    return BranchSum((), constant.double().reshape(-1))


def _normed(captured: CapturedGraph, node: fx.Node) -> BranchSum | None:
    norm: Any = node.args[0]
    if not is_op(norm, ops.BATCH_NORM) or node.args[1] != 0 or len(norm.users) > 1:
        return None
    channel_map = batch_norm_map(captured, norm)
    if channel_map is None:
        return None
    value = node_argument(norm, 0)
    inner = _branch_sum(captured, value)
    if [branch.source for branch in inner.branches] == [value]:
        inner = _single(value, norm)
    return inner.affine(channel_map.factor, channel_map.shift)


def _convolved(captured: CapturedGraph, node: fx.Node) -> BranchSum | None:
    weight = _stored(captured, node.args[1])
    bias = node.args[2] if len(node.args) > 2 else None
    shift = _number(0.0) if bias is None else _stored(captured, bias)
    if weight is None or shift is None or weight.dim() != len(info(node).shape):
        return None
    kernel = weight.shape[2:]
    defaults: tuple[Any, ...] = (1, 0, 1, 1)
    arguments: tuple[Any, ...] = (*node.args[3:], *defaults[len(node.args[3:]) :])
    stride, padding, dilation, groups = arguments
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if any(extent % 2 == 0 for extent in kernel):
            return None  # one zero more behind than in front: no padding says that
        padding = [extent // 2 for extent in kernel]
    if set(_extents(dilation, len(kernel))) != {1}:
        return None
    padding, stride = _extents(padding, len(kernel)), _extents(stride, len(kernel))
    convolution = Convolution(weight, padding, stride, groups)
    return _single(node_argument(node, 0), node, convolution).affine(_number(1.0), shift)


def _extents(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one extent for each axis; a lone one holds for all."""
    extents = (value,) if isinstance(value, int) else tuple(value)
    return extents * axes if len(extents) == 1 else extents


def _stored(captured: CapturedGraph, argument: Any) -> Tensor | None:
    """Return a stored tensor in float64; ``None`` for anything else."""
    found = stored_tensor(captured, argument)
    return None if found is None else found.double()


# One convolution


def _merged(total: BranchSum) -> Convolution | None:
    """Return the convolution that a sum amounts to, if it is one and worth merging."""
    found = [b.convolution for b in total.branches if b.convolution is not None]
    trained = {
        branch.origin for branch in total.branches if branch.origin is not branch.source
    }
    sources = {branch.source for branch in total.branches}
    # A lone convolution beside a shortcut is a residual block or a positional encoding:
    # merged, the float residual stream would pass through a quantized kernel.
    if not found or len(trained) < 2 or len(sources) > 1:
        return None
    copy = identity(len(found[0].weight), found[0].groups, found[0].weight.dim() - 2)
    return fused_convolution([(b.scale, b.convolution or copy) for b in total.branches])


def _put(
    captured: CapturedGraph, root: fx.Node, total: BranchSum, merged: Convolution
) -> None:
    """Replace a sum by a convolution that is named after the biggest one in it."""
    sizes = {b.origin: b.convolution.weight.numel() for b in total.branches if b.convolution}
    origin = max(sizes, key=lambda node: sizes[node])
    path = str(node_argument(origin, 1).target).rpartition(".")[0]
    owner = ModulePath(path, module_path(origin).kind)
    shift = total.shift.expand(len(merged.weight)).contiguous()
    # Made for the old convolution, which dies: so the old names are free.
    weight = constant_node(captured, origin, "weight", merged.weight.float(), owner)
    bias = constant_node(captured, origin, "bias", shift.float(), owner)
    axes = len(merged.stride)
    window = (list(merged.stride), list(merged.padding), [1] * axes, merged.groups)
    with captured.graph.inserting_before(root):
        node = captured.graph.call_function(
            ops.convolution[axes], (origin.args[0], weight, bias, *window)
        )
    node.meta = {"info": info(root), "module": module_path(origin)}
    root.replace_all_uses_with(node)


def merge_branches(captured: CapturedGraph) -> int:
    """Return how many sums of branches were replaced by one convolution each, in place.

    Constants must be folded before: only then is a layer scale that was reshaped on its way
    a stored tensor. The caller recompiles the graph.
    """
    # A folded batch norm is dead but still there, and would count as a second reader.
    captured.graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output")
    )
    count, replaced = 0, set[fx.Node]()
    for node in reversed(list(captured.graph.nodes)):  # a sum comes before the sums in it
        if node.users and replaced.issuperset(node.users):
            replaced.add(node)
            continue
        total = _branch_sum(captured, node, is_root=True)
        merged = _merged(total)
        if merged is not None:
            _put(captured, node, total, merged)
            replaced.add(node)
            count += 1
    return count
