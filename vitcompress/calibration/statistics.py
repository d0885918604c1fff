"""What passes ask of the data, and what the engine answers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vitcompress.calibration.observers import Observer

__all__ = ["Request", "Statistics"]


@dataclass(frozen=True)
class Request:
    """One observer at one site.

    Attributes:
        site: Name of an activation site; its value is seen before any quantizer.
        observer: Makes a fresh observer.
    """

    site: str
    observer: Callable[[], Observer]


class Statistics:
    """Results by site and observer class."""

    def __init__(self) -> None:
        self._observers: dict[tuple[str, type[Observer]], Observer] = {}

    def add(self, site: str, observer: Observer) -> None:
        """Store an observer under its site and class."""
        self._observers[site, type(observer)] = observer

    def get(self, site: str, kind: type[Observer]) -> Tensor | tuple[Tensor, ...]:
        """Return the result of the observer of class ``kind`` at ``site``.

        Raises:
            KeyError: Nothing of the kind was requested there.
        """
        return self._observers[site, kind].result()
