"""The commands: each parses, calls one library function, and prints where the result lies.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import errno
import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from capgap import __version__
from capgap.cli import commands
from capgap.cli.app import FAILED, USER_ERROR, app, as_options, exit_with
from capgap.errors import Failed, UserError, is_disk_full, is_storage_away
from capgap.machine import forget_leftovers, started

# What the machine refuses, and only its user can mend
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)

__all__ = ["app", "commands", "leave", "main"]


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal may have no character for what a model writes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # bars and hints of other libraries would break into our own output
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        forget_leftovers()
    except UserError as error:
        exit_with(str(error), USER_ERROR)
    if started()[1] == 1:
        _run()
        return
    code = FAILED
    try:
        _run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends one of several processes without taking Python down piece by piece: gloo's threads may
    outlive what they use, and abort a run that has done its work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(args=[_at_home(word) for word in sys.argv[1:]])
    except UserError as error:
        where = "" if error.rank in (None, 0) else f"rank {error.rank}: "
        # what all processes of torchrun meet alike, the first one tells
        told = error.rank is not None or started()[0] == 0
        exit_with(f"{where}{as_options(str(error))}" if told else "", USER_ERROR)
    except Failed as error:
        exit_with(str(error), error.code)
    except OSError as error:
        if is_disk_full(error):
            exit_with("no disk space left: free some and run the same command again", USER_ERROR)
        if error.errno in REFUSALS or is_storage_away(error):
            exit_with(f"{error.filename}: {error.strerror}", USER_ERROR)
        raise


def _at_home(word: str) -> str:
    """Within quotes a shell leaves ~/ alone: at the beginning of a value it is the home."""
    option, equals, value = word.partition("=")
    if word.startswith("--") and value.startswith("~/"):
        return option + equals + os.path.expanduser(value)
    return os.path.expanduser(word) if word.startswith("~/") else word


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
