"""The verbs as scripts call them, and what every wrong call is answered with."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.painted import write_pairs

from lungseg import cli
from lungseg.cli.app import VERBS
from lungseg.cli.jobs import _with_runs
from lungseg.errors import StorageError
from lungseg.storage import FolderStore
from lungseg.telemetry import log

HEAVY = ("tensorflow", "keras", "ray", "numpy", "pydantic", "pylidc", "boto3", "SimpleITK")
Refusal = Callable[..., str]


@pytest.fixture
def refusal(here: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Refusal]:
    """Run a wrong command line and give its one line; it must write nothing, and end with 2."""

    def run(*words: str) -> str:
        before = listing(here)
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        out, err = capsys.readouterr()
        assert ended.value.code == 2, err
        assert out == ""
        assert err.startswith("lungseg: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Remedy: " in err
        assert "Traceback" not in err
        assert listing(here) == before
        return err

    return run


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.alone
def test_help_is_quick_since_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, lungseg.cli\n"
        "try: lungseg.cli.main(['--help'])\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stderr == "[]\n"
        listed = done.stdout.partition("Commands:\n")[2].splitlines()
        assert tuple(line.split()[0] for line in listed) == VERBS
    assert sorted(seconds)[1] < 0.5


def test_without_arguments_there_is_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lungseg"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "Usage: lungseg [OPTIONS] COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("demo", "--out --store"),
        ("phantom", "--out --scans --seed --hard --crops --without"),
        ("prepare lidc", "--store --data --recipe --set --skip-broken"),
        ("prepare pairs", "--store --data --recipe --set --skip-broken"),
        ("train", "--store --data --run --recipe --set --resume --new"),
        ("tune", "--store --data --run --trials --minutes --recipe --space --set --resume --warm-start"),
        ("fit-post", "--store --run --runs --by --data --set"),
        ("evaluate", "--store --run --runs --no-post --split --data --out --set --baseline"),
        ("compare", "--store --run --split --out"),
        ("predict", "--store --run --runs --no-post --out"),
        ("submit", "--address --no-wait"),
        ("status", "--store --run --address --json"),
        ("logs", "--store --run --verb --address --follow"),
        ("stop", "--store --run --verb --address"),
        ("wait", "--store --run --verb --address"),
        ("runs", "--store"),
        ("pull", "--store --run --out"),
        ("settings", "--schema"),
        ("doctor", "--store --address"),
    ],
)
def test_every_verb_explains_its_flags(verb: str, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"Usage: lungseg {verb} ")
    assert all(flag in shown for flag in flags.split())


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("prepare lidc none --store s --data d", "dicom-dir-missing"),
        ("prepare pairs none --store s --data d --recipe none.yaml", "recipe-missing"),
        ("prepare pairs none --store s --data d --set data.patch.jitter=0.2", "folder-missing"),
        ("train --store s --data d --run r", "data-missing"),
        (
            "train --store s --data d --run r --set train.epochs=2 --set loss.name=bce --resume",
            "data-missing",
        ),
        ("train --store s --data d --run r --new --recipe none.yaml", "recipe-missing"),
        (
            "tune --store s --data d --run r --trials 3 --set tune.space.model.width={choice:[4,8]}",
            "data-missing",
        ),
        ("tune --store s --data d --run r --minutes 3 --resume --space none.yaml", "space-file"),
        ("evaluate --store s --run r --split test --out o", "run-missing"),
        ("evaluate --store s --run r --out o", "run-missing"),
        ("compare --store s --run r --run q", "run-missing"),
        ("compare --store s --run r --run r", "runs-to-compare"),
        ("compare --store s --run r", "runs-to-compare"),
        ("predict none other --store s --run r --out o", "input-missing"),
        ("predict --store s --run r --out o none", "input-missing"),
        ("predict --store s --out o none", "runs-needed"),
        ("evaluate --store s --out o --runs none.txt", "runs-file"),
        ("evaluate --store s --out o --run a --run b", "run-missing"),
        ("submit evaluate --store s --out o --run a --run b", "cluster-address"),
        ("submit train --store s --data d --run r", "cluster-address"),
        ("fit-post --store s --run r", "run-missing"),
        ("submit fit-post --store s --run r", "cluster-address"),
        ("stop --run r", "cluster-address"),
        ("submit demo", "verb-unknown"),
        ("submit prepare", "verb-unknown"),
        ("status --store s --run r", "store-missing"),
        ("logs --store s --run r", "run-missing"),
        ("wait --store s --run r", "cluster-address"),
        ("runs --store s", "store-missing"),
        ("pull --store s --run r --out o", "run-missing"),
    ],
)
def test_documented_calls_get_as_far_as_their_first_missing_input(
    line: str, code: str, refusal: Refusal
) -> None:
    assert refusal(*line.split()).startswith(f"lungseg: {code}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nosuch", "No such command 'nosuch'. Remedy: see `lungseg --help`"),
        ("--nosuch", "No such option: --nosuch. Remedy: see `lungseg --help`"),
        ("prepare", "Missing command. Remedy: see `lungseg prepare --help`"),
        ("prepare bogus", "No such command 'bogus'. Remedy: see `lungseg prepare --help`"),
        ("runs --bogus", "No such option: --bogus. Remedy: see `lungseg runs --help`"),
        ("runs extra", "Got unexpected extra argument"),
        ("train --data d", "Missing option '--run'. Remedy: see `lungseg train --help`"),
        ("train --run r", "Missing option '--data'"),
        ("tune --data d --run r", "budget-missing. Remedy: give --trials, --minutes or both"),
        ("tune --data d --run r --trials 0", "Invalid value for '--trials'"),
        ("tune --data d --run r --trials x", "Invalid value for '--trials'"),
        ("phantom", "Missing option '--out'"),
        ("phantom --out o --scans 0", "Invalid value for '--scans'"),
        ("phantom --out o --seed -1", "Invalid value for '--seed'"),
        ("predict --run r --out o", "Missing argument 'INPUT...'"),
        ("prepare lidc --data d", "Missing argument 'DICOM_DIR'"),
        ("train --data d --run r --resume --new", "flags-contradict"),
        ("phantom --out o --crops 3 --scans 3", "flags-contradict"),
        ("phantom --out o --without none.txt", "patients-file"),
        ("phantom --scans 1 --out=", "folder-empty (folder='')"),
        ("train --data d --run ../r", "name-invalid"),
        ("train --data a/b --run r", "name-invalid"),
        ("pull --run .hidden --out o", "name-invalid"),
        ("runs --store ftp://host/x", "store-uri"),
        ("runs --store s3://", "store-uri"),
        ("runs --store=", "store-uri (store='')"),
        ("doctor --store=", "store-uri (store='')"),
        ("-x runs", "No such option: -x"),
        ("settings tran", "did you mean train?"),
        ("settings train --schema", "flags-contradict"),
    ],
)
def test_a_wrong_call_is_answered_by_name(line: str, said: str, refusal: Refusal) -> None:
    assert said in refusal(*line.split())


def test_runs_that_a_file_names_go_along_to_a_cluster_as_flags(here: Path) -> None:
    (here / "runs.txt").write_text("b\nc\n")
    words = ["evaluate", "--run", "a", "--runs", "runs.txt", "--out", "o"]
    given = {"runs": ["a"], "runs_file": Path("runs.txt")}
    wanted = ["evaluate", "--run", "a", "--out", "o", "--run=b", "--run=c"]
    assert _with_runs(words, given) == (wanted, ["a", "b", "c"])


def test_wrong_settings_are_named_before_the_data_is_looked_for(here: Path, refusal: Refusal) -> None:
    call = ("train", "--store", "s", "--data", "d", "--run", "r")
    assert "Remedy: did you mean train.epochs?" in refusal(*call, "--set", "train.epochz=3")
    assert "field-invalid" in refusal(*call, "--set", "train.epochs=0")
    assert "override-syntax" in refusal(*call, "--set", "train.epochs")
    (here / "bad.yaml").write_text("train: {epochs: 3\n  x: [")
    assert "recipe-syntax" in refusal(*call, "--recipe", "bad.yaml")
    (here / "unknown.yaml").write_text("model: {widht: 8}\n")
    assert "did you mean model.width?" in refusal(*call, "--recipe", "unknown.yaml")


def test_an_existing_run_is_neither_continued_nor_replaced_by_accident(store: Path, refusal: Refusal) -> None:
    call = ("--store", str(store), "--data", "balls", "--run", "taken")
    for verb in (["train"], ["tune", "--trials", "2"]):
        said = refusal(*verb, *call)
        assert "run-exists (run=taken" in said
        assert "--resume" in said
        assert "--new" in said


def test_unknown_names_are_answered_with_those_that_exist(store: Path, refusal: Refusal) -> None:
    at = ("--store", str(store))
    assert "data sets here: balls" in refusal("train", *at, "--data", "ball", "--run", "r")
    assert "data sets here: balls" in refusal("tune", *at, "--data", "ball", "--run", "r", "--trials", "1")
    for verb in ("evaluate", "pull"):
        assert "choose one of: taken" in refusal(verb, *at, "--run", "take", "--out", "o")
    assert "no-checkpoint" in refusal("pull", *at, "--run", "taken", "--out", "o")
    assert "split-empty" in refusal("evaluate", *at, "--run", "taken", "--split", "tset", "--out", "o")


def test_predict_refuses_inputs_that_are_no_scans(store: Path, here: Path, refusal: Refusal) -> None:
    call = ("--store", str(store), "--run", "taken", "--out", "o")
    (here / "empty").mkdir()
    assert "series" in refusal("predict", "empty", *call)
    (here / "text.nii.gz").write_text("no image")
    assert "text.nii.gz" in refusal("predict", "text.nii.gz", *call)
    assert "input-ambiguous (inputs=empty,empty)" in refusal("predict", "empty", "empty", *call)
    assert "input-missing (input=none)" in refusal("predict", "empty", "none", *call)


def test_prepare_refuses_folders_without_scans(here: Path, refusal: Refusal) -> None:
    (here / "scans").mkdir()
    assert "lidc-series-missing" in refusal("prepare", "lidc", "scans", "--data", "d")
    (here / "pairs" / "images").mkdir(parents=True)
    (here / "pairs" / "masks").mkdir()
    assert "pairs-none" in refusal("prepare", "pairs", "pairs", "--data", "d")


def test_a_folder_that_cannot_be_written_is_refused(here: Path, refusal: Refusal) -> None:
    (here / "file").write_text("not a folder")
    assert "phantom-unwritable" in refusal("phantom", "--out", "file/x", "--scans", "1")


@pytest.mark.parametrize(
    "line",
    [
        "runs",
        "train --data d --run r",
        "tune --data d --run r --trials 1",
        "evaluate --run r --out o",
        "pull --run r --out o",
    ],
)
def test_a_server_that_refuses_is_told_within_15_s(
    line: str, refusal: Refusal, refusing_server: None
) -> None:
    began = time.monotonic()
    assert "store-unreachable" in refusal(*line.split(), "--store", "s3://bucket/prefix")
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")  # `here` takes away earlier ones
    assert time.monotonic() - began < 15


def test_the_store_comes_from_the_environment(
    here: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"store={here / 'lungseg-store'}" in refusal("runs")
    monkeypatch.setenv("LUNGSEG_STORE", "elsewhere")
    assert f"store={here / 'elsewhere'}" in refusal("runs")


def test_runs_are_listed(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["runs", "--store", str(store)])
    assert ended.value.code == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "kind", "data", "val", "Dice", "epoch", "created"]
    assert row.split()[:5] == ["taken", "train", "balls", "-", "-"]


def test_jobs_run_the_verb_of_their_name(here: Path) -> None:
    jobs = Path(__file__).parents[2] / "jobs"
    for verb in ("prepare", "train", "tune", "evaluate"):
        words = [sys.executable, str(jobs / f"{verb}.py"), "--help"]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ}, check=True)
        assert done.stdout.startswith(f"Usage: lungseg {verb} ")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("train --data d --run r", "data-missing"),
        ("tune --data d --run r --trials 1", "data-missing"),
        ("evaluate --run r --out report", "run-missing"),
        ("prepare pairs pairs --data d", "cluster-address"),  # which takes a store that is not there yet
    ],
)
def test_a_job_on_a_cluster_waits_for_the_store_that_starts_with_it(
    line: str, code: str, refusal: Refusal, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(here / "pairs", 4)
    missing = StorageError("store-missing", remedy="make it")
    answers = [StorageError("store-unreachable", remedy="wait"), *[missing] * line.startswith("prepare")]

    def check(store: FolderStore) -> None:
        if answers:
            raise answers.pop(0)

    monkeypatch.setattr("lungseg.cluster._LOOK_SECONDS", 0.01)
    monkeypatch.setattr(log("cluster"), "disabled", True)
    monkeypatch.setattr(FolderStore, "check", check)
    monkeypatch.setenv("RAY_ADDRESS", "http://not-rays")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # it may be, by another test
    assert f"lungseg: {code}" in refusal(*line.split(), "--store", str(here))
    assert answers == []
