"""Crops of phantoms, parts of them, and whose contours they are made of."""

import numpy as np
import pytest
from scipy import ndimage

from lungseg.config import PairsConfig
from lungseg.errors import DataError
from lungseg.sources import pairs
from lungseg.sources.phantom import crops, synthesis
from lungseg.sources.phantom.anatomy import LUNG_HU, Lesion
from lungseg.sources.phantom.choose import CLEAR, CROPS, all_scans, choose
from lungseg.sources.phantom.crops import write_crops
from lungseg.sources.phantom.write import write_phantom

FLAT = np.sqrt(sum(side**2 for side in np.ogrid[-2:3, -3:4, -3:4])) <= 3


@pytest.mark.parametrize("hard", [False, True])
def test_a_window_shows_what_the_whole_shows_there_but_for_the_noise(monkeypatch, hard):
    for scanner in ("noisy", "reconstructed"):
        monkeypatch.setattr(synthesis, scanner, lambda hu, *_: hu)
    shape, spacing, ball = (24, 96, 96), (8.0, 3.5, 3.5), Lesion((10, 40, 20), FLAT, 5.0)
    far = Lesion((2, 60, 60), FLAT, 5.0)
    box = (slice(8, 16), slice(33, 57), slice(0, 40))
    phantom = synthesis.Phantom(shape, spacing, [ball, far], [3], hard)
    whole, part = phantom.image(), phantom.image(box)
    np.testing.assert_allclose(part, whole[box], atol=1e-2)


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    out = tmp_path_factory.mktemp("crops")
    write_crops(out, 3, 0)
    return out


def test_crops_hold_a_nodule_in_their_middle_for_prepare_pairs(cropped, monkeypatch):
    monkeypatch.setenv("LUNGSEG_CASE_KEY", "a key for this test")
    cases = pairs.find_cases(cropped, PairsConfig())
    assert len(cases) == 3
    for case in cases:
        assert case.patient_id.startswith("LIDC-IDRI-")
        scan = case.load()
        grid, (nodule,) = scan.volume.geometry, scan.nodules
        sides_mm = np.array(grid.shape_zyx) * grid.spacing_mm
        full = np.abs(sides_mm - crops.SIDE_MM) <= grid.spacing_mm  # the others end with the scan
        assert full.sum() >= 2
        assert (sides_mm[~full] < crops.SIDE_MM).all()
        middle = (np.array(grid.shape_zyx) - 1) / 2
        off_mm = np.abs(grid.to_index_zyx(nodule.centre_lps_mm) - middle) * grid.spacing_mm
        assert off_mm[full].max() < 4  # the centre of its voxels is not that of its box
        hu, mask = scan.volume.volume_hu, scan.numbers > 0
        ring = hu[ndimage.binary_dilation(mask, iterations=4) & ~mask]
        assert hu[mask].mean() > LUNG_HU + 100  # of ground glass too
        assert np.percentile(ring, 10) < hu[mask].mean() - 100  # lung, and perhaps wall beside it


def written_at(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}


def test_crops_go_on_where_they_were_and_are_not_mixed_with_others(cropped, tmp_path):
    before = written_at(cropped)
    done = []
    write_crops(cropped, 4, 0, lambda *counts: done.append(counts))
    assert (done[0], done[-1]) == ((0, 4), (4, 4))
    assert done == sorted(done)
    assert before.items() < written_at(cropped).items()
    for seed, without in ((1, []), (0, ["LIDC-IDRI-0001"])):
        with pytest.raises(DataError, match="phantom-folder-taken"):
            write_crops(cropped, 4, seed, without=without)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "real.nii.gz").touch()
    with pytest.raises(DataError, match="phantom-folder-taken"):
        write_crops(tmp_path, 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_contours_of_patients_that_are_left_out_are_not_taken(tmp_path):
    first, second = choose(2, 0)
    assert next(all_scans(0, CLEAR, [first.patient_id])).patient_id == second.patient_id
    with pytest.raises(DataError, match="phantom-patient-unknown"):
        next(all_scans(0, CROPS, ["LIDC-IDRI-1"]))
    (tmp_path / first.patient_id).mkdir()
    with pytest.raises(DataError, match="phantom-folder-taken"):
        write_phantom(tmp_path, 1, 0, without=[first.patient_id])
