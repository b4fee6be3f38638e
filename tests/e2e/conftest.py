"""The verbs, run in this process so that TensorFlow and Ray are started once for all of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from lungseg import cli


@pytest.fixture(scope="session")
def lungseg() -> Callable[..., str]:
    """`lungseg("pull", "--run", …)` gives what the verb prints; any exit code but 0 fails the test."""

    def run(*arguments: str | Path) -> str:
        shown = io.StringIO()
        with redirect_stdout(shown), pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert ended.value.code == 0
        return shown.getvalue()

    return run
