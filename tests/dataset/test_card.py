"""The data card: figures that can be counted by hand, and pictures that show what training sees."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.painted import AXIAL, CONFIG, ball, quiet, write_pairs
from PIL import Image

from lungseg.dataset.card import (
    by_size,
    describe,
    histogram,
    picture,
    reader_agreement,
    render,
    summarize,
    write_card,
)
from lungseg.dataset.case import Exclusion, Nodule
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.prepare import prepare
from lungseg.dataset.shards import Patch
from lungseg.scan.volume import Geometry
from lungseg.storage import Store, open_store


def nodule(diameter_mm: float, reader_dice: float | None = None) -> Nodule:
    return Nodule("n", (0.0, 0.0, 0.0), diameter_mm, 3, reader_dice)


def test_histograms_count_every_value_in_bins_of_one_width() -> None:
    assert histogram([0.3, 0.1 + 0.2, 0.39, 0.61], 0.1) == [
        {"from": 0.3, "to": 0.4, "count": 3},
        {"from": 0.4, "to": 0.5, "count": 0},
        {"from": 0.5, "to": 0.6, "count": 0},
        {"from": 0.6, "to": 0.7, "count": 1},
    ]
    assert histogram([], 0.1) == []


def test_nodules_fall_into_the_fields_size_bins() -> None:
    sizes = by_size([nodule(mm) for mm in (3, 5.99, 6, 9.9, 10, 19, 20, 45)])
    assert sizes == {"< 6 mm": 2, "6-10 mm": 2, "10-20 mm": 2, ">= 20 mm": 2}


def test_reader_agreement_is_a_mean_over_nodules_that_have_one() -> None:
    found = reader_agreement([nodule(4, 0.5), nodule(5, 0.7), nodule(12, 0.9), nodule(30)])
    assert found["< 6 mm"] == {"nodules": 2, "dice": 0.6}
    assert found["10-20 mm"] == {"nodules": 1, "dice": 0.9}
    assert found[">= 20 mm"] == {"nodules": 0, "dice": None}
    assert found["all"] == {"nodules": 3, "dice": 0.7}


def test_a_picture_is_the_slice_with_most_of_the_nodule_and_its_outline_in_mm() -> None:
    grid = Geometry((24, 30, 40), (2.0, 1.0, 0.5), (0.0, 0.0, 0.0), AXIAL)
    mask = ball(grid, (9.0, 14.0, 20.0), 5)  # x, y, z in mm: slice 10, row 14, column 18
    hu = np.where(mask == 1, np.int16(150), np.int16(-1350))
    hu[10] += 75  # of a window of 1500 HU, so 12.75 of 255
    mask[:, :2, :2] = 255
    shown = picture(Patch(hu, mask, "c", "n1", "nodule", (0.0, 0.0, 0.0), grid.spacing_mm))
    assert (shown["width_mm"], shown["height_mm"]) == (20.0, 30.0)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["png"]))))
    np.testing.assert_array_equal(pixels, np.where(hu[10] > 0, 255, 13))
    points = np.array([[float(v) for v in p.split()] for p in re.split("[MLZ]+", shown["target"]) if p])
    # Pixel centres lie half a pixel from the corner from which the outline is measured.
    np.testing.assert_allclose(points.mean(axis=0), (9.25, 14.5), atol=0.1)
    np.testing.assert_allclose(np.linalg.norm(points - (9.25, 14.5), axis=1), 5, atol=0.6)
    assert shown["ignore"].count("M") == 1


@pytest.fixture(scope="module")
def carded(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    folder = tmp_path_factory.mktemp("card")
    thick = Exclusion("<b>3</b>", "slices-thick", "slices of 5 mm, thicker than 2.5 mm")
    store = open_store(folder / "store")
    cases = write_pairs(folder / "pairs", 8)
    return store, prepare(store, "d", cases, CONFIG, quiet, [thick])


def test_the_card_says_what_is_in_the_data_set_and_what_was_left_out(carded: tuple[Store, Manifest]) -> None:
    store, manifest = carded
    card = json.loads(store.get("data/d/card.json"))
    assert card["manifest_sha256"] == manifest.sha256
    assert card["splits"] == manifest.counts
    assert sum(counts["patients"] for counts in card["splits"].values()) == 4
    assert (card["patients_by"], card["doubts"]) == ("by patients.csv", [])
    assert card["excluded"]["codes"] == {"slices-thick": 1}
    assert card["slice_distance_mm"] == [{"from": 2.0, "to": 2.25, "count": 8}]
    assert card["pixel_mm"] == [{"from": 1.0, "to": 1.1, "count": 8}]
    counted = {split: sum(sizes.values()) for split, sizes in card["nodules_by_size"].items()}
    assert counted == {split: counts["nodules"] for split, counts in manifest.counts.items()}


def test_a_split_without_a_nodule_is_doubted_on_the_terminal_and_on_the_page(
    carded: tuple[Store, Manifest],
) -> None:
    manifest = carded[1]
    assert "warning" not in describe(manifest)
    silent = {s: counts | {"nodules": 0} for s, counts in manifest.counts.items()}
    silent["test"] = silent["test"] | {"scans": 0}
    found = replace(manifest, counts=silent)
    lines = describe(found).splitlines()[-2:]
    assert lines[0] == "warning: train holds no nodule: nothing can be learnt from it"
    assert lines[1] == "warning: val holds no nodule: it cannot choose the best epoch"
    page = render(summarize(found), [])
    assert "val holds no nodule" in page
    assert "Patients were told apart by patients.csv." in page


def test_a_card_is_written_again_only_for_another_manifest(carded: tuple[Store, Manifest]) -> None:
    store, manifest = carded
    page = store.get("data/d/card.html")
    store.put("data/d/card.html", b"")
    write_card(store, manifest)
    assert store.get("data/d/card.html") == b""
    store.delete(["data/d/card.json"])
    write_card(store, manifest)
    assert store.get("data/d/card.html") == page


def test_the_page_shows_in_a_browser_without_any_other_file(
    carded: tuple[Store, Manifest], tmp_path: Path
) -> None:
    """The real browser's own tree: what it made of the page, and whether it could paint it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install a browser: apt-get install chromium"
    page = tmp_path / "card.html"
    page.write_bytes(carded[0].get("data/d/card.html"))
    quiet = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    shot = tmp_path / "card.png"
    paint = [*quiet, "--window-size=1000,2400", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(paint, check=True, capture_output=True, timeout=100)
    dumped = subprocess.run(
        [*quiet, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=100
    )
    tree = dumped.stdout.decode()
    assert "<b>3</b>" not in tree
    assert html.escape("<b>3</b>") in tree
    pictures = re.findall(r"<svg[^>]*>.*?</svg>", tree, re.DOTALL)
    assert 1 <= len(pictures) <= 24
    assert all('class="target" d="M' in one for one in pictures)
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', tree)
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    outline = (pixels == (255, 176, 0)).all(axis=1).sum()
    assert outline > 5 * len(pictures), "no outline was painted"
