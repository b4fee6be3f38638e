"""How a command ends: its exit code, and the one line on standard error if it failed."""

from __future__ import annotations

import sys
import tempfile
import traceback
from typing import NoReturn

INTERRUPTED = 130
INCOMPLETE = 3


def end(text: str, code: int) -> NoReturn:
    print("lungseg: " + " ".join(text.split()), file=sys.stderr)
    sys.exit(code)


def unexpected(error: Exception) -> str:
    """One line for an error that is not ours; its traceback goes to a file that the line names."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="lungseg-error-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    said = str(error).strip().partition("\n")[0][:200]
    return (
        f"unexpected {type(error).__name__}: {said}. Remedy: read {file.name}, and report it with that file"
    )
