"""Pairs of images and masks: every pair is on one grid, and every component is a nodule."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lungseg.config import PairsConfig
from lungseg.errors import DataError, GeometryError, LungsegError
from lungseg.scan.identity import case_id, case_key
from lungseg.sources.pairs import PairCase, patient_of
from lungseg.sources.pairs import find_cases as find_cases_by

REAL = Path(__file__).parents[3] / "shared" / "data" / "lidc_crops"


def save(path: Path, array: np.ndarray, spacing_xyz=(0.5, 0.75, 2.0), origin=(-50.0, 20.0, 7.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_xyz)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))


def pair(
    folder: Path, stem: str, mask: np.ndarray | None = None, suffixes=(".nii.gz", ".nii.gz"), **grid
) -> None:
    mask = np.zeros((8, 9, 10), np.uint8) if mask is None else mask
    save(folder / "images" / f"{stem}{suffixes[0]}", np.full(mask.shape, -700, np.int16))
    save(folder / "masks" / f"{stem}{suffixes[1]}", mask, **grid)


def find_cases(folder: Path, **settings) -> list[PairCase]:
    return find_cases_by(folder, PairsConfig(**settings))


def code_of(folder: Path, error: type[LungsegError] = DataError) -> str:
    with pytest.raises(error) as caught:
        find_cases(folder)
    assert caught.value.remedy
    return caught.value.code


def test_pairs_are_matched_by_name_whatever_the_format(tmp_path):
    pair(tmp_path, "b_1")
    pair(tmp_path, "a.v2", suffixes=(".nrrd", ".nii"))
    (tmp_path / "images" / ".DS_Store").write_bytes(b"")
    (tmp_path / "masks" / "notes.txt").write_text("reader A")
    cases = find_cases(tmp_path)
    assert [case.image.name for case in cases] == ["a.v2.nrrd", "b_1.nii.gz"]
    assert [case.case_id for case in cases] == [case_id(name, case_key()) for name in ("a.v2", "b_1")]
    assert pickle.loads(pickle.dumps(cases)) == cases
    scan = cases[0].load()
    assert (scan.volume.volume_hu == -700).all()
    assert scan.nodules == ()
    assert scan.mask.dtype == scan.ignore.dtype == np.uint8


def test_every_format_is_read_in_any_case_of_letters_and_what_is_none_is_named(tmp_path, caplog):
    for number, suffix in enumerate((".nii.gz", ".mha", ".mhd", ".nrrd", ".nii")):
        pair(tmp_path, f"scan{number}", suffixes=(suffix, suffix))
    for kind in ("images", "masks"):
        (tmp_path / kind / "scan0.nii.gz").rename(tmp_path / kind / "scan0.NII.gz")
        (tmp_path / kind / "scan1.mha").rename(tmp_path / kind / "scan1.MHA")
    # One letter or two: macOS takes names apart.
    pair(tmp_path, "J\u00f6rg")
    (tmp_path / "masks" / "J\u00f6rg.nii.gz").rename(tmp_path / "masks" / "Jo\u0308rg.nii.gz")
    (tmp_path / "images" / "notes.docx").write_bytes(b"")
    (tmp_path / "masks" / "old.nii").mkdir()
    (tmp_path / "masks" / ".DS_Store").write_bytes(b"")
    cases = find_cases(tmp_path)
    assert len(cases) == 6
    assert all((case.load().volume.volume_hu == -700).all() for case in cases)
    assert caplog.messages == ["no images, and left out: images/notes.docx, masks/old.nii"]


def test_each_component_is_a_nodule_with_its_centre_and_the_diameter_of_a_ball(tmp_path):
    mask = np.zeros((20, 40, 60), np.uint16)
    z, y, x = np.indices(mask.shape)
    # A ball of 6 mm radius about voxel (10, 20, 30); its volume is 4/3 pi 6^3 = 904.8 mm3.
    mask[(2.0 * (z - 10)) ** 2 + (0.75 * (y - 20)) ** 2 + (0.5 * (x - 30)) ** 2 <= 36] = 3
    mask[1, 1, 1] = mask[2, 2, 2] = 7  # two voxels that meet at a corner are one nodule
    pair(tmp_path, "case", mask)
    scan = find_cases(tmp_path, label="any")[0].load()
    assert sorted(np.unique(scan.mask)) == [0, 1]
    assert not scan.ignore.any()
    small, ball = sorted(scan.nodules, key=lambda nodule: nodule.equivalent_diameter_mm)
    assert ball.equivalent_diameter_mm == pytest.approx(12, rel=0.03)
    assert ball.centre_lps_mm == pytest.approx((-50 + 30 * 0.5, 20 + 20 * 0.75, 7 + 10 * 2.0), abs=1e-4)
    assert small.equivalent_diameter_mm == pytest.approx((6 / math.pi * 2 * 0.75) ** (1 / 3))
    assert small.centre_lps_mm == pytest.approx((-49.25, 21.125, 10.0), abs=1e-4)
    assert {nodule.readers for nodule in scan.nodules} == {0}
    assert len({nodule.nodule_id for nodule in scan.nodules}) == 2


def test_nodules_of_a_label_map_stay_what_they_are_where_they_touch(tmp_path):
    """Label 4 lies in two parts and touches label 7; by a list of labels each part is a nodule."""
    mask = np.zeros((8, 9, 10), np.uint8)
    mask[2:4, 2:4, 2:4], mask[2:4, 2:4, 4:6], mask[6, 7, 8] = 4, 7, 4
    pair(tmp_path, "map", mask)
    (as_map,), (as_kinds,) = (find_cases(tmp_path, label=label) for label in ("any", [4, 7]))
    scan = as_map.load()
    assert [(one.nodule_id, int((scan.numbers == n).sum())) for n, one in enumerate(scan.nodules, 1)] == [
        ("4", 9),
        ("7", 8),
    ]
    ids = [one.nodule_id for one in as_kinds.load().nodules]
    assert sorted(name.partition(".")[0] for name in ids) == ["4", "4", "7"]
    assert len(set(ids)) == 3
    assert "7" in ids


def test_what_is_ignored_is_described_like_a_nodule(tmp_path):
    mask = np.zeros((8, 9, 10), np.uint8)
    mask[1, 1, 1], mask[4:6, 4:6, 4:6], mask[7, 8, 9] = 1, 255, 255
    pair(tmp_path, "case", mask)
    (case,) = find_cases(tmp_path)
    scan = case.load()
    assert sorted(np.unique(scan.numbers).tolist()) == [-2, -1, 0, 1]
    assert len(scan.nodules) == 1
    for number, region in enumerate(scan.regions, 1):
        middle = np.argwhere(scan.numbers == -number).mean(axis=0)
        assert region.centre_lps_mm == pytest.approx(tuple(scan.volume.geometry.to_lps_mm(middle)), abs=1e-4)


@pytest.mark.parametrize(
    ("stem", "patient"),
    [
        ("LIDC-IDRI-0001_nod1", "LIDC-IDRI-0001"),
        ("P07_scan2_left", "P07_scan2"),
        ("lung_001", "lung_001"),
        ("0003", "0003"),
        ("case", "case"),
    ],
)
def test_the_patient_of_a_name(stem, patient):
    assert patient_of(stem) == patient


def test_a_table_says_who_is_who(tmp_path):
    pair(tmp_path, "scan_1")
    pair(tmp_path, "scan_2")
    assert {case.patients_by for case in find_cases(tmp_path)} == {"by name; patients.csv changes it"}
    table = tmp_path / "patients.csv"
    table.write_text("name,patient\nscan_1,Anna\nscan_2,Anna\nscan_3,Otto\n", encoding="utf-8-sig")
    assert [case.patient_id for case in find_cases(tmp_path)] == ["Anna", "Anna"]
    assert {case.patients_by for case in find_cases(tmp_path)} == {"by patients.csv"}
    table.write_text("Patient; Name\nAnna ; scan_1\nanna;scan_2\n")  # of a spreadsheet, by hand
    assert [case.patient_id for case in find_cases(tmp_path)] == ["Anna", "Anna"]
    table.write_text("name,patient\nscan_1,Anna\nscan_2,Otto\nscan_1,Otto\n")
    assert code_of(tmp_path) == "patients-invalid"
    table.write_text("name,patient\nscan_1,Anna\n")
    assert code_of(tmp_path) == "patients-incomplete"
    for text in ("", "name,who\nscan_1,Anna\n", "name,patient\nscan_1,\nscan_2,Otto\n"):
        table.write_text(text)
        assert code_of(tmp_path) == "patients-invalid"
    table.write_bytes(b"name,patient\nscan_1,\xff\xfe\n")
    assert code_of(tmp_path) == "patients-invalid"


@pytest.mark.parametrize(
    "grid",
    [
        {"spacing_xyz": (0.5, 0.75, 2.1)},
        {"origin": (-50.0, 20.1, 7.0)},
        {"mask": np.zeros((8, 9, 11), np.uint8)},
    ],
)
def test_a_mask_on_another_grid_is_refused_and_both_grids_are_shown(tmp_path, grid):
    pair(tmp_path, "case")
    save(tmp_path / "masks" / "case.nii.gz", grid.pop("mask", np.zeros((8, 9, 10), np.uint8)), **grid)
    with pytest.raises(GeometryError) as caught:
        find_cases(tmp_path)
    assert caught.value.code == "grid-mismatch"
    for part in ("shape_zyx=", "spacing_mm=", "origin_lps_mm=", "direction_lps="):
        assert str(caught.value).count(part) == 2
    assert "tolerance_mm=0.01" in str(caught.value)


def test_a_mask_whose_axes_run_the_other_way_is_refused(tmp_path):
    pair(tmp_path, "case")
    flipped = sitk.ReadImage(str(tmp_path / "masks" / "case.nii.gz"))
    flipped.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(flipped, str(tmp_path / "masks" / "case.nii.gz"))
    assert code_of(tmp_path, GeometryError) == "grid-mismatch"


def test_folders_that_are_no_pairs_are_refused(tmp_path):
    assert code_of(tmp_path / "absent") == "folder-missing"
    (tmp_path / "images").mkdir()
    assert code_of(tmp_path) == "folder-missing"
    (tmp_path / "masks").mkdir()
    assert code_of(tmp_path) == "pairs-none"
    pair(tmp_path, "one")
    save(tmp_path / "masks" / "two.nrrd", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(DataError) as caught:
        find_cases(tmp_path)
    assert caught.value.code == "pair-unmatched"
    assert "two.nrrd" in str(caught.value)
    (tmp_path / "masks" / "two.nrrd").unlink()
    save(tmp_path / "images" / "one.nrrd", np.zeros((3, 3, 3), np.int16))
    assert code_of(tmp_path) == "pair-ambiguous"


def test_an_image_of_four_dimensions_is_refused_before_anything_is_loaded(tmp_path):
    pair(tmp_path, "case")
    image = sitk.GetImageFromArray(np.zeros((2, 8, 9, 10), np.int16), isVector=False)
    sitk.WriteImage(image, str(tmp_path / "images" / "case.nii.gz"))
    assert code_of(tmp_path) == "image-not-3d"


def test_real_lidc_nodules_go_through():
    if not REAL.is_dir():
        pytest.skip(
            "needs lidc_crops (LIDC-IDRI nodules as NIfTI pairs) in ../shared/data beside the checkout"
        )
    cases = find_cases(REAL)
    assert len(cases) == 94
    assert len({case.patient_id for case in cases}) == 94
    for case in cases[::10]:
        scan = case.load()
        assert scan.volume.volume_hu.shape == scan.mask.shape == (51, 51, 51)
        voxels = sum(math.pi / 6 * nodule.equivalent_diameter_mm**3 for nodule in scan.nodules)
        assert voxels == pytest.approx(int(scan.mask.sum()), rel=1e-4)  # spacing is 1 mm
