"""From a scan on disk to its mask and nodules, on the scan's own grid."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.chests import BALL_MM, RECIPE, WALL_MM, chest, dense, geometry

from lungseg.config import Recipe, SegmentConfig
from lungseg.errors import DataError
from lungseg.scan.dicom import read_series
from lungseg.scan.volume import Volume, read_geometry, read_labels
from lungseg.segment.outputs.nifti import write
from lungseg.segment.predict import Segmentation, segment


def test_a_ball_comes_back_at_its_patient_coordinate_and_size() -> None:
    volume = chest(geometry())
    calls: list[tuple[int, int]] = []

    found = segment(dense, volume, RECIPE, lambda done, of: calls.append((done, of)))

    assert found.lungs is not None
    assert found.warnings == ()
    assert found.geometry == volume.geometry
    assert found.labels.shape == volume.volume_hu.shape
    assert len(np.unique(found.labels)) == 2
    assert found.nodules[0].confidence == pytest.approx(1, abs=0.05)
    assert found.nodules[0].side == "left"
    (ball,) = found.nodules  # the one in the chest wall lies outside the lungs
    assert ball.centre_lps_mm == pytest.approx(tuple(BALL_MM), abs=0.3)
    assert ball.equivalent_diameter_mm == pytest.approx(12, abs=0.6)
    place = volume.geometry.to_lps_mm(np.stack(np.indices(volume.volume_hu.shape), axis=-1))
    truth = np.linalg.norm(place - BALL_MM, axis=-1) < 6
    overlap = 2 * np.count_nonzero(truth & (found.labels == 1)) / (truth.sum() + (found.labels == 1).sum())
    assert overlap > 0.9
    assert calls[-1][0] == calls[-1][1] > 0


def test_a_scan_without_lungs_is_searched_everywhere_and_says_so() -> None:
    found = segment(dense, chest(geometry(), lungs=False), RECIPE)
    assert found.lungs is None
    assert found.warnings == ("no lungs were found, so the whole scan was searched: is it a chest CT?",)
    centres = sorted(nodule.centre_lps_mm for nodule in found.nodules)
    assert centres == [pytest.approx(tuple(place), abs=0.4) for place in (WALL_MM, BALL_MM)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (1, 40, 40), (5, 9, 17)])
def test_very_small_scans_are_segmented_too(shape: tuple[int, int, int]) -> None:
    grid = geometry(shape)
    found = segment(np.ones_like, Volume(np.zeros(shape, np.int16), grid), Recipe())
    assert found.labels.shape == shape
    assert found.lungs is None
    big_enough = math.prod(shape) * math.prod(grid.spacing_mm) >= 14
    assert [nodule.voxels for nodule in found.nodules] == [math.prod(shape)] * big_enough


def test_results_hold_the_mask_on_the_scans_grid_and_the_nodules(tmp_path: Path) -> None:
    volume = chest(geometry())
    found = segment(dense, volume, RECIPE)

    write(found, tmp_path / "out/case", scan="0011aabb", run="first", checkpoint="120-ab12")

    names = ["lungs.nii.gz", "mask.nii.gz", "nodules.json", "nodules.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out/case").iterdir()) == names
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["case"]
    mask, grid = read_labels(tmp_path / "out/case/mask.nii.gz")
    np.testing.assert_array_equal(mask, found.labels > 0)
    labels, label_grid = read_labels(tmp_path / "out/case/nodules.nii.gz")
    np.testing.assert_array_equal(labels, found.labels)
    assert label_grid == grid
    lungs, lung_grid = read_labels(tmp_path / "out/case/lungs.nii.gz")
    np.testing.assert_array_equal(lungs, found.lungs)
    assert lung_grid.spacing_mm == pytest.approx((1, 1, 1))
    assert grid.shape_zyx == volume.geometry.shape_zyx
    for key in ("spacing_mm", "origin_lps_mm", "direction_lps"):
        np.testing.assert_allclose(getattr(grid, key), getattr(volume.geometry, key), atol=1e-4)

    said = json.loads((tmp_path / "out/case/nodules.json").read_text())
    assert said["disclaimer"].startswith("research use only")
    assert [said[key] for key in ("scan", "run", "checkpoint")] == ["0011aabb", "first", "120-ab12"]
    assert said["settings"] == RECIPE.segment.model_dump(mode="json")
    assert said["working_spacing_mm_zyx"] == [1, 1, 1]
    assert said["spacing_mm_zyx"] == [2.5, 1.3, 1.5]
    assert said["lungs_found"] is True
    assert [nodule["label"] for nodule in said["nodules"]] == [1]
    assert said["nodules"][0]["centre_lps_mm"] == pytest.approx(BALL_MM.tolist(), abs=0.3)


def test_values_that_are_no_hu_are_warned_of_in_the_result(tmp_path: Path) -> None:
    volume = replace(chest(geometry()), not_hu="the lowest is 24")
    write(segment(dense, volume, RECIPE), tmp_path / "case", scan="s", run="r", checkpoint="1")
    said = json.loads((tmp_path / "case/nodules.json").read_text())
    assert said["warnings"] == ["the values are probably no HU: the lowest is 24"]


def tiny(value: int) -> Segmentation:
    grid = geometry((2, 2, 2))
    labels = np.full((2, 2, 2), value, np.int32)
    probability = np.full((2, 2, 2), 0.25, np.float32)
    return Segmentation(labels, grid, (), probability, grid, SegmentConfig(), None)


def test_earlier_results_are_replaced_and_foreign_folders_left_alone(tmp_path: Path) -> None:
    write(tiny(0), tmp_path / "case", scan="s", run="r", checkpoint="1")
    write(tiny(1), tmp_path / "case", scan="s", run="r", checkpoint="2")
    assert [path.name for path in tmp_path.iterdir()] == ["case"]
    assert read_labels(tmp_path / "case/mask.nii.gz")[0].all()
    assert json.loads((tmp_path / "case/nodules.json").read_text())["checkpoint"] == "2"

    for _ in range(2):
        with pytest.raises(DataError, match="output-of-another-scan"):
            write(tiny(0), tmp_path / "case", scan="another", run="r", checkpoint="3")
        said = json.loads((tmp_path / "case/nodules.json").read_text())
        assert said.pop("checkpoint") == "2"
        said = {"checkpoint": "2"}  # as versions wrote that did not say of which scan
        (tmp_path / "case/nodules.json").write_text(json.dumps(said))

    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/IMG0001.dcm").write_bytes(b"scan")
    with pytest.raises(DataError, match="output-foreign"):
        write(tiny(1), tmp_path / "scans", scan="s", run="r", checkpoint="2")
    assert (tmp_path / "scans/IMG0001.dcm").read_bytes() == b"scan"


def test_an_interrupted_write_leaves_nothing_and_keeps_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tiny(0), tmp_path / "case", scan="s", run="r", checkpoint="1")

    def interrupted(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lungseg.segment.outputs.nifti.write_mask", interrupted)
    for name in ("case", "other"):
        with pytest.raises(KeyboardInterrupt):
            write(tiny(1), tmp_path / name, scan="s", run="r", checkpoint="2")
    assert [path.name for path in tmp_path.iterdir()] == ["case"]
    assert json.loads((tmp_path / "case/nodules.json").read_text())["checkpoint"] == "1"


def test_a_result_that_cannot_take_its_place_leaves_the_earlier_one_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tiny(0), tmp_path / "case", scan="s", run="r", checkpoint="1")
    renamed: list[str] = []
    really = os.rename

    def rename(source: Path, target: Path) -> None:
        renamed.append(source.name)
        if len(renamed) == 2:
            raise OSError("Permission denied")
        really(source, target)

    monkeypatch.setattr("lungseg.segment.outputs.nifti.os.rename", rename)
    with pytest.raises(DataError, match="output-unwritable"):
        write(tiny(1), tmp_path / "case", scan="s", run="r", checkpoint="2")
    assert len(renamed) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["case"]
    assert json.loads((tmp_path / "case/nodules.json").read_text())["checkpoint"] == "1"


def test_the_probability_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    write(tiny(1), tmp_path / "case", scan="s", run="r", checkpoint="1", with_probability=True)
    image = sitk.ReadImage(str(tmp_path / "case/probability.nii.gz"))
    assert sitk.GetArrayFromImage(image).dtype == np.float32
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), 0.25)
    assert read_geometry(tmp_path / "case/probability.nii.gz").shape_zyx == (2, 2, 2)


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="output-unwritable"):
        write(tiny(1), tmp_path / "file/case", scan="s", run="r", checkpoint="1")


def test_a_mask_of_a_real_dicom_series_lies_on_dense_tissue_in_its_lungs(real_data: Path) -> None:
    volume = read_series(real_data / "ct64")

    found = segment(lambda hu: (hu > -500).astype(np.float32), volume, RECIPE)

    assert found.lungs is not None
    inside = found.labels > 0
    assert inside.sum() > 100
    assert (volume.volume_hu[inside] > -700).mean() > 0.97
    assert (volume.volume_hu[inside[::-1]] > -700).mean() < 0.9  # upside down it would not fit
