"""The demo, made small: interrupted by Ctrl-C, started again, and started once more."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SMALL = """
import sys
from lungseg import cli, demo
from lungseg.config import parse_recipe

demo.SCANS = 3
tree = demo.demo_recipe().model_dump(mode="json")
tree["data"]["split"] = {"val": 0.3, "test": 0.3}
tree["data"]["patch"]["shape_zyx"] = [16, 16, 16]
tree["model"] |= {"width": 2, "depth": 2}
tree["train"] |= {"epochs": 4, "steps_per_epoch": 3, "global_batch": 2}
demo.demo_recipe = lambda: parse_recipe(tree)
cli.main(["demo", "--out", sys.argv[1], "--store", sys.argv[1] + "/store"])
"""


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SMALL, str(out)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def test_an_interrupted_demo_goes_on_and_a_second_one_reuses_everything(tmp_path: Path) -> None:
    first = start(tmp_path)
    checkpoints = tmp_path / "store" / "runs" / "demo" / "checkpoints"
    deadline = time.monotonic() + 400
    while not list(checkpoints.glob("*/manifest.json")):
        assert first.poll() is None, first.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, shown = first.communicate(timeout=100)
    assert first.returncode == 130, shown[-3000:]
    assert "the same command goes on" in shown.splitlines()[-1]
    attempt = json.loads((tmp_path / "store/runs/demo/run.json").read_text())["attempt"]
    patches = _state(tmp_path / "store" / "data") | _state(tmp_path / "dicom")

    second = start(tmp_path)
    table, shown = second.communicate(timeout=400)
    assert second.returncode == 0, shown[-3000:]
    assert "whole scan" in table
    lines = [
        json.loads(line) for line in (tmp_path / "store/runs/demo/metrics.jsonl").read_text().splitlines()
    ]
    assert [(line["attempt"], line["epoch"]) for line in lines] == [(attempt, n) for n in (1, 2, 3, 4)]
    assert _state(tmp_path / "store" / "data") | _state(tmp_path / "dicom") == patches
    (mask,) = (tmp_path / "prediction").glob("*/mask.nii.gz")

    before = _state(tmp_path / "store" / "data") | _state(tmp_path / "prediction")
    third = start(tmp_path)
    again, shown = third.communicate(timeout=400)
    assert third.returncode == 0, shown[-3000:]
    assert again.split("seconds:")[0] == table.split("seconds:")[0]
    assert _state(tmp_path / "store" / "data") | _state(tmp_path / "prediction") == before
    assert mask.exists()


def _state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
