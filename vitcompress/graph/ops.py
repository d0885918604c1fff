"""The one file that names ATen operators: which overloads play which part.

Everything else asks :func:`is_op`, so a renamed overload is mended here alone.
"""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

__all__ = ["is_op", "op_name", "resolve_op"]

aten = torch.ops.aten

Target = Callable[..., Any]

#: Canonical spellings, for passes that create nodes.
linear = aten.linear.default
matmul = aten.matmul.default
reshape = aten.reshape.default
softmax = aten.softmax.int
add = aten.add.Tensor
sub = aten.sub.Tensor
mul = aten.mul.Tensor
expand = aten.expand.default
permute = aten.permute.default
select = aten.select.int
slice_ = aten.slice.Tensor
unsqueeze = aten.unsqueeze.default
sym_size = aten.sym_size.int
attention = aten.scaled_dot_product_attention.default
#: By the number of spatial axes.
convolution = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}

LINEAR: Collection[Target] = {linear}
CONV: Collection[Target] = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
}
BMM: Collection[Target] = {aten.bmm.default}
MATMUL: Collection[Target] = {matmul, *BMM}
LAYER_NORM: Collection[Target] = {aten.layer_norm.default}
EINSUM: Collection[Target] = {aten.einsum.default}
#: ``(addend, left, right)``.
ADDED_PRODUCT: Collection[Target] = {aten.addmm.default, aten.baddbmm.default}
#: Products of activations that have no sites: they stay float, and are reported as such.
UNLISTED_PRODUCT: Collection[Target] = {
    *EINSUM,
    *ADDED_PRODUCT,
    aten.conv_transpose2d.input,
}
#: ``(x, weight, bias, mean, variance, momentum, eps)`` -> ``(y, ...)``.
BATCH_NORM: Collection[Target] = {aten._native_batch_norm_legit_no_training.default}
INTERNAL_SOFTMAX: Collection[Target] = {aten._softmax.default}
SOFTMAX: Collection[Target] = {softmax, *INTERNAL_SOFTMAX}
ACTIVATION: Collection[Target] = {
    aten.gelu.default,
    aten.relu.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.mish.default,
}
GATE: Collection[Target] = {
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.tanh.default,
}
POWER: Collection[Target] = {aten.pow.Tensor_Scalar, aten.square.default}
SUM: Collection[Target] = {aten.sum.dim_IntList}
MUL: Collection[Target] = {aten.mul.Tensor, aten.mul.Scalar}
DIV: Collection[Target] = {aten.div.Tensor, aten.div.Scalar}
ADD: Collection[Target] = {aten.add.Tensor, aten.add.Scalar}
SUB: Collection[Target] = {aten.sub.Tensor, aten.sub.Scalar}
PAD: Collection[Target] = {aten.pad.default, aten.constant_pad_nd.default}
PERMUTE: Collection[Target] = {permute}
TRANSPOSE: Collection[Target] = {aten.transpose.int}
VIEW: Collection[Target] = {aten.view.default, aten._unsafe_view.default}
FLATTEN: Collection[Target] = {aten.flatten.using_ints}
#: ``(x, axis, extents)``.
UNFLATTEN: Collection[Target] = {aten.unflatten.int}
RESHAPE: Collection[Target] = {
    reshape,
    *VIEW,
    *FLATTEN,
    *UNFLATTEN,
    aten.squeeze.dim,
    aten.squeeze.dims,
    unsqueeze,
    expand,
    aten.expand_as.default,
    aten.view_as.default,
}
EXPAND: Collection[Target] = {expand, aten.expand_as.default}
#: Rank-preserving picks along one axis: ``(x, dim, ...)``.
PICK: Collection[Target] = {slice_, aten.narrow.default}
SELECT: Collection[Target] = {select}
ROLL: Collection[Target] = {aten.roll.default}
UNBIND: Collection[Target] = {
    aten.unbind.int,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
}
GETITEM: Collection[Target] = {operator.getitem}
#: Values pass unchanged; only their arrangement differs.
REARRANGE: Collection[Target] = (
    {*RESHAPE, *PERMUTE, *TRANSPOSE, *PICK, *SELECT, *ROLL, *UNBIND, *GETITEM}
    | {aten.contiguous.default, aten.clone.default, aten.repeat.default, aten.t.default}
    | {aten.unfold.default, aten.im2col.default}
)
MASKED_FILL: Collection[Target] = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
#: What may lie between a score product and its softmax.
SCORE_PATH: Collection[Target] = (
    {*MUL, *DIV, *ADD, *SUB, *RESHAPE, *PERMUTE, *TRANSPOSE, *PICK, *GETITEM}
    | {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.clamp.default, aten.where.self}
    | {aten.contiguous.default, aten.clone.default, aten.slice_scatter.default}
)
#: ``(x, p, train)``.
DROPOUT: Collection[Target] = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
#: Operations without effect in evaluation: replaced by their first argument.
IDENTITY: Collection[Target] = {
    *DROPOUT,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
}
#: Casts: without effect when the dtype is already right.
CAST: Collection[Target] = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
#: Assertions left by the exporter.
ASSERTION: Collection[Target] = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
SYM_SIZE: Collection[Target] = {sym_size}
#: ``(x, size, ...)``: a constant of the dtype of ``x``.
FILL: Collection[Target] = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
RANDOM: Collection[Target] = {
    aten.rand.default,
    aten.rand_like.default,
    aten.randn.default,
    aten.randn_like.default,
    aten.randint.default,
    aten.randint.low,
    aten.randperm.default,
    aten.bernoulli.p,
    aten.bernoulli.default,
    aten.native_dropout.default,
}

_PYTHON_OPS: dict[str, Target] = {
    function.__name__: function
    for function in (
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.pow,
    )
}
#: ATen operators that reach outside the process.
_FORBIDDEN = ("from_file",)


def is_op(node: object, *groups: Collection[Target]) -> bool:
    """Return whether ``node`` is a call of one of the operators in ``groups``."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and any(node.target in group for group in groups)
    )


def op_name(target: object) -> str:
    """Return the name under which a call target is stored: ``aten.linear.default``, ``mul``.

    Raises:
        ValueError: The target is neither an ATen overload nor one of the integer helpers.
    """
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    name = getattr(target, "__name__", "")
    if _PYTHON_OPS.get(name) is target:
        return name
    if getattr(target, "__module__", "") == "torch" and name.startswith("sym_"):
        return f"torch.{name}"
    raise ValueError(f"{target} is not an operator of the graph language")


def resolve_op(name: str) -> Target:
    """Return the call target stored under ``name``.

    Raises:
        ValueError: The name is unknown, or names something outside the graph language.
    """
    if name in _PYTHON_OPS:
        return _PYTHON_OPS[name]
    parts = name.split(".")
    if len(parts) == 2 and parts[0] == "torch" and parts[1].startswith("sym_"):
        found = getattr(torch, parts[1], None)
    elif len(parts) == 3 and parts[0] == "aten" and parts[1] not in _FORBIDDEN:
        packet = getattr(aten, parts[1], None)
        found = getattr(packet, parts[2], None)
        # Namespaces and packets are Python objects: they have methods besides overloads.
        if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
            found = None
    else:
        found = None
    if found is None:
        raise ValueError(f"'{name}' is not an operator of the graph language")
    target: Target = found
    return target
