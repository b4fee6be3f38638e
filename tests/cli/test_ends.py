"""How a command ends that fails: when it says so, with what code, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lungseg import cli


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "none", "--run", "r"],
        ["train", "--data", "balls", "--run", "taken"],
        ["tune", "--data", "balls", "--run", "taken", "--trials", "1"],
        ["evaluate", "--run", "taken", "--out", "o"],
        ["predict", "none", "--run", "taken", "--out", "o"],
        ["predict", str(Path(__file__).parent), "--run", "taken", "--out", "o"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_told_before_tensorflow_or_ray_start(store: Path, words: list[str]) -> None:
    code = (
        "import sys, lungseg.cli\n"
        "try: lungseg.cli.main(sys.argv[1:])\n"
        "finally: print([m for m in ('tensorflow', 'ray') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, *words, "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("lungseg: ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_with_130_and_one_line(here: Path) -> None:
    code = (
        "import os, signal, time, lungseg.cli, lungseg.runs.run\n"
        "def busy(store):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "lungseg.runs.run.list_runs = busy\n"
        "lungseg.cli.main(['runs', '--store', '.'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == (
        "lungseg: interrupted: what was committed is kept; the same command goes on from there "
        "(train: with --resume)\n"
    )


def test_an_error_that_is_not_ours_is_one_line_and_a_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("lungseg.runs.run.list_runs", broken)
    monkeypatch.setattr("tempfile.tempdir", str(here))
    with pytest.raises(SystemExit) as ended:
        cli.main(["runs", "--store", str(here)])
    out, err = capsys.readouterr()
    (log,) = here.iterdir()
    assert (ended.value.code, out) == (1, "")
    expected = f"unexpected ZeroDivisionError: first line. Remedy: read {log}, and report it with that file"
    assert err == f"lungseg: {expected}\n"
    assert "in broken" in log.read_text()


def test_in_a_job_the_traceback_is_in_its_log_and_no_file_is_named_that_dies_with_its_pod(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("lungseg.runs.run.list_runs", broken)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(SystemExit):
        cli.main(["runs", "--store", str(here)])
    *above, last = capsys.readouterr().err.splitlines()
    assert any("in broken" in line for line in above)
    remedy = "Remedy: report it with the traceback above"
    assert last == f"lungseg: unexpected ZeroDivisionError: first line. {remedy}"


def test_an_error_of_ours_that_ray_wrapped_is_told_as_ours(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayTaskError

    from lungseg.errors import DataError

    ours = DataError("shard-corrupt", shard="a", remedy="fetch it again")
    wrapped = RayTaskError("task", "a page\nof traceback", ours).as_instanceof_cause()

    def broken(*_: object) -> None:
        raise wrapped

    monkeypatch.setattr("lungseg.runs.run.list_runs", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main(["runs", "--store", str(here)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "lungseg: shard-corrupt (shard=a). Remedy: fetch it again\n"
