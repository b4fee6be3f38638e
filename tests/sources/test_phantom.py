import os
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy import ndimage

from lungseg.config import LidcConfig
from lungseg.errors import DataError
from lungseg.scan.dicom import read_series
from lungseg.scan.volume import Geometry
from lungseg.sources import pylidc_compat
from lungseg.sources.lidc import find_cases
from lungseg.sources.phantom import write as phantom
from lungseg.sources.phantom.anatomy import Chest, Lesion
from lungseg.sources.phantom.branches import vessels
from lungseg.sources.phantom.choose import HARD, choose
from lungseg.sources.phantom.scanner import reconstructed
from lungseg.sources.phantom.synthesis import Phantom
from lungseg.sources.phantom.write import write_phantom, write_series

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
FEET_FIRST = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
OBLIQUE = ((0.8, 0.0, -0.6), (0.0, 1.0, 0.0), (0.6, 0.0, 0.8))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom")
    done = []
    (folder,) = write_phantom(out, 1, 0, progress=lambda *counts: done.append(counts))
    assert done == [(0, 1), (1, 1)]
    return out, folder


@pytest.fixture(scope="module")
def labelled(written):
    (case,), exclusions = find_cases(written[0], LidcConfig())
    assert exclusions == []
    return case.load()


@pytest.fixture(scope="module")
def scan(written):
    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        yield session.query(pylidc.Scan).filter_by(series_instance_uid=written[1].name).one()


def small(seed, lesions=(), hard=False):
    return Phantom((24, 96, 96), (8.0, 3.5, 3.5), lesions, [seed], hard).image()


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def lungs_and_what_they_enclose(hu):
    """A rough lung region [z, y, x] by air that does not reach the image's border."""
    parts, _ = ndimage.label(hu[:, ::4, ::4] < -500)
    border = np.concatenate([np.ravel(side) for side in (parts[:, 0], parts[:, -1], parts[:, :, 0])])
    sizes = np.bincount(parts.ravel())
    sizes[np.unique(border)] = 0
    region = np.isin(parts, np.flatnonzero(sizes > 5000))
    region = ndimage.binary_fill_holes(ndimage.binary_closing(region, np.ones((3, 5, 5))))
    return ndimage.binary_erosion(region).repeat(4, axis=1).repeat(4, axis=2)


def test_pylidc_reads_the_series_as_if_it_were_real(written, scan, labelled, monkeypatch):
    out, folder = written
    monkeypatch.setattr(sys.modules["pylidc.Scan"], "_get_dicom_file_path_from_config_file", lambda: str(out))
    assert scan.get_path_to_dicom_files() == str(folder)
    volume = scan.to_volume(verbose=False)
    np.testing.assert_array_equal(np.moveaxis(volume, 2, 0), labelled.volume.volume_hu)
    images = scan.load_all_dicom_images(verbose=False)
    positions = [float(image.ImagePositionPatient[2]) for image in images]
    np.testing.assert_allclose(positions, scan.slice_zvals, atol=1e-3)
    assert {float(image.PixelSpacing[0]) for image in images} == {scan.pixel_spacing}
    for cluster in scan.cluster_annotations(verbose=False):
        assert min(annotation.texture for annotation in cluster) >= 4  # this scan's are solid
        mask, box, _ = sys.modules["pylidc.utils"].consensus(cluster, clevel=0.5, pad=8)
        near = ndimage.binary_dilation(mask, iterations=3)
        assert volume[box][mask].mean() > -100
        assert volume[box][~near].mean() < -600


def test_a_threshold_fails_on_vessels(labelled):
    hu, mask = labelled.volume.volume_hu, labelled.mask.astype(bool)
    lungs = lungs_and_what_they_enclose(hu)
    litres = lungs.sum() * np.prod(labelled.volume.geometry.spacing_mm) / 1e6
    assert 2.5 < litres < 7
    assert (mask & lungs).sum() > 0.95 * mask.sum()
    for threshold_hu in (-600, -400, -200):
        bright = (hu > threshold_hu) & lungs
        assert bright.sum() > 10 * mask.sum()
        assert 2 * (bright & mask).sum() / (bright.sum() + mask.sum()) < 0.3


def test_every_slice_is_a_valid_ct_image_that_says_it_is_synthetic(written, labelled):
    files = sorted(written[1].iterdir())
    assert len(files) == labelled.volume.geometry.shape_zyx[0]
    instances = set()
    for path in files[:3]:
        dataset = pydicom.dcmread(path)
        for element in dataset:
            for value in element.value if element.VM > 1 else [element.value]:
                if element.VR not in ("DS", "IS", "US"):  # read as numbers, which checks them
                    pydicom.valuerep.validate_value(element.VR, value, pydicom.config.RAISE)
        assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset.SOPClassUID == pydicom.uid.CTImageStorage
        assert (dataset.Modality, dataset.RescaleSlope, dataset.RescaleIntercept) == ("CT", 1, -1024)
        assert (dataset.Rows, dataset.Columns, dataset.KVP) == (512, 512, 120)
        assert len(dataset.PixelData) == 512 * 512 * 2
        assert dataset.PatientName == "SYNTHETIC^PHANTOM"
        for keyword in ("Manufacturer", "StudyDescription", "SeriesDescription", "ImageComments"):
            assert "not a patient" in dataset[keyword].value
        assert "seed 0" in dataset.ImageComments
        instances.add(dataset.SOPInstanceUID)
    assert len(instances) == 3


def test_a_second_run_keeps_the_series_and_another_version_is_not_mixed_in(written, monkeypatch):
    out, folder = written
    before = files_below(out)
    assert write_phantom(out, 1, 0) == [folder]
    assert files_below(out) == before
    monkeypatch.setattr(phantom, "VERSION", phantom.VERSION + 1)
    with pytest.raises(DataError, match="phantom-folder-taken") as caught:
        write_phantom(out, 1, 0)
    assert folder.name not in str(caught.value)  # a UID
    assert files_below(out) == before


@pytest.mark.slow
def test_of_several_scans_made_side_by_side_each_has_the_bytes_that_it_has_alone(written, tmp_path):
    done = []
    folders = write_phantom(tmp_path, 2, 0, progress=lambda *counts: done.append(counts))
    assert done == [(0, 2), (1, 2), (2, 2)]
    assert [folder.name for folder in folders] == [scan.series_uid for scan in choose(2, 0)]
    alone = {path.name: path.read_bytes() for path in written[1].iterdir()}
    assert {path.name: path.read_bytes() for path in folders[0].iterdir()} == alone


def test_scans_are_chosen_by_the_seed_and_fewer_are_the_beginning_of_more():
    chosen = [list(choose(count, seed)) for count, seed in ((2, 0), (4, 0), (4, 1))]
    names = [[scan.patient_id for scan in scans] for scans in chosen]
    assert names[0] == names[1][:2]
    assert names[1] != names[2]
    for scan in chosen[1] + chosen[2]:
        assert 90 <= len(scan.zvals_mm) <= 180
        assert any(mark.readers >= 3 and 10 <= mark.mean_reader_diameter_mm <= 30 for mark in scan.marks)
    assert all(len(set(patients)) == len(patients) for patients in names)


def test_pixels_are_a_function_of_the_seed():
    first = small(3)
    np.testing.assert_array_equal(first, small(3))
    assert (first != small(4)).mean() > 0.5


def test_lesions_show_the_density_of_their_texture_with_soft_edges():
    ball = np.hypot(*np.ogrid[-4:5, -4:5])[None] < 4
    mask = np.repeat(ball, 3, axis=0)
    means = {}
    for texture in (1.0, 3.0, 5.0):
        hu = small(1, [Lesion((10, 40, 20), mask, texture)])[10:13, 40:49, 20:29]
        means[texture] = hu[1, 3:6, 3:6].mean()
    assert -700 < means[1.0] < -350
    assert -40 < means[5.0] < 100
    assert means[1.0] < means[3.0] < means[5.0] + 40
    # Half the contrast at the mask's border: between its outermost voxel and the next.
    row = small(1, [Lesion((10, 40, 20), mask, 5.0)])[11, 44, 15:34].astype(float)
    drawn = np.flatnonzero(mask[1, 4]) + 5
    assert row[drawn].min() > -420 > max(row[drawn[0] - 2], row[drawn[-1] + 2])


def test_vessels_do_not_make_all_of_the_lung_bright():
    hu = small(0)
    assert 0.05 < (hu < -700).mean() < 0.6
    assert hu.dtype == np.int16
    assert hu.min() >= -1024


@pytest.mark.parametrize("direction", [AXIAL, FEET_FIRST, OBLIQUE])
@pytest.mark.parametrize("file_order", [None, [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_a_marked_voxel_keeps_its_patient_coordinate_for_our_reader_and_itks(tmp_path, direction, file_order):
    geometry = Geometry((5, 7, 9), (2.5, 0.7, 0.9), (10.0, -20.0, 33.25), direction)
    hu = np.full(geometry.shape_zyx, -1000, np.int16)
    hu[3, 1, 6] = 1234
    write_series(tmp_path / "s", hu, geometry, "1.2.3", "1.2", "P", file_order=file_order)
    third = pydicom.dcmread(tmp_path / "s" / "1-003.dcm")
    index = 2 if file_order is None else file_order[2]
    np.testing.assert_allclose(third.ImagePositionPatient, geometry.to_lps_mm((index, 0, 0)), atol=1e-6)
    assert third.InstanceNumber == 3
    expected = geometry.to_lps_mm((3, 1, 6))
    ours = read_series(tmp_path / "s")
    index = np.unravel_index(ours.volume_hu.argmax(), ours.volume_hu.shape)
    np.testing.assert_allclose(ours.geometry.to_lps_mm(index), expected, atol=1e-6)
    assert ours.volume_hu.max() == 1234
    itk = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    z, y, x = np.unravel_index(sitk.GetArrayViewFromImage(itk).argmax(), geometry.shape_zyx)
    point = itk.TransformIndexToPhysicalPoint((int(x), int(y), int(z)))
    np.testing.assert_allclose(point, expected, atol=1e-3)


def test_an_interrupted_write_leaves_no_series_and_the_next_one_is_whole(tmp_path, monkeypatch):
    geometry = Geometry((3, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), AXIAL)
    hu = np.zeros((3, 4, 4), np.int16)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_series(tmp_path / "s", hu, geometry, "1.2.3", "1.2", "P")
    assert not (tmp_path / "s").exists()
    write_series(tmp_path / "s", hu, geometry, "1.2.3", "1.2", "P")
    assert len(list((tmp_path / "s").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


BALL = np.sqrt(sum(side**2 for side in np.ogrid[-3:4, -3:4, -3:4])) <= 3  # 6 mm at 1 mm


def in_the_wall(hard):
    """A chest with a lesion 5 mm deep in its wall, and the way from the lung to it: mm, innermost first."""
    shape, spacing = (300, 340, 340), (1.0, 1.0, 1.0)
    z, x = 150.0, -float(Chest(shape, spacing, [], np.random.default_rng(0)).half_x) - 5
    corner = np.rint(np.array([z, shape[1] / 2, shape[2] / 2 + x])).astype(int) - 3
    chest = Chest(shape, spacing, [Lesion(tuple(corner), BALL, 5.0)], np.random.default_rng(0), hard)
    way = chest.lesions_mm[0] + np.arange(12, -13, -1)[:, None] * np.array([0, 0, 1.0])
    return chest, [chest.depth(point) for point in way]


def test_a_lesion_in_the_wall_has_lung_around_it_and_in_a_hard_phantom_hangs_on_the_wall():
    _, depths = in_the_wall(hard=False)
    assert min(depths[6:19]) > 0  # 6 mm and more on both sides
    chest, depths = in_the_wall(hard=True)
    assert min(depths[:10]) > 0  # lung up to the lesion's inner side
    assert max(depths[16:]) < 0  # and wall from its outer side on
    assert len(chest.pocket_radii) > 6  # other bays hold nothing


def test_arteries_end_in_the_lesions_that_they_feed():
    chest = Chest((300, 340, 340), (1.0, 1.0, 1.0), [], np.random.default_rng(0))
    fed = np.array([[150.0, 20.0, 70.0], [180.0, -10.0, -60.0]])
    tubes = list(vessels(chest.hila_mm, chest.points_in_lung, np.random.default_rng(0), fed))
    for point in fed:
        ends = [tube for tube in tubes if np.allclose(tube.end_mm, point)]
        assert [tube.radius >= 1.2 for tube in ends] == [True]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thickness_mm", [1.0, 4.0])
def test_a_kernels_noise_is_as_strong_as_it_says_and_moves_no_mean(seed, thickness_mm):
    draws = np.random.default_rng(seed)
    sharpness = draws.uniform()
    sigma_hu = draws.uniform(0.8, 1.2) * (12 + 45 * sharpness) / np.sqrt(thickness_mm)
    flat = np.full((4, 128, 126), -700, np.float32)
    seen = reconstructed(flat, (thickness_mm, 0.7, 0.6), np.random.default_rng(seed))
    assert seen.std() == pytest.approx(sigma_hu, rel=0.05)
    assert seen.mean() == pytest.approx(-700, abs=0.5)


def test_hard_phantoms_have_small_nodules_and_thick_slices_too():
    scans = list(choose(24, 0, HARD))
    thickness = [scan.geometry.spacing_mm[0] for scan in scans]
    assert max(thickness) > 2.5 > 1.5 > min(thickness)
    largest = [max(m.mean_reader_diameter_mm for m in scan.marks if m.readers >= 3) for scan in scans]
    assert min(largest) < 7
    assert max(largest) > 15


def test_a_hard_phantom_is_another_one_and_not_mixed_with_clear_ones(written, monkeypatch):
    assert (small(3) != small(3, hard=True)).mean() > 0.5
    chosen = list(choose(1, 0))
    monkeypatch.setattr(phantom, "choose", lambda *_: chosen)
    with pytest.raises(DataError, match="phantom-folder-taken"):
        write_phantom(written[0], 1, 0, hard=True)


@pytest.mark.parametrize(("scans", "seed"), [(0, 0), (1, -1)])
def test_impossible_arguments_are_refused_before_anything_is_written(tmp_path, scans, seed):
    with pytest.raises(DataError, match="phantom-arguments"):
        write_phantom(tmp_path / "out", scans, seed)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match=r"phantom-unwritable \(folder=.*out\)"):
        write_phantom(tmp_path / "out", 1, 0)
