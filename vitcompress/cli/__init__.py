"""The command line: arguments in, printed tables out. ``vitcompress.api`` does the work.

Each module registers its commands when it is imported; this one turns errors to exit codes.
"""

import os
import signal
import sys
import traceback
from types import FrameType

from rich.console import Console
from rich.markup import escape

import calib
from vitcompress.cli import (  # noqa: F401
    analysis,
    compression,
    demo,
    deployment,
    recipes,
    regression,
    sweeping,
)
from vitcompress.cli.application import app
from vitcompress.errors import VitcompressError

__all__ = ["app", "main"]

EXIT_INTERNAL, EXIT_USAGE, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 5, 130

err = Console(stderr=True)


def main() -> None:
    """Run the command line and exit with the documented code."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_run())


def _run() -> int:
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:  # the command line library has met the interrupt
            return _fail("interrupted; nothing was written", EXIT_INTERRUPTED)
        return end.code if isinstance(end.code, int) else EXIT_USAGE
    except VitcompressError as error:
        return _fail(str(error), error.exit_code)
    except calib.SourceError as error:
        return _fail(str(error), EXIT_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; writing to it again at exit would raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        traceback.print_exc()
        return _fail(
            f"internal error ({type(error).__name__}); please report it with the lines above",
            EXIT_INTERNAL,
        )
    return 0


def _fail(message: str, code: int) -> int:
    err.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
