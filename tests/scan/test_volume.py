"""Volumes: every voxel keeps its patient coordinate through reading, writing and resampling."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.grids import AXES, geometry_of, turned
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.errors import DataError, GeometryError
from lungseg.scan.volume import SUFFIXES, read_geometry, read_image, read_labels, split_name, write_mask

angles = st.tuples(*[st.floats(-180, 180)] * 3)
indices = st.tuples(*[st.floats(-50, 50)] * 3)


@given(angles, indices)
def test_patient_coordinates_are_those_of_simpleitk_and_invert(angles_deg, index_zyx):
    geometry = geometry_of(direction=turned(angles_deg))
    image = sitk.Image(geometry.shape_zyx[::-1], sitk.sitkInt16)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_lps_mm)
    image.SetDirection(np.ravel(geometry.direction_lps).tolist())
    expected = image.TransformContinuousIndexToPhysicalPoint(index_zyx[::-1])
    assert geometry.to_lps_mm(index_zyx) == pytest.approx(expected, abs=1e-9)
    assert geometry.to_index_zyx(expected) == pytest.approx(index_zyx, abs=1e-9)


def test_coordinates_of_many_points_keep_their_shape():
    geometry = geometry_of()
    points = np.arange(24.0).reshape(2, 4, 3)
    assert geometry.to_lps_mm(points).shape == (2, 4, 3)
    assert geometry.to_lps_mm(points)[1, 2] == pytest.approx(geometry.to_lps_mm(points[1, 2]))


near_half_turns = st.tuples(*[st.sampled_from([-180.0, -90.0, 0.0, 90.0, 180.0])] * 3).flatmap(
    lambda base: st.tuples(*[st.floats(-0.5, 0.5).map(lambda by, at=at: at + by) for at in base])
)


@given(st.one_of(angles, near_half_turns))
@settings(max_examples=60, deadline=None)
def test_a_written_mask_comes_back_on_its_grid(tmp_path_factory, angles_deg):
    path = tmp_path_factory.mktemp("mask") / "mask.nii.gz"
    geometry = geometry_of(
        (3, 4, 5), (2.5, 0.703125, 0.8), (-310.123456, 280.98765, -1360.25632911), turned(angles_deg)
    )
    mask = (np.arange(60).reshape(3, 4, 5) % 3 == 0).astype(np.uint8)
    write_mask(path, mask, geometry)
    again, grid = read_labels(path)
    assert np.array_equal(again, mask)
    assert again.dtype == np.uint8
    assert grid.spacing_mm == pytest.approx(geometry.spacing_mm, abs=1e-6)
    far = np.array([[0, 0, 0], [400, 0, 0], [0, 511, 0], [0, 0, 511]])
    assert np.abs(grid.to_lps_mm(far) - geometry.to_lps_mm(far)).max() < 2e-3
    assert np.abs(grid.to_lps_mm(far[0]) - geometry.to_lps_mm(far[0])).max() < 1e-4


@pytest.mark.parametrize("axes", [*AXES, turned((12, -7, 30))])
def test_the_header_of_a_mask_says_where_a_viewer_shows_it(tmp_path, axes):
    path, geometry = tmp_path / "mask.nii.gz", geometry_of(direction=axes)
    write_mask(path, np.ones(geometry.shape_zyx, np.uint8), geometry)
    header = gzip.decompress(path.read_bytes())
    # The fields of nifti1.h: dim at byte 40, datatype at 70, sform_code at 254, srow at 280.
    assert struct.unpack_from("<8h", header, 40)[:4] == (3, 7, 6, 5)
    assert struct.unpack_from("<h", header, 70) == (2,)  # unsigned char
    assert struct.unpack_from("<h", header, 254)[0] > 0  # sform_code
    affine = np.reshape(struct.unpack_from("<12f", header, 280), (3, 4))
    index_zyx = np.array([4, 2, 3])
    ras = affine @ [*index_zyx[::-1], 1]
    assert ras == pytest.approx(geometry.to_lps_mm(index_zyx) * (-1, -1, 1), abs=1e-3)


def test_writing_leaves_only_the_mask_and_replaces_an_old_one(tmp_path):
    path, geometry = tmp_path / "mask.nii.gz", geometry_of()
    path.write_bytes(b"old")
    write_mask(path, np.ones(geometry.shape_zyx, bool), geometry)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.nii.gz"]
    assert read_labels(path)[0].all()


def test_a_mask_that_cannot_be_written_is_one_error_and_no_file(tmp_path):
    geometry = geometry_of()
    mask = np.ones(geometry.shape_zyx, np.uint8)
    for path, code in (
        (tmp_path / "absent" / "m.nii.gz", "mask-unwritable"),
        (tmp_path / "m.nii", "mask-suffix"),
    ):
        with pytest.raises(DataError) as caught:
            write_mask(path, mask, geometry)
        assert caught.value.code == code
    with pytest.raises(GeometryError):
        write_mask(tmp_path / "m.nii.gz", mask[1:], geometry)
    assert list(tmp_path.iterdir()) == []


@given(st.text(st.characters(categories=["L", "N"])), st.sampled_from(SUFFIXES), st.randoms())
def test_a_name_is_split_whatever_the_case_of_its_suffix(stem, suffix, random):
    shouted = "".join(random.choice((letter.upper(), letter)) for letter in suffix)
    assert split_name(stem + shouted) == (stem, suffix)
    assert split_name(f"{stem}{suffix}.txt") == (f"{stem}{suffix}.txt", "")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".NII.GZ", ".nii.GZ", ".Nii", ".NRRD", ".MHA", ".MHD"])
def test_images_of_any_type_are_read_as_rounded_int16(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.array([[[-0.6, 1.4], [40000.0, -1e9]]], np.float64))
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((1.0, 2.0, 3.0))
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(image, str(path.with_name(path.name.lower())))
    path.with_name(path.name.lower()).rename(path)
    volume = read_image(path)
    assert volume.volume_hu.dtype == np.int16
    assert volume.volume_hu.tolist() == [[[-1, 1], [32767, -32768]]]
    assert volume.geometry.spacing_mm == pytest.approx((3.0, 0.75, 0.5))
    assert volume.geometry.origin_lps_mm == pytest.approx((1.0, 2.0, 3.0))
    assert read_geometry(path) == volume.geometry
    sitk.WriteImage(sitk.Cast(sitk.Abs(image) > 1, sitk.sitkUInt8), str(tmp_path / "mask.mha"))
    assert read_labels(tmp_path / "mask.mha")[0].tolist() == [[[0, 1], [1, 1]]]


kinds = [
    np.uint8,
    np.int8,
    np.int16,
    np.uint16,
    np.int32,
    np.uint32,
    np.int64,
    np.uint64,
    np.float32,
    np.float64,
]


@pytest.mark.parametrize("kind", kinds)
def test_voxels_of_every_type_are_those_that_simpleitk_reads(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 127, (3, 4, 5)).astype(kind)
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    assert np.array_equal(read_image(path).volume_hu, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def test_labels_of_a_mask_are_whole_numbers_or_refused(tmp_path):
    path = tmp_path / "labels.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.array([[[0, 7, 512, 256]]], np.uint16)), str(path))
    assert read_labels(path)[0].tolist() == [[[0, 7, 512, 256]]]
    sitk.WriteImage(sitk.GetImageFromArray(np.array([[[0, 7.0001, 2]]], np.float32)), str(path))
    assert read_labels(path)[0].tolist() == [[[0, 7, 2]]]
    sitk.WriteImage(sitk.GetImageFromArray(np.array([[[0, 0.5, 1]]], np.float32)), str(path))
    with pytest.raises(DataError, match=r"mask-not-whole.*labels\.nrrd.*Remedy"):
        read_labels(path)


def written(folder: Path, array: np.ndarray, is_vector: bool = False) -> Path:
    path = folder / "scan.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=is_vector), str(path))
    return path


def test_images_that_are_no_3d_scan_are_refused(tmp_path):
    def code_of(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert caught.value.remedy
        return caught.value.code

    assert code_of(tmp_path / "absent.nii.gz") == "image-missing"
    assert code_of(written(tmp_path, np.zeros((2, 3, 4, 5), np.int16))) == "image-not-3d"
    assert code_of(written(tmp_path, np.zeros((4, 5), np.int16))) == "image-not-3d"
    assert code_of(written(tmp_path, np.zeros((3, 4, 5, 3), np.uint8), is_vector=True)) == "image-not-scalar"
    assert code_of(written(tmp_path, np.array([[[1.0, np.nan]]], np.float32))) == "image-not-finite"
    assert code_of(written(tmp_path, np.array([[[1.0, np.inf]]], np.float32))) == "image-not-finite"
    (tmp_path / "junk.nii.gz").write_bytes(b"not an image")
    assert code_of(tmp_path / "junk.nii.gz") == "image-unreadable"
    (tmp_path / "scan.mha").write_bytes(b"")
    assert code_of(tmp_path / "scan.mha") == "image-unreadable"


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_a_file_cut_short_is_refused(tmp_path, suffix, compressed):
    whole = tmp_path / f"whole{suffix}"
    noise = np.random.default_rng(0).integers(-1000, 1000, (20, 30, 40)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(whole), useCompression=compressed)
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        read_image(cut)
    assert caught.value.code == "image-unreadable"


def test_a_file_whose_content_is_elsewhere_says_how_to_fetch_it(tmp_path):
    annexed = tmp_path / "annexed.nii.gz"
    annexed.symlink_to(".git/annex/objects/xx/SHA256E-s1--00.nii.gz")
    with pytest.raises(DataError, match=r"image-missing: a link to \.git/annex.*git annex get"):
        read_image(annexed)
    for first in (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        b"/annex/objects/S\n",
    ):
        for suffix in SUFFIXES:
            pointer = tmp_path / f"scan{suffix}"
            pointer.write_bytes(first)
            with pytest.raises(DataError, match=r"image-unreadable: only a pointer.*git lfs pull"):
                read_image(pointer)
    linked = tmp_path / "linked.nii.gz"
    linked.symlink_to(written(tmp_path, np.zeros((2, 3, 4), np.int16)))
    assert read_image(linked).volume_hu.shape == (2, 3, 4)
