"""The demo, made small: interrupted by Ctrl-C, started again, and started once more."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lungseg import demo
from lungseg.config import parse_recipe

pytestmark = pytest.mark.slow

INTERRUPTED = """
import sys
from test_demo import make_small
from lungseg import cli

make_small()
cli.main(["demo", "--out", sys.argv[1], "--store", sys.argv[1] + "/store"])
"""


def make_small() -> None:
    """Three scans and a network of a few weights: what is shown here is not what it learns."""
    demo.SCANS = 3
    tree = demo.demo_recipe().model_dump(mode="json")
    tree["data"]["split"] |= {"val": 0.3, "test": 0.3}
    tree["data"]["patch"]["shape_zyx"] = [16, 16, 16]
    tree["model"] |= {"width": 2, "depth": 2}
    tree["segment"] |= {"threshold": 0.9, "min_volume_mm3": 1000}  # else hundreds of specks are measured
    tree["train"] |= {"epochs": 4, "steps_per_epoch": 3, "global_batch": 2}
    demo.demo_recipe = lambda: parse_recipe(tree)


@pytest.fixture
def small() -> Iterator[None]:
    before = demo.SCANS, demo.demo_recipe
    make_small()
    yield
    demo.SCANS, demo.demo_recipe = before


def test_an_interrupted_demo_goes_on_and_a_second_one_reuses_everything(
    lungseg: Callable[..., str], small: None, ray_cluster: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    streams: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True, **streams)
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
    made = _state(tmp_path / "store" / "data") | _state(tmp_path / "dicom")

    table = lungseg("demo", "--out", tmp_path, "--store", tmp_path / "store")
    assert "whole scan" in table
    metrics = (tmp_path / "store/runs/demo/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert [(line["attempt"], line["epoch"]) for line in lines] == [(attempt, n) for n in (1, 2, 3, 4)]
    assert _state(tmp_path / "store" / "data") | _state(tmp_path / "dicom") == made

    everything = _state(tmp_path)
    again = lungseg("demo", "--out", tmp_path, "--store", tmp_path / "store")
    assert again.split("seconds:")[0] == table.split("seconds:")[0]
    assert _state(tmp_path) == everything


def _state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
