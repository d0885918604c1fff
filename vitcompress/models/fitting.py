"""Put a state dict into a module, completely or not at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from vitcompress.models.naming import limited

__all__ = ["Mismatch", "fit", "split_derived"]

Shape = tuple[int, ...]

# Buffers that are computed anew or only counted; versions of the libraries differ in whether
# they are saved. Losing one changes nothing.
DERIVED_BUFFERS = (
    "relative_position_index",
    "attn_mask",
    "num_batches_tracked",
    "position_ids",
)


@dataclass(frozen=True)
class Mismatch:
    """How a state dict differs from the one a module has; false if it does not.

    Attributes:
        missing: Names that only the module has.
        unexpected: Names that only the state dict has.
        misshaped: Expected and found shape by name.
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    misshaped: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def describe(self) -> str:
        """Return the differences for a message, one line per group."""
        shapes = [
            f"{name} (expected {list(expected)}, found {list(found)})"
            for name, (expected, found) in self.misshaped.items()
        ]
        groups = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("shape", shapes),
        )
        return "\n".join(f"  {title}: {limited(names)}" for title, names in groups if names)


def split_derived(
    state: Mapping[str, Tensor], wanted: Mapping[str, object]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict without derived buffers that are not wanted, and their names."""
    dropped = [
        name
        for name in state
        if name not in wanted and name.rpartition(".")[2] in DERIVED_BUFFERS
    ]
    return {name: tensor for name, tensor in state.items() if name not in dropped}, dropped


def fit(module: nn.Module, state: Mapping[str, Tensor]) -> Mismatch:
    """Load a state dict in place if it fits exactly.

    Args:
        module: Gets the values; unchanged if they do not fit.
        state: A tensor for every parameter and persistent buffer.

    Returns:
        What does not fit; false after the load.
    """
    own = {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    mismatch = Mismatch(
        [name for name in own if name not in state],
        [name for name in state if name not in own],
        {
            name: (shape, tuple(state[name].shape))
            for name, shape in own.items()
            if name in state and tuple(state[name].shape) != shape
        },
    )
    if not mismatch:
        # Names are settled above; strict would also insist on extra state without tensors.
        module.load_state_dict(state, strict=False)
    return mismatch
