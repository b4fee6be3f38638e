"""The page of an evaluation: one file that shows its figures and the nodules outlined worst."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluated import Evaluated, again, evaluate, must_not_be_asked, scans
from PIL import Image

from lungseg.dataset.stored_scans import StoredScan
from lungseg.evaluate.kept import Prediction, Turn
from lungseg.evaluate.scans import HeldOut


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return evaluate(tmp_path_factory.mktemp("known"), scans())


def test_the_page_needs_no_other_file_and_shows_charts_and_the_worst_nodules(known: Evaluated) -> None:
    page = known.result.text.with_suffix(".html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count('<svg class="chart"') == 3
    assert page.count("data:image/png;base64,") == 4
    assert page.index("c2, n1: 7.0 mm, Dice 0.0000") < page.index("c1, n1: 7.0 mm, Dice 0.6667")
    assert page.count('class="predicted" d="M') == 3  # of the missed one there is nothing to draw


def test_for_its_pictures_each_scan_is_looked_at_once_more(
    known: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, look = [], HeldOut.look

    def count(one: HeldOut, turn: Turn = nullcontext) -> tuple[StoredScan, Prediction]:
        looked.append(one.entry.case_id)
        return look(one, turn)

    monkeypatch.setattr(HeldOut, "look", count)
    again(known, must_not_be_asked)
    assert sorted(looked) == ["c0", "c0", "c1", "c1", "c2", "c2", "c3"]  # two of the four nodules are in c0


def test_the_page_shows_in_a_browser_without_an_error_or_any_other_file(
    known: Evaluated, tmp_path: Path
) -> None:
    """On a phone's width, where tables scroll in their own boxes and the page does not."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install a browser: apt-get install chromium"
    page, shot = known.result.text.with_suffix(".html"), tmp_path / "page.png"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,6000", f"--screenshot={shot}",
         page.resolve().as_uri()],
        check=True, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)|url\(|@import|<script', text)
    assert "little.</strong> Scans" in " ".join(text.split())
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    for colour in ((255, 176, 0), (255, 92, 168)):  # truth and prediction
        assert (pixels == colour).all(axis=1).sum() > 50
