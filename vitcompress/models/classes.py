"""How many classes does a model tell apart?"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vitcompress.models.fingerprint import is_classifier_tensor

__all__ = ["classes_of_module", "classes_of_state"]


def classes_of_state(
    state: Mapping[str, Tensor], classifiers: Sequence[str] = ()
) -> int | None:
    """Return the number of classes that the classifier in a state dict has.

    Args:
        state: Tensors by name.
        classifiers: Names of the classifier modules; empty where they are unknown, then
            the usual names are looked for.

    Returns:
        None where there is no classifier.
    """
    for classifier in classifiers:
        weight = state.get(f"{classifier}.weight")
        if weight is not None and weight.dim() > 0:
            return int(weight.shape[0])
    if classifiers:
        return None
    found = None
    for name, tensor in state.items():
        # Hidden layers of a head have such names too; the last layer decides.
        if name.endswith(".weight") and is_classifier_tensor(name, tensor.shape):
            found = int(tensor.shape[0])
    return found


def classes_of_module(module: nn.Module) -> int | None:
    """Return the number of classes that a module says it has, None if it does not say."""
    config = getattr(module, "config", None)
    for owner, attribute in ((config, "num_labels"), (module, "num_classes")):
        value = getattr(owner, attribute, None)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None
