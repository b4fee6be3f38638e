"""Progress, log lines of local workers, and the notices of TensorFlow's C++."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lungseg.errors import DataError
from lungseg.telemetry import Relay, progress, quiet_tensorflow


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
from lungseg.telemetry import Relay
path = pathlib.Path({str(path)!r})
path.touch()
atexit.register(Relay(str(path)).start().end)
with path.open("a") as file:
    file.writelines(f"line {{i}}\\n" for i in range(5000))
"""
    done = run(code)
    assert done.stderr.splitlines() == [f"line {i}" for i in range(5000)]
    assert not path.exists()


def test_the_relay_copies_while_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text("first\n")
    relay = Relay(str(path)).start()
    with path.open("a") as file:
        file.write("second\n")
    relay.end()
    relay.catch_up()  # which has nothing more to wait for
    assert capsys.readouterr().err == "first\nsecond\n"


def test_who_waits_for_the_relay_has_the_last_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.touch()
    relay = Relay(str(path)).start()
    for number in range(3):
        with path.open("a") as file:
            file.write(f"worker {number}\n")
        relay.catch_up()
        print(f"driver {number}", file=sys.stderr)
    relay.end()
    said = [f"{who} {number}" for number in range(3) for who in ("worker", "driver")]
    assert capsys.readouterr().err.splitlines() == said


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


def on_a_terminal(code: str, **environment: str) -> str:
    """What a terminal shows of a program's standard error, without colours and cursor movements."""
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=slave, env={**os.environ, "TERM": "xterm", **environment}
    ):
        os.close(slave)
        shown = b""
        with suppress(OSError):  # which Linux raises when nobody holds the other end any more
            while piece := os.read(master, 1 << 16):
                shown += piece
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


WAITS = "import time; from lungseg.telemetry import waiting\nwith waiting('starting Ray', 9): time.sleep({})"


def test_what_keras_does_not_need_is_not_installed_for_it_and_is_for_others() -> None:
    code = """
import sys
from lungseg.telemetry import lean_keras
with lean_keras():
    for name in ("matplotlib", "pandas", "sklearn"):
        try:
            __import__(name)
        except ImportError as error:
            print(error.name, "is not there")
import pandas
with lean_keras():
    assert sys.modules["pandas"] is pandas
"""
    assert run(code).stdout.splitlines() == [
        f"{name} is not there" for name in ("matplotlib", "pandas", "sklearn")
    ]


def test_a_network_that_is_loaded_when_keras_is_there_and_dropped_leaves_no_memory_behind() -> None:
    code = """
import gc, sys, types, weakref
from lungseg.telemetry import lean_keras
sys.modules["keras"] = types.ModuleType("keras")
class Network: pass
with lean_keras():
    one = Network()
    one.itself = one
known = weakref.ref(one)
del one
gc.collect()
print(known())
"""
    assert run(code).stdout == "None\n"


def test_a_wait_is_one_line_in_a_log_and_none_if_it_is_short() -> None:
    assert run(WAITS.format(2.5)).stderr == "starting Ray, about 9 s\n"
    assert run(WAITS.format(0.1)).stderr == ""


def test_a_wait_is_a_bar_on_a_terminal() -> None:
    shown = on_a_terminal(WAITS.format(1.2))
    assert re.search(r"starting Ray, about 9 s ━+╸?━* 0:00:01", shown.replace("╺", ""))


def test_an_import_is_waited_for_where_its_own_notices_do_not_go() -> None:
    code = "import os; from lungseg.telemetry import quiet_tensorflow as q\nwith q(): os.write(2, b'I000')"
    shown = on_a_terminal(code)
    assert "importing TensorFlow, about 10 s" in shown
    assert "I000" not in shown


@pytest.mark.slow
def test_what_is_counted_is_a_line_too_before_the_first_is_done() -> None:
    code = "import time; from lungseg.telemetry import progress\nwith progress('scans') as report:\n"
    code += " time.sleep({})"
    waited = run(f"{code.format(5.5)}\n report(1, 2)\n report(2, 2)").stderr
    assert re.fullmatch(r"scans: the first is under way\nscans: 1/2, .* left\nscans: 2/2, .*\n", waited)
    soon = run(f"{code.format(0)}\n report(1, 2)\n time.sleep(5.2)\n report(2, 2)").stderr
    assert re.fullmatch(r"scans: 2/2, .*\n", soon)


WORKER = """
import os, sys, time
from lungseg import telemetry
path = os.environ["LUNGSEG_LOG_FILE"]
open(path, "w").close()
relay = telemetry.Relay(path).start()
telemetry.log("train").info("3 workers")
telemetry.log_wait("building the graph", 15)
time.sleep(0.6)
telemetry.log("train").info("epoch 1")
relay.end()
"""


def test_a_workers_wait_is_a_bar_until_its_next_line(tmp_path: Path) -> None:
    log_file = str(tmp_path / "log")
    shown = on_a_terminal(WORKER, LUNGSEG_LOG_FILE=log_file)
    assert re.search(
        r"train: 3 workers\s+building the graph, about 15 s ━.*\s+\S+ INFO .*: epoch 1", shown, re.S
    )
    lines = run(WORKER, LUNGSEG_LOG_FILE=log_file).stderr.splitlines()
    said = [line.partition(": ")[2] for line in lines]
    assert said == ["3 workers", "building the graph, about 15 s", "epoch 1"]


def test_whoever_asks_for_quiet_hears_of_warnings_only() -> None:
    code = f"""{WAITS.format(2.2)}
from lungseg.telemetry import log, log_wait, progress
with progress("scans") as report: report(1, 1)
log_wait("building the graph", 15)
log("train").info("epoch 1")
log("train").warning("a worker failed")
"""
    done = run(code, LUNGSEG_LOG_LEVEL="WARNING")
    assert done.stderr.count("\n") == 1
    assert "a worker failed" in done.stderr
    assert "a worker failed" in on_a_terminal(code, LUNGSEG_LOG_LEVEL="WARNING")
