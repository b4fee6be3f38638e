"""NIfTI headers: read as nibabel and ITK read them where these agree, refused where they do not."""

from __future__ import annotations

import gzip
import logging

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.grids import turned
from helpers.headers import AXES, STEPS_MM, nifti
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.errors import LungsegError
from lungseg.scan.volume import Geometry, read_geometry, read_image

HU = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
NAN = np.nan


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("nibabel.global"), "disabled", True)


def ras(geometry: Geometry) -> np.ndarray:
    """The matrix that nibabel calls affine."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(geometry.direction_lps) * geometry.spacing_mm[::-1]
    matrix[:3, 3] = geometry.origin_lps_mm
    return np.diag([-1, -1, 1, 1]) @ matrix


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qform_code": 0},
        {"sform_code": 0},
        {"scl_slope": 2, "scl_inter": -1024},
        {"scl_slope": NAN, "scl_inter": NAN},
        {"scl_slope": 0, "scl_inter": 0},
        {"scl_slope": np.inf, "scl_inter": 0},
    ],
    ids=str,
)
def test_a_header_without_doubt_is_read_as_nibabel_and_itk_read_it(tmp_path, name, order, version, fields):
    path = nifti(tmp_path / name, HU, version=version, order=order, **fields)
    volume, theirs = read_image(path), nib.load(path)
    assert np.allclose(ras(volume.geometry), theirs.affine, atol=1e-4)
    assert np.array_equal(volume.volume_hu, np.asarray(theirs.dataobj).T)
    if version == 1:  # ITK does not know NIfTI-2
        image = sitk.ReadImage(str(path))
        assert np.array_equal(volume.volume_hu, sitk.GetArrayFromImage(image))
        last = image.TransformIndexToPhysicalPoint((3, 2, 1))
        assert volume.geometry.to_lps_mm((1, 2, 3)) == pytest.approx(last, abs=1e-4)


@given(
    st.tuples(*[st.floats(-180, 180)] * 3), st.booleans(), st.sampled_from(["qform_code", "sform_code", "x"])
)
@settings(max_examples=40, deadline=None)
def test_any_turned_or_mirrored_grid_is_where_nibabel_has_it(tmp_path_factory, angles_deg, mirrored, without):
    path = tmp_path_factory.mktemp("nifti") / "scan.nii"
    affine = np.eye(4)
    affine[:3, :3] = turned(angles_deg) * STEPS_MM * (1, 1, -1 if mirrored else 1)
    affine[:3, 3] = (-110.5, 40, 1200.25)
    image = nib.Nifti1Image(HU.T, affine)
    image.set_qform(affine, 1)
    image.header[without if without != "x" else "intent_code"] = 0
    nib.save(image, path)
    assert np.allclose(ras(read_geometry(path)), nib.load(path).affine, atol=1e-3)


@pytest.mark.parametrize(
    ("unit", "factor"), [(1, 1e-3), (3, 1e3), (0, 1), (10, 1)], ids=["metres", "microns", "unknown", "mm, s"]
)
def test_lengths_are_in_the_unit_that_the_header_names(tmp_path, unit, factor):
    scaled = {"pixdim": np.multiply(STEPS_MM, factor), "srow": AXES * factor, "qform_code": 0}
    path = nifti(tmp_path / "scan.nii", HU, xyzt_units=unit, **scaled)
    image, geometry = sitk.ReadImage(str(path)), read_geometry(path)
    assert geometry.spacing_mm == pytest.approx(STEPS_MM[::-1])
    assert geometry.spacing_mm[::-1] == pytest.approx(image.GetSpacing())
    assert geometry.origin_lps_mm == pytest.approx(image.GetOrigin())


SHEARED = AXES + np.array([[0, 0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"srow": AXES + np.array([0, 0, 0, 5])}, "header-ambiguous", "qform_code, sform_code"),
        ({"srow": AXES * [[-1, -1, -1, 1]]}, "header-ambiguous", "qform_code, sform_code"),
        ({"pixdim": (1, 1, 1), "qform_code": 0}, "header-ambiguous", "pixdim"),
        ({"pixdim": (0.7, 0.8, 2.6)}, "header-ambiguous", "pixdim"),
        ({"srow": SHEARED}, "gantry-tilt", "srow_x"),
        ({"srow": SHEARED, "qform_code": 0}, "gantry-tilt", "srow_x"),
        ({"srow": AXES * 0, "qform_code": 0}, "gantry-tilt", "srow_x"),
        ({"srow": AXES * NAN, "qform_code": 0}, "gantry-tilt", "srow_x"),
        ({"qform_code": 0, "sform_code": 0}, "orientation-missing", "qform_code, sform_code"),
        ({"quatern_b": 1.2, "sform_code": 0}, "header-ambiguous", "quatern_b"),
        ({"pixdim": (0.7, 0.8, 0)}, "spacing-implausible", "pixdim"),
        ({"pixdim": (-0.7, 0.8, 2.5)}, "spacing-implausible", "pixdim"),
        ({"pixdim": (0.7, NAN, 2.5)}, "spacing-implausible", "pixdim"),
        ({"pixdim": (7e-4, 8e-4, 2.5e-3), "srow": AXES / 1000}, "spacing-implausible", "pixdim"),
        ({"pixdim": (700, 800, 2500), "srow": AXES * 1000}, "spacing-implausible", "pixdim"),
        ({"xyzt_units": 1}, "spacing-implausible", "pixdim"),
        ({"xyzt_units": 7}, "header-ambiguous", "xyzt_units"),
        ({"scl_slope": 2, "scl_inter": NAN}, "header-ambiguous", "scl_inter"),
        ({"scl_slope": 1, "scl_inter": np.inf}, "header-ambiguous", "scl_inter"),
        ({"scl_slope": 0, "scl_inter": -1024}, "header-ambiguous", "scl_inter"),
        ({"scl_slope": NAN, "scl_inter": -1024}, "header-ambiguous", "scl_inter"),
        ({"vox_offset": 0}, "header-ambiguous", "vox_offset"),
        ({"magic": b"ni1"}, "image-unreadable", "NIfTI"),
        ({"datatype": 1536}, "image-unreadable", "1536"),
        ({"datatype": 128}, "image-not-scalar", "colours"),
    ],
    ids=str,
)
def test_a_header_that_readers_understand_differently_is_refused_by_its_field(tmp_path, fields, code, named):
    path = nifti(tmp_path / "scan.nii.gz", HU, **fields)
    with pytest.raises(LungsegError) as caught:
        read_image(path)
    assert caught.value.code == code
    assert named in str(caught.value)
    assert caught.value.where["file"] == path


def test_a_trailing_axis_of_one_is_no_fourth_one(tmp_path):
    path = nifti(tmp_path / "scan.nii", HU, dim=[4, 4, 3, 2, 1, 1, 1, 1])
    assert np.array_equal(read_image(path).volume_hu, HU)


def test_gzip_is_known_by_its_content_and_refused_within_gzip(tmp_path):
    path = nifti(tmp_path / "scan.nii.gz", HU)
    packed = path.read_bytes()
    (tmp_path / "named.nii").write_bytes(packed)
    assert np.array_equal(read_image(tmp_path / "named.nii").volume_hu, HU)
    path.write_bytes(gzip.decompress(packed))
    assert np.array_equal(read_image(path).volume_hu, HU)
    path.write_bytes(gzip.compress(packed))
    with pytest.raises(LungsegError, match=r"image-unreadable: gzip inside gzip.*gunzip"):
        read_image(path)
