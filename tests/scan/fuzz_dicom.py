"""Seeded mutations of a DICOM series: the reader gives an error of ours, or what the files truly say.

CI runs 200 mutants (test_dicom_fuzz.py); more with
    python tests/scan/fuzz_dicom.py --mutants 10000 --seed 1

Oracle: pydicom reads each mutated file that the reader accepts; slices go by position along the normal of
their own orientation. A volume must hold those pixels at those places, with those spacings, and nothing
else: a mutation that no reader could see (another pixel, another intercept) changes the truth itself.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from lungseg.errors import LungsegError
from lungseg.scan.dicom import read_series
from lungseg.scan.series import BROKEN, find_series
from lungseg.scan.volume import Geometry
from lungseg.sources.phantom.write import write_series

AXES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
GEOMETRY = Geometry((5, 6, 7), (2.0, 0.75, 0.5), (-30.0, 12.0, -50.0), AXES)
TAGS = [
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "SOPClassUID",
    "Modality",
    "ImageType",
    "PhotometricInterpretation",
    "SamplesPerPixel",
    "InstanceNumber",
    "SliceThickness",
    "PixelData",
]
VALUES = (
    "",
    "0",
    "-1",
    "nan",
    "1e308",
    "1\\0\\0\\0\\1\\0",
    "0\\1\\0\\1\\0\\0",
    "-30\\12\\-47",
    "abc",
    "16",
    "12",
)
VRS = ("DS", "US", "SS", "LO", "UN", "OB", "IS", "FD")


def make_series(folder: Path, uid: str = "1.2.3.4.5.6") -> None:
    hu = np.random.default_rng(0).integers(-1000, 1500, GEOMETRY.shape_zyx).astype(np.int16)
    write_series(folder, hu, GEOMETRY, uid, "1.2.3.4.5.7", "nobody")


def _bytes(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    at, length = rng.randrange(len(content)), rng.choice((1, 2, 8, 64))
    match rng.choice(("flip", "cut", "insert", "duplicate", "zero", "drop")):
        case "flip":
            content[at] ^= 1 << rng.randrange(8)
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = rng.randbytes(length)
        case "duplicate":
            content[at:at] = content[at : at + length]
        case "zero":
            content[at : at + length] = bytes(len(content[at : at + length]))
        case "drop":
            del content[at : at + length]
    file.write_bytes(content)


def _tags(rng: random.Random, file: Path, other: Path) -> None:
    dataset, tag = pydicom.dcmread(file), rng.choice(TAGS)
    match rng.choice(("delete", "value", "vr", "swap")):
        case "delete":
            del dataset[tag]
        case "value":
            dataset.add_new(tag, "LO", rng.choice(VALUES))
        case "vr":
            dataset.add_new(tag, rng.choice(VRS), dataset[tag].value)
        case "swap":
            twin = pydicom.dcmread(other)
            dataset[tag], twin[tag] = twin[tag], dataset[tag]
            twin.save_as(other)
    dataset.save_as(file)


def _files(rng: random.Random, file: Path, stranger: Path) -> None:
    match rng.choice(("drop", "duplicate", "rename", "mix")):
        case "drop":
            file.unlink()
        case "duplicate":
            shutil.copy(file, file.with_name("copy.dcm"))
        case "rename":
            file.rename(file.with_name(rng.choice(("0", "z.dcm", "x.txt"))))
        case "mix":
            shutil.copy(rng.choice(sorted(stranger.glob("*.dcm"))), file.with_name("mixed.dcm"))


def mutate(rng: random.Random, folder: Path, stranger: Path) -> None:
    """One or two mutations; what pydicom itself refuses to read or write is none, and another is drawn."""
    left = rng.choice((1, 1, 2))
    while left:
        file, other = rng.sample(sorted(folder.iterdir()), 2)
        try:
            kind = rng.choice(("bytes", "tags", "files"))
            if kind == "bytes":
                _bytes(rng, file)
            elif kind == "tags":
                _tags(rng, file, other)
            else:
                _files(rng, file, stranger)
        except (InvalidDicomError, *BROKEN):
            continue
        left -= 1


def verdict(folder: Path) -> str:
    """The code of the error, or "volume"; AssertionError if the volume is not what the files say."""
    try:
        volume = read_series(folder)
    except LungsegError as error:
        return error.code
    (files,) = find_series(folder).values()
    truth = {}
    for file in files:
        dataset = pydicom.dcmread(file, force=True)
        dataset.file_meta.setdefault("TransferSyntaxUID", pydicom.uid.ExplicitVRLittleEndian)
        row, column = np.reshape(np.array(dataset.ImageOrientationPatient, float), (2, 3))
        position = np.array(dataset.ImagePositionPatient, float)
        scaled = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        hu = np.clip(np.rint(scaled), -32768, 32767)
        spacing = tuple(map(float, dataset.PixelSpacing))
        truth[round(float(position @ np.cross(row, column)), 2)] = (position, hu, spacing)
    assert len(truth) == len(volume.volume_hu), "slices lost or invented"
    for index, (_, (position, hu, spacing)) in enumerate(sorted(truth.items())):
        found = volume.geometry.to_lps_mm((index, 0, 0))
        assert np.allclose(found, position, atol=0.3), "a slice at the wrong place"
        assert np.allclose(volume.geometry.spacing_mm[1:], spacing, rtol=2e-3), "wrong pixel spacing"
        assert np.array_equal(volume.volume_hu[index], hu), "wrong HU"
    return "volume"


def fuzz(mutants: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each verdict came, and what went wrong, by the mutant's number."""
    counts: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original, stranger, folder = (Path(scratch) / name for name in ("original", "stranger", "mutant"))
        make_series(original)
        make_series(stranger, "1.2.3.4.5.8")
        for number in range(mutants):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder)
            mutate(random.Random(f"{seed}/{number}"), folder, stranger)
            try:
                counts[verdict(folder)] += 1
            except Exception as error:
                wrong.append(f"mutant {number}: {type(error).__name__}: {error}")
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    started = time.monotonic()
    found, failures = fuzz(given.mutants, given.seed)
    print(f"{given.mutants} mutants in {time.monotonic() - started:.0f} s: {dict(found.most_common())}")
    print(f"{len(failures)} wrong", *failures[:50], sep="\n")
    sys.exit(bool(failures))
