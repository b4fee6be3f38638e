"""How a command ends: its exit code, and the one line on standard error if it failed."""

from __future__ import annotations

import sys
import tempfile
import traceback
from typing import NoReturn

from lungseg.cluster import on_a_cluster
from lungseg.errors import LungsegError

INTERRUPTED = 130
INCOMPLETE = 3


def end(text: str, code: int) -> NoReturn:
    print("lungseg: " + " ".join(text.split()), file=sys.stderr)
    sys.exit(code)


class Refused:
    """Inputs that could not be used, each told on standard error as it comes; the others go on."""

    def __init__(self) -> None:
        self._codes: list[str] = []

    def __call__(self, title: str, error: LungsegError) -> None:
        self._codes.append(f"{title} ({error.code})")
        print(f"lungseg: {title}: {error}", file=sys.stderr, flush=True)

    def end(self, some_done: bool) -> None:
        """Ends the command if there were any: with 3, or with 2 if they were all."""
        if self._codes and some_done:
            end(f"left out, since they could not be used: {', '.join(self._codes)}", INCOMPLETE)
        if self._codes:
            end(f"nothing could be used: {', '.join(self._codes)}", 2)


def unexpected(error: Exception) -> str:
    """One line for an error that is not ours. Its traceback goes to a file that the line names, or in a job,
    whose pod takes its files along, to the log before that line."""
    said = f"unexpected {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}. Remedy: "
    if on_a_cluster():
        traceback.print_exception(error)
        return said + "report it with the traceback above"
    with tempfile.NamedTemporaryFile(
        "w", prefix="lungseg-error-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        traceback.print_exception(error, file=file)
    return said + f"read {file.name}, and report it with that file"
