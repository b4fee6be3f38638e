"""Every encoding that CT comes in gives the same HU; every other file gives an error of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from lungseg.errors import LungsegError
from lungseg.scan.dicom import read_series
from lungseg.scan.volume import Geometry
from lungseg.sources.phantom.write import write_series

SHIPPED = sorted(p for p in (Path(pydicom.__file__).parent / "data/test_files").rglob("*") if p.is_file())
AXES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
GEOMETRY = Geometry((4, 16, 20), (2.0, 0.75, 0.5), (-30.0, 12.0, -50.0), AXES)


def series(folder: Path) -> tuple[np.ndarray, list[Path]]:
    """Four slices; HU as smooth as a scan's, or a wrong prediction of a codec would not show."""
    z, y, x = np.indices(GEOMETRY.shape_zyx)
    hu = (400 * np.sin(x / 5) + 300 * np.cos(y / 3) - 50 * z).astype(np.int16)
    write_series(folder, hu, GEOMETRY, "1.2.3.4.5.6", "1.2.3.4.5.7", "nobody")
    return hu, sorted(folder.glob("*.dcm"))


def same(folder: Path, hu: np.ndarray) -> None:
    volume = read_series(folder)
    assert np.array_equal(volume.volume_hu, hu)
    assert volume.geometry.spacing_mm == pytest.approx(GEOMETRY.spacing_mm)
    assert volume.geometry.origin_lps_mm == pytest.approx(GEOMETRY.origin_lps_mm)


@pytest.mark.parametrize(
    "syntax", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]
)
def test_lossless_compression_gives_the_same_hu(tmp_path, syntax):
    hu, files = series(tmp_path / "series")
    for file in files:
        reader = gdcm.ImageReader()
        reader.SetFileName(str(file))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(file))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    assert pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID.is_compressed
    same(tmp_path / "series", hu)
    files[-1].write_bytes(files[-1].read_bytes()[:-60])
    with pytest.raises(LungsegError):
        read_series(tmp_path / "series")


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_encodings_give_the_same_hu(tmp_path, syntax):
    hu, files = series(tmp_path / "series")
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        options = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
        pydicom.dcmwrite(file, dataset, enforce_file_format=True, **options)
    same(tmp_path / "series", hu)


@pytest.mark.parametrize("implicit", [False, True])
def test_slices_without_preamble_and_file_meta_are_read(tmp_path, implicit):
    hu, files = series(tmp_path / "series")
    for file in files:
        dataset = pydicom.dcmread(file)
        del dataset.file_meta
        dataset.preamble = None
        file.unlink()
        pydicom.dcmwrite(file.with_suffix(""), dataset, implicit_vr=implicit, little_endian=True)
    same(tmp_path / "series", hu)


@pytest.mark.parametrize("signed", [0, 1])
def test_garbage_above_the_stored_bits_is_masked_and_padding_is_air(tmp_path, signed):
    hu, files = series(tmp_path / "series")
    for file in files:
        dataset = pydicom.dcmread(file)
        stored = np.frombuffer(dataset.PixelData, "<u2") & 0x0FFF | 0xA000
        stored[0] = 63536  # -2000: outside the stored bits, as scanners write it
        dataset.PixelData, dataset.PixelRepresentation = stored.tobytes(), signed
        dataset.BitsStored, dataset.HighBit, dataset.PhotometricInterpretation = 12, 11, "MONOCHROME1"
        dataset.add_new("PixelPaddingValue", "SS", -2000)
        dataset.save_as(file)
    hu[:, 0, 0] = -1024
    same(tmp_path / "series", hu)


@pytest.mark.parametrize(
    ("tag", "value"), [("ImagePositionPatient", ["nan", "0", "0"]), ("RescaleSlope", "0")]
)
def test_numbers_that_make_no_grid_or_no_hu_are_refused(tmp_path, tag, value):
    _, files = series(tmp_path / "series")
    dataset = pydicom.dcmread(files[1])
    dataset[tag].value = value
    dataset.save_as(files[1])
    with pytest.raises(LungsegError) as caught:
        read_series(tmp_path / "series")
    assert (caught.value.code, caught.value.where["file"]) == ("dicom-unreadable", "1-002.dcm")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_file_that_pydicom_ships_is_refused_with_an_error_of_ours(tmp_path, path):
    """None is a whole CT series: one file has no slice distance."""
    shutil.copy(path, tmp_path / path.name)
    with pytest.raises(LungsegError) as caught:
        read_series(tmp_path)
    assert caught.value.remedy
