"""report.html: one file that says what was found, with and without its viewer."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers.chests import BALL_MM, RECIPE, WALL_MM, chest, dense, geometry
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from lungseg.scan.volume import Volume
from lungseg.segment.outputs import report
from lungseg.segment.outputs.nifti import write
from lungseg.segment.outputs.scene import Scene
from lungseg.segment.predict import Segmentation, segment

SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
ORANGE = (255, 176, 0)
READY = re.compile(r"Nodule \d is shown\.")


@pytest.fixture(scope="module")
def scan() -> Volume:
    return chest(geometry())


@pytest.fixture(scope="module")
def found(scan: Volume) -> Segmentation:
    """A nodule in the patient's left lung, and one in front of both."""
    anywhere = RECIPE.segment.model_copy(update={"lungs_only": False})
    return segment(dense, scan, RECIPE.model_copy(update={"segment": anywhere}))


@pytest.fixture(scope="module")
def written(scan: Volume, found: Segmentation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "case"
    write(found, folder, scan="0011aabb", run="first", checkpoint="120-ab12", volume=scan)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "install a browser: apt-get install chromium"
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as started:
        yield started.chromium.launch(executable_path=chromium, args=flags)


def painted(page: Page, canvas: str) -> np.ndarray:
    """[y, x, rgb]"""
    return np.asarray(Image.open(io.BytesIO(page.locator(canvas).screenshot())).convert("RGB"))


def crosshair_column(pixels: np.ndarray) -> int:
    """Of the vertical line through the coronal slice above and the axial one below it, on the left."""
    red, _, blue = pixels[:, : pixels.shape[1] // 2].astype(int).transpose(2, 0, 1)
    return int((red - blue > 60).sum(axis=0).argmax())


@pytest.mark.slow
def test_the_viewer_shows_each_nodule_and_asks_nobody(
    written: Path, browser: Browser, found: Segmentation
) -> None:
    page = browser.new_page()
    page.set_default_timeout(120_000)
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(written.as_uri())
    state = page.locator("#state")
    expect(state).to_have_text("Nodule 1 is shown.", timeout=120_000)
    first = {canvas: painted(page, canvas) for canvas in ("#scan", "#close", "#surfaces")}
    for canvas, pixels in first.items():
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, f"{canvas} is blank"

    page.locator("#nodules tbody tr").nth(1).click()
    expect(state).to_have_text("Nodule 2 is shown.", timeout=120_000)
    second = {canvas: painted(page, canvas) for canvas in first}
    assert all((second[canvas] != pixels).any() for canvas, pixels in first.items())
    to_the_left_mm = found.nodules[0].centre_lps_mm[0] - found.nodules[1].centre_lps_mm[0]
    assert abs(to_the_left_mm) > 30
    further_right = crosshair_column(first["#scan"]) > crosshair_column(second["#scan"])
    assert further_right == (to_the_left_mm > 0), "the patient's left is on the right"
    page.locator("#nodules button").nth(0).focus()
    page.keyboard.press("Enter")
    expect(state).to_have_text("Nodule 1 is shown.", timeout=120_000)
    np.testing.assert_array_equal(painted(page, "#close"), first["#close"])
    page.locator("#close").focus()
    page.keyboard.press("PageUp")
    assert (painted(page, "#close") != first["#close"]).any()

    assert said == []
    assert asked == [written.as_uri()]
    page.close()


def test_it_says_the_same_without_webgl_on_a_narrow_screen_and_in_print(
    written: Path, browser: Browser, found: Segmentation
) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 700})
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(written.as_uri())
    expect(page.locator("#state")).to_contain_text("no WebGL 2", timeout=120_000)
    assert page.locator("#nodules tbody tr").count() == page.locator(".montage figure").count() == 2
    cells = page.locator("#nodules tbody tr").nth(0).locator("td").all_inner_texts()
    assert cells[2] == f"{found.nodules[0].longest_axial_diameter_mm:.1f}"
    width = page.locator("html").bounding_box()["width"]
    assert all(one.bounding_box()["width"] <= width for one in page.locator("body > *:visible").all())
    page.emulate_media(media="print")
    expect(page.locator(".viewer")).to_be_hidden()
    expect(page.locator("#nodules")).to_be_visible()
    page.close()


def test_pictures_show_the_nodule_with_its_outline_and_axes(found: Segmentation, scan: Volume) -> None:
    for nodule in found.nodules:
        picture = report._picture(Scene(found, scan), nodule)
        outline = np.array(
            [[float(v) for v in p.split()] for p in re.split("[MLZ]+", picture["outline"]) if p]
        )
        centre = outline.mean(axis=0)
        ends = np.array([[float(v) for v in p.split()] for p in re.split("[ML]+", picture["axes"]) if p])
        long_mm = np.linalg.norm(ends[0] - ends[1])
        assert long_mm == pytest.approx(nodule.longest_axial_diameter_mm, abs=0.02)
        np.testing.assert_allclose(ends[:2].mean(axis=0), centre, atol=0.7)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"]))))
        row, column = (centre[::-1] / (picture["height_mm"], picture["width_mm"]) * pixels.shape).astype(int)
        assert pixels[row, column] == 255, "the balls are as dense as metal"


def test_images_and_surfaces_of_the_viewer_lie_where_the_scan_has_them(
    found: Segmentation, scan: Volume
) -> None:
    scene = Scene(found, scan)
    for images, spacing_mm in ((scene.overview(10**7), (1.5,) * 3), (scene.close_up(0), (1.5, 1.3, 2.5))):
        image, labels = (
            nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(images[name])))
            for name in ("image", "labels")
        )
        np.testing.assert_allclose(image.header.get_zooms(), spacing_mm, atol=1e-5)
        np.testing.assert_array_equal(image.affine, labels.affine)
        hu, mask = image.get_fdata(), labels.get_fdata() > 0
        places = nibabel.affines.apply_affine(image.affine, np.argwhere(mask)) * (-1, -1, 1)
        apart = np.linalg.norm(places[:, None] - np.stack([BALL_MM, WALL_MM]), axis=-1).min(axis=1)
        assert apart.max() < 9, "a voxel of the scan is 2.5 mm long"
        assert hu.min() >= -1030
        assert np.median(hu[mask]) == 500, "the highest that is shown"
    content = gzip.decompress(base64.b64decode(scene.surface(0)))
    triangles, points = np.frombuffer(content, "<u4", 2, 4)
    corners = np.frombuffer(content, "<f4", 3 * points, 16 + 12 * triangles).reshape(-1, 3) * (-1, -1, 1)
    assert np.frombuffer(content, "<i4", 3 * triangles, 16).max() == points - 1
    measured = found.surfaces[0].points_lps_mm
    for of in (np.min, np.max, np.mean):
        np.testing.assert_allclose(of(corners, axis=0), of(measured, axis=0), atol=0.3)


def test_what_is_too_much_for_one_file_is_shown_coarser_or_in_the_table_alone(
    found: Segmentation, scan: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"scan": "s", "run": "r", "checkpoint": "c", "software": "l", "disclaimer": "d", "warnings": []}
    facts |= {"settings": {"threshold": 0.5}, "spacing_mm_zyx": [1, 1, 1]}
    whole = report.render(found, scan, facts)
    assert whole.count("<figure>\n  <svg") == 2
    least = len(whole) - len(Scene(found, scan).close_up(1)["image"])
    monkeypatch.setattr(report, "MOST_BYTES", least)
    page = report.render(found, scan, facts)
    assert len(page) <= least
    assert page.count("<tr data-nodule") == 2
    assert page.count("<figure>\n  <svg") < 2


def test_the_viewer_is_the_published_one_and_its_notices_are_shipped_with_it() -> None:
    viewer = files("lungseg.segment.outputs") / "viewer"
    content = (viewer / "niivue.umd.js").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256
    assert b"</script" not in content  # it would end there, inside the page
    notices = (viewer / "NOTICES.txt").read_text(encoding="utf-8")
    bundled = ("NiiVue 0.69.0", "gl-matrix", "nifti-reader-js", "zarrita", "numcodecs", "fflate", "Roboto")
    assert all(name in notices for name in bundled)
