"""Progress, log lines of local workers, and the notices of TensorFlow's C++."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lungseg.errors import DataError
from lungseg.telemetry import progress, quiet_tensorflow, relay


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_relay_loses_no_line_at_the_end_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "workers.log"
    code = f"""
import atexit, pathlib
from lungseg.telemetry import relay
path = pathlib.Path({str(path)!r})
path.touch()
atexit.register(relay(str(path)))
with path.open("a") as file:
    file.writelines(f"line {{i}}\\n" for i in range(5000))
"""
    done = run(code)
    assert done.stderr.splitlines() == [f"line {i}" for i in range(5000)]
    assert not path.exists()


def test_the_relay_copies_while_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text("first\n")
    end = relay(str(path))
    with path.open("a") as file:
        file.write("second\n")
    end()
    assert capsys.readouterr().err == "first\nsecond\n"


def test_log_lines_go_to_standard_error_or_to_the_workers_file(tmp_path: Path) -> None:
    code = "from lungseg.telemetry import log; log('lungseg.train').info('epoch %d', 3)"
    alone = run(code, LUNGSEG_LOG_FILE="")
    assert alone.stdout == ""
    assert alone.stderr.endswith("INFO lungseg.train: epoch 3\n")
    worker = run(code, LUNGSEG_LOG_FILE=str(tmp_path / "log"))
    assert worker.stderr == ""
    assert (tmp_path / "log").read_text().endswith("INFO lungseg.train: epoch 3\n")


def test_notices_from_below_python_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_tensorflow():
        os.write(2, b"I0000 oneDNN custom operations are on\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def import_that_fails(error: Exception) -> None:
    with quiet_tensorflow():
        os.write(2, b"I0000 notice\n")
        raise error


def test_notices_are_shown_if_the_import_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError):
        import_that_fails(ImportError())
    assert capfd.readouterr().err == "I0000 notice\n"


def test_an_error_of_ours_is_not_buried_in_notices(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError):
        import_that_fails(DataError("data-missing", remedy="prepare it"))
    assert capfd.readouterr().err == ""


def test_progress_without_a_terminal_is_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("scans") as report:
        report(0, 4)
        report(1, 4)  # too soon after the beginning for a line
        report(4, 4)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "scans: 4/4, 0 s, about 0 s left\n"
