"""CT slices written as DICOM by hand, so that each tag can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

from lungseg.errors import GeometryError, LungsegError
from lungseg.scan.dicom import read_series

AXIAL = (1, 0, 0, 0, 1, 0)
SERIES, OTHER = generate_uid(), generate_uid()
SECRETS = ("Doe^Jane", "MRN-4711", SERIES, OTHER)


def slice_of(hu: np.ndarray, position=(0.0, 0.0, 0.0), series=SERIES, **tags) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.Modality = "Doe^Jane", "MRN-4711", "CT"
    dataset.SeriesInstanceUID, dataset.ImageType = series, ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImagePositionPatient = [round(float(value), 6) for value in position]
    dataset.ImageOrientationPatient, dataset.PixelSpacing, dataset.SliceThickness = (
        list(AXIAL),
        [0.75, 0.5],
        7.0,
    )
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *hu.shape[-2:], 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = (hu + 1024).astype(np.int16).tobytes()
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    return dataset


def save(dataset: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def scan() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1500, (6, 4, 5)).astype(np.int16)


def write(folder: Path, change: Callable[[int, Dataset], None] | None = None, step=2.5) -> np.ndarray:
    """Six axial slices at z = -100, -97.5, …; `change` may edit each data set."""
    hu = scan()
    for number, image in enumerate(hu):
        dataset = slice_of(image, (-110.0, 30.0, -100.0 + step * number))
        if change:
            change(number, dataset)
        save(dataset, folder / f"{number}.dcm")
    return hu


def refused(folder: Path, error: type[LungsegError] = GeometryError) -> LungsegError:
    with pytest.raises(error) as caught:
        read_series(folder)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert caught.value.remedy
    return caught.value
