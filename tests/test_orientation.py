"""A mark in a DICOM series comes back at its patient coordinate, however the series is stored.

Coordinates are checked against the headers alone, by the formula of the DICOM standard (PS3.3, C.7.6.2.1.1),
and the written mask by ITK: neither goes through our own geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813

from lungseg.config import PatchConfig, parse_recipe
from lungseg.dataset.case import LabelledScan, Nodule
from lungseg.dataset.cutting import cut_patches, to_grid
from lungseg.scan.dicom import read_series
from lungseg.scan.volume import Geometry, vector
from lungseg.segment.outputs.nifti import write
from lungseg.segment.predict import segment
from lungseg.sources.phantom.write import write_series

MARK_HU = 1000
RECIPE = parse_recipe({"segment": {"lungs_only": False, "window_zyx": [32, 32, 32], "min_volume_mm3": 0}})

C, S = np.cos(np.radians(20)), np.sin(np.radians(20))
SUPINE = np.eye(3)
PRONE = np.diag([-1.0, -1.0, 1.0])
FEET_FIRST = np.diag([-1.0, 1.0, -1.0])  # slices run to the feet
TURNED = np.array([[C, -S, 0], [S, C, 0], [0, 0, 1]])
OBLIQUE = TURNED @ np.array([[1, 0, 0], [0, C, -S], [0, S, C]])
CORONAL = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])

FINE, ODD, EVEN = (2.5, 0.6, 0.6), (1.3, 0.7, 0.9), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Stored:
    axes: np.ndarray
    spacing_mm: tuple[float, float, float]
    files: str = "in order"


SERIES = {
    "standard": Stored(SUPINE, EVEN),
    "fine pixels": Stored(SUPINE, FINE),
    "three spacings": Stored(SUPINE, ODD),
    "feet first": Stored(FEET_FIRST, FINE),
    "feet first, three spacings": Stored(FEET_FIRST, ODD),
    "prone": Stored(PRONE, ODD),
    "turned": Stored(TURNED, ODD),
    "oblique": Stored(OBLIQUE, FINE),
    "coronal": Stored(CORONAL, ODD),
    "files reversed": Stored(SUPINE, ODD, "reversed"),
    "files shuffled": Stored(SUPINE, FINE, "shuffled"),
    "feet first, files shuffled": Stored(FEET_FIRST, ODD, "shuffled"),
    "instance numbers shuffled": Stored(PRONE, ODD, "numbers shuffled"),
}


@pytest.fixture(params=SERIES, ids=lambda name: name.replace(" ", "-"))
def stored(request: pytest.FixtureRequest) -> Stored:
    return SERIES[request.param]


def marked_series(folder: Path, stored: Stored) -> tuple[np.ndarray, float]:
    """A series of air with one bright cube of 4 to 6 mm, away from every middle and every symmetry.

    Gives the cube's centre in LPS mm and half a voxel's largest side in mm.
    """
    shape = tuple(round(side / step) for side, step in zip((44, 38, 50), stored.spacing_mm, strict=True))
    middle = np.multiply((0.3, 0.35, 0.7), shape).astype(int)
    half = np.maximum(1, np.rint(2.4 / np.array(stored.spacing_mm)).astype(int))
    hu = np.full(shape, -1000, np.int16)
    hu[tuple(slice(m - h, m + h + 1) for m, h in zip(middle, half, strict=True))] = MARK_HU
    rows = [vector(row) for row in stored.axes]
    depth, height, width = shape
    geometry = Geometry(
        (depth, height, width), stored.spacing_mm, (-31.5, 17.25, -204.75), (rows[0], rows[1], rows[2])
    )
    rng = np.random.default_rng(2)
    order = list(range(depth))
    if stored.files == "reversed":
        order.reverse()
    elif stored.files == "shuffled":
        rng.shuffle(order)
    uids = ("2.25.11", "2.25.12")
    write_series(folder, hu, geometry, *uids, "phantom", file_order=order)
    if stored.files == "numbers shuffled":
        numbers = rng.permutation(depth) + 1
        for path, number in zip(sorted(folder.iterdir()), numbers, strict=True):
            dataset = pydicom.dcmread(path)
            dataset.InstanceNumber = int(number)
            dataset.save_as(path)
    return by_the_standard(folder), max(stored.spacing_mm) / 2


def by_the_standard(folder: Path) -> np.ndarray:
    """The mean patient coordinate of bright pixels, from each file's own header: equation C.7.6.2.1-1."""
    places = []
    for path in folder.glob("*.dcm"):
        dataset = pydicom.dcmread(path)
        between_rows, between_columns = map(float, dataset.PixelSpacing)
        along_row = np.array(dataset.ImageOrientationPatient[:3], float)
        along_column = np.array(dataset.ImageOrientationPatient[3:], float)
        corner = np.array(dataset.ImagePositionPatient, float)
        hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        for row, column in np.argwhere(hu == MARK_HU):
            places.append(corner + along_row * between_columns * column + along_column * between_rows * row)
    return np.mean(places, axis=0)


def threshold(hu: np.ndarray) -> np.ndarray:
    return (hu > 0).astype(np.float32)


def test_a_mark_goes_from_dicom_to_mask_at_the_same_patient_coordinate(
    stored: Stored, tmp_path: Path
) -> None:
    place, half_voxel_mm = marked_series(tmp_path / "series", stored)
    volume = read_series(tmp_path / "series")
    found = segment(threshold, volume, RECIPE)
    write(found, tmp_path / "out/case", scan="s", run="r", checkpoint="1")

    image = sitk.ReadImage(str(tmp_path / "out/case/mask.nii.gz"))
    indices_xyz = np.argwhere(sitk.GetArrayFromImage(image))[:, ::-1]
    assert len(indices_xyz)
    centre = np.mean([image.TransformIndexToPhysicalPoint(index) for index in indices_xyz.tolist()], axis=0)
    np.testing.assert_allclose(centre, place, atol=half_voxel_mm)
    # And every voxel of the mark is in the mask, but for a rim of one.
    marked = volume.volume_hu == MARK_HU
    mask = sitk.GetArrayFromImage(image) == 1
    assert (mask & marked).sum() >= 0.6 * marked.sum()
    (nodule,) = found.nodules
    np.testing.assert_allclose(nodule.centre_lps_mm, place, atol=half_voxel_mm)


def test_the_mask_lies_on_the_series_as_itk_reads_it(stored: Stored, tmp_path: Path) -> None:
    marked_series(tmp_path / "series", stored)
    found = segment(threshold, read_series(tmp_path / "series"), RECIPE)
    write(found, tmp_path / "out/case", scan="s", run="r", checkpoint="1")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    scan = reader.Execute()
    mask = sitk.ReadImage(str(tmp_path / "out/case/mask.nii.gz"))
    on_scan = sitk.Resample(mask, scan, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    assert sitk.GetArrayFromImage(on_scan).sum() == sitk.GetArrayFromImage(mask).sum()
    marked, masked = sitk.GetArrayFromImage(scan) == MARK_HU, sitk.GetArrayFromImage(on_scan) == 1
    assert 2 * (marked & masked).sum() / (marked.sum() + masked.sum()) > 0.75


def test_a_patch_around_the_mark_knows_where_it_lies(stored: Stored, tmp_path: Path) -> None:
    place, _ = marked_series(tmp_path / "series", stored)
    volume = read_series(tmp_path / "series")
    mask = (volume.volume_hu == MARK_HU).astype(np.int16)
    scan = LabelledScan(volume, mask, (Nodule("n1", vector(place), 5.0, 4),))
    on_grid = to_grid(scan, (1.0, 1.0, 1.0))
    config = PatchConfig(shape_zyx=(24, 20, 16), jitter=0.5)
    patches = [p for p in cut_patches("c", scan, on_grid, config) if p.stratum == "nodule"]
    assert len(patches) == 4
    axes = np.array(on_grid.volume.geometry.direction_lps)
    for patch in patches:
        assert patch.spacing_mm == (1.0, 1.0, 1.0)
        for bright in (patch.mask == 1, patch.image_hu > 0):
            # Voxel shape // 2 of a patch is its centre.
            offset_zyx = np.argwhere(bright).mean(axis=0) - np.floor_divide(config.shape_zyx, 2)
            seen = np.array(patch.centre_lps_mm) + axes @ offset_zyx[::-1]
            np.testing.assert_allclose(seen, place, atol=0.5)
