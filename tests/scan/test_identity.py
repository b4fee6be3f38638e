"""Case ids: the same for the same name and key everywhere, and no way back without the key."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lungseg import cli
from lungseg.errors import ConfigError
from lungseg.scan.identity import case_id, case_key, key_file

SHOW = "from lungseg.scan.identity import case_key; print(case_key().decode())"


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither key nor cluster; the folder in which a key would be kept."""
    monkeypatch.delenv("LUNGSEG_CASE_KEY")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def test_an_id_is_the_beginning_of_hmac_sha256():
    # Test case 2 of RFC 4231.
    assert case_id("what do ya want for nothing?", b"Jefe") == "5bdcc146bf60754e"


def test_another_key_gives_other_ids_and_an_accent_the_same_however_it_is_written():
    assert case_id("P1", b"k" * 16) != case_id("P1", b"l" * 16)
    assert case_id("J\u00f6rg", b"k") == case_id("Jo\u0308rg", b"k") != case_id("Jorg", b"k")


def test_the_key_comes_from_the_environment_and_must_be_long(no_key, monkeypatch):
    monkeypatch.setenv("LUNGSEG_CASE_KEY", "0123456789abcdef")
    assert case_key() == b"0123456789abcdef"
    monkeypatch.setenv("LUNGSEG_CASE_KEY", os.fsdecode(b"\xfc" * 16))  # random bytes are no UTF-8
    assert case_key() == b"\xfc" * 16
    monkeypatch.setenv("LUNGSEG_CASE_KEY", "0123456789abcde")
    with pytest.raises(ConfigError, match=r"case-key-short.*LUNGSEG_CASE_KEY.*Remedy"):
        case_key()
    assert not no_key.exists()


def test_without_one_a_key_is_made_once_for_its_owner_alone(no_key):
    first = case_key()
    assert len(first) == 64
    assert case_key() == first
    assert key_file().is_relative_to(no_key)
    assert [path.name for path in key_file().parent.iterdir()] == ["case.key"]
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    key_file().write_text("short\n")
    with pytest.raises(ConfigError, match=r"case-key-short.*case\.key"):
        case_key()


def test_processes_that_start_at_once_share_one_key(no_key):
    command = [sys.executable, "-c", SHOW]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate(timeout=60)[0] for process in started}) == 1
    assert all(process.returncode == 0 for process in started)


def test_in_a_pod_a_key_that_would_be_lost_is_not_made(no_key, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match=r"case-key-missing.*LUNGSEG_CASE_KEY from a Secret"):
        case_key()
    assert not no_key.exists()


def test_a_home_that_cannot_be_written_is_one_error_with_a_remedy(no_key):
    no_key.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"case-key-unusable.*LUNGSEG_CASE_KEY"):
        case_key()


def test_the_verb_ids_shows_which_scan_has_which(tmp_path, capsys):
    for name in ("images/anna.nii.gz", "masks/anna.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        cli.main(["ids", str(tmp_path), str(tmp_path / "images" / "anna.nii.gz")])
    assert ended.value.code == 0
    anna = case_id("anna", case_key())
    file = tmp_path / "images" / "anna.nii.gz"
    assert capsys.readouterr().out.splitlines() == [f"{anna}  anna", f"{anna}  {file}"]
