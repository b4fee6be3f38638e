"""The verbs. Everything behind them is imported when a verb runs, so that `--help` answers at once."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Sequence

import typer

# Each registers its verbs.
from lungseg.cli import data, jobs, machine, segmenting, settings, training  # noqa: F401
from lungseg.cli.app import app
from lungseg.cli.ends import INTERRUPTED, end, unexpected
from lungseg.cluster import show_worker_lines, worker_lines
from lungseg.errors import LungsegError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and exit: 0, 2 for what a user can cure, 3 where scans that
    cannot be used were left out, 130 after Ctrl-C or SIGTERM, 1 for anything else.

    Whatever fails ends in one line on standard error.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack the letters of a path
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given or ["--help"], prog_name="lungseg", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else "lungseg"
        end(f"{error.format_message().rstrip('.')}. Remedy: see `{verb} --help`", 2)
    except Exception as error:
        ours = LungsegError.find_in(error)
        show_worker_lines()  # whose copies come a moment late, and the last line is to name the cause
        if ours:
            end(str(ours), INTERRUPTED if ours.code == "stopped" else 2)
        end(unexpected(error), 1)
    if code == INTERRUPTED:  # which Typer makes of KeyboardInterrupt
        worker_lines.close()  # workers that still live would have the last word
        again = "the same command goes on from there (train: with --resume)"
        end(f"interrupted: what was committed is kept; {again}", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)
