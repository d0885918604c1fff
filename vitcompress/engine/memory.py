"""Peak resident memory of a stretch of work."""

import contextlib
import resource
import sys
from pathlib import Path
from types import TracebackType

__all__ = ["PeakMemory"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager that measures the largest resident size of this process.

    On Linux the kernel's high-water mark is reset on entry. Elsewhere the mark covers the
    whole life of the process, so a later stage can only report at least what an earlier one
    did.

    Attributes:
        peak_bytes: The mark, after exit.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        with contextlib.suppress(OSError):
            _RESET.write_text("5", encoding="ascii")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.peak_bytes = _high_water_mark()


def _high_water_mark() -> int:
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
