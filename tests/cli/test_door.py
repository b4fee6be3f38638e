"""What a newcomer meets first: version, settings, completion, how much is said, and in which letters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lungseg import __version__, cli
from lungseg.config.listing import recipe_schema


def lungseg(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lungseg.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
    )


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"lungseg {__version__}\n"


def test_settings_are_listed_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "settings", "checkpoint").splitlines()
    assert lines[0] == "checkpoint: What is committed to the store, and what is kept of it."
    assert lines[1].split() == ["setting", "default", "values", "meaning"]
    assert lines[2].split(maxsplit=5)[:5] == ["checkpoint.every_epochs", "1", "integer", ">=", "1"]
    assert "data.patch.jitter" in printed(capsys, "settings")


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(printed(capsys, "settings", "--schema")) == recipe_schema()


def test_a_shell_completes_verbs_and_settings() -> None:
    script = lungseg("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    assert "_LUNGSEG_COMPLETE=complete_bash" in script

    def completed(line: str) -> list[str]:
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return lungseg(**asked, _LUNGSEG_COMPLETE="complete_bash").stdout.split()

    assert completed("lungseg pre") == ["prepare", "predict"]
    assert completed("lungseg settings data.patch.s") == ["data.patch.shape_zyx", "data.patch.seed"]


def test_more_and_less_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "--data", "d", "--run", "r", "--store", str(here), "--set", "train.epochs=7")
    said = {flag: lungseg(*flag.split(), *train).stderr for flag in ("", "-v", "-q")}
    assert "DEBUG lungseg.settings: all but defaults: {'train': {'epochs': 7}}\n" in said["-v"]
    assert said[""] == said["-q"] == said["-v"].splitlines(keepends=True)[-1]  # the refusal
    monkeypatch.setenv("LUNGSEG_LOG_LEVEL", "")
    printed(capsys, "-q", "runs", "--store", str(here))
    assert os.environ["LUNGSEG_LOG_LEVEL"] == "WARNING"  # which test_telemetry shows to be enough


@pytest.mark.parametrize(
    ("name", "locale"),
    [
        ("m\u00fcller", {"PYTHONIOENCODING": "ascii"}),
        ("\u80ba", {"PYTHONIOENCODING": "latin-1"}),
        (os.fsdecode(b"m\xfcller"), {"PYTHONIOENCODING": "utf-8"}),
        ("m\u00fcller", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
)
def test_no_locale_lacks_the_letters_of_a_path(name: str, locale: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / f"{name}.nii.gz").touch()
    done = lungseg("ids", str(tmp_path / f"{name}.nii.gz"), **locale)
    assert done.returncode == 0, done.stderr
    assert "\\x" in done.stdout or "\\u" in done.stdout
