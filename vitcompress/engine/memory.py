"""Peak resident memory of a stretch of work, and how much memory is left."""

import contextlib
import resource
import sys
from pathlib import Path
from types import TracebackType

__all__ = ["PeakMemory", "available_bytes", "high_water_mark"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
#: Limit, use and statistics of the control group, by version 2 and version 1.
_CONTROL_GROUPS = (
    (_GROUPS / "memory.max", _GROUPS / "memory.current", _GROUPS / "memory.stat"),
    (
        _GROUPS / "memory" / "memory.limit_in_bytes",
        _GROUPS / "memory" / "memory.usage_in_bytes",
        _GROUPS / "memory" / "memory.stat",
    ),
)


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
        self.peak_bytes = high_water_mark()


def high_water_mark(process: int | None = None) -> int:
    """Return the largest resident size of a process in bytes, since it was last reset.

    Args:
        process: Its number; this process by default. Of another one 0 is returned where the
            system does not tell.
    """
    path = _STATUS if process is None else Path(f"/proc/{process}/status")
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if process is not None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int | None:
    """Return the memory that further processes could take; ``None`` where nobody tells.

    The least of what the kernel calls available and what the control group leaves.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        found += [int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:")]
    for limit, used, statistics in _CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError, IndexError):  # "max": there is no limit
            cached = [
                int(line.split()[1])
                for line in statistics.read_text(encoding="ascii").splitlines()
                if line.startswith(("inactive_file ", "total_inactive_file "))
            ]
            # What files left behind is given up on demand.
            taken = int(used.read_text()) - max(cached, default=0)
            found.append(int(limit.read_text()) - taken)
    return max(min(found), 0) if found else None
