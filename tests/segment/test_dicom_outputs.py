"""DICOM Segmentation and Structured Report, read again by others: pydicom alone, dcmqi and dciodvfy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.ct_slices import SECRETS
from helpers.grids import turned
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.errors import DataError
from lungseg.scan.dicom import read_slices
from lungseg.scan.volume import Geometry, vector
from lungseg.segment.inputs import Input, find_inputs
from lungseg.segment.outputs.dicom import read_source, require_own, write
from lungseg.segment.predict import Segmentation
from lungseg.segment.quantify import quantify
from lungseg.sources.phantom.write import write_series

SUPINE, FEET_FIRST = np.eye(3), np.diag([-1.0, 1.0, -1.0])
SERIES = {
    "standard": (SUPINE, (1.0, 1.0, 1.0), False),
    "feet first": (FEET_FIRST, (2.5, 0.7, 0.7), False),
    "oblique": (turned((20, -15, 30)), (1.25, 0.8, 0.8), False),
    "files reversed": (SUPINE, (2.0, 0.6, 0.6), True),
    "three spacings": (turned((0, 0, 12)), (1.3, 0.7, 0.9), False),
}
KEY = b"k" * 16
SIZES = ((9, 6, 7), (6, 6, 6))  # mm along x, y, z


@pytest.fixture(params=SERIES, ids=lambda name: name.replace(" ", "-"), scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("dicom"), *SERIES[request.param])


class Found:
    """A series with two ellipsoids of tissue, segmented without a network, and what was written."""

    def __init__(
        self, folder: Path, axes: np.ndarray, spacing_mm: tuple[float, float, float], reverse: bool
    ) -> None:
        shape = tuple(round(side / step) for side, step in zip((26, 30, 34), spacing_mm, strict=True))
        rows = [vector(row) for row in axes]
        geometry = Geometry(shape, spacing_mm, (-31.5, 17.25, -204.75), (rows[0], rows[1], rows[2]))
        place = geometry.to_lps_mm(np.stack(np.indices(shape), axis=-1))
        soft = np.zeros(shape, np.float32)
        for at, size in zip(((0.4, 0.3, 0.3), (0.6, 0.7, 0.75)), SIZES, strict=True):
            off = (place - geometry.to_lps_mm(np.multiply(at, shape))) / (np.array(size) / 2)
            soft = np.maximum(soft, 1 / (1 + np.exp(5 * (np.linalg.norm(off, axis=-1) - 1)))).astype(
                np.float32
            )
        order = list(range(shape[0]))[:: -1 if reverse else 1]
        hu = (soft * 900 - 850).astype(np.int16)
        write_series(folder / "series", hu, geometry, "2.25.11", "2.25.12", SECRETS[1], file_order=order)
        (self.input,) = find_inputs(folder / "series", KEY)
        self.segmentation = segmented(self.input, soft)
        self.source = read_source(self.input)
        self.out = folder / "dicom"
        write(self.segmentation, self.source, self.out, run="first", checkpoint="120-ab12")


def segmented(one: Input, soft: np.ndarray, **settings: str) -> Segmentation:
    volume = read_slices(one.slices, one.path)
    config = SegmentConfig(**settings)
    labels, _ = ndimage.label(soft > 0.5)
    own, nodules, _ = quantify(labels, soft, volume.geometry, volume, config)
    return Segmentation(own, volume.geometry, tuple(nodules), soft, volume.geometry, config, None)


def tool(name: str) -> str:
    """One that a package of the environment brings, or the system."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert path, f"install {name}: apt-get install dicom3tools, or uv sync for dcmqi"
    return path


@cache
def problems(file: Path) -> list[str]:
    """What dciodvfy calls an error; it exits with 0 whatever it finds."""
    done = subprocess.run([tool("dciodvfy"), str(file)], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line.strip() for line in lines), "it said nothing, not even the IOD"
    return [line for line in lines if line.startswith("Error")]


def test_both_objects_are_valid(found: Found) -> None:
    for name in ("segmentation.dcm", "report.dcm"):
        assert problems(found.out / name) == []


def test_each_frame_lies_on_its_slice_and_holds_the_labels_voxels(found: Found) -> None:
    """Read by the standard (PS3.3, C.8.20) from the frames' own positions, by pydicom alone."""
    stored = pydicom.dcmread(found.out / "segmentation.dcm")
    assert (stored.Modality, stored.SegmentationType, stored.PatientID) == ("SEG", "BINARY", SECRETS[1])
    assert stored.FrameOfReferenceUID == found.source[0].FrameOfReferenceUID
    (shared,) = stored.SharedFunctionalGroupsSequence
    measures = shared.PixelMeasuresSequence[0]
    geometry, labels = found.segmentation.geometry, found.segmentation.labels
    np.testing.assert_allclose([float(v) for v in measures.PixelSpacing], geometry.spacing_mm[1:], rtol=1e-5)
    pixels = stored.pixel_array
    pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels
    again = np.zeros_like(labels)
    for frame, per_frame in zip(pixels, stored.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(per_frame.PlanePositionSequence[0].ImagePositionPatient, float)
        index = geometry.to_index_zyx(position)
        np.testing.assert_allclose(index, [round(index[0]), 0, 0], atol=1e-3)
        number = per_frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        (source,) = per_frame.DerivationImageSequence[0].SourceImageSequence
        assert source.ReferencedSOPInstanceUID == found.source[round(index[0])].SOPInstanceUID
        again[round(index[0])][frame > 0] = number
    np.testing.assert_array_equal(again, labels)


def test_segments_are_coded_nodules_of_the_lung_found_by_a_named_algorithm(found: Found) -> None:
    stored = pydicom.dcmread(found.out / "segmentation.dcm")
    assert "research use only" in stored.SeriesDescription
    for segment in stored.SegmentSequence:
        codes = [
            getattr(segment, f"{name}Sequence")[0].CodeValue
            for name in ("SegmentedPropertyCategoryCode", "SegmentedPropertyTypeCode", "AnatomicRegion")
        ]
        assert codes == ["49755003", "27925004", "39607008"]
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, segment.SegmentAlgorithmType) == ("lungseg", "AUTOMATIC")
        assert "120-ab12" in algorithm.AlgorithmParameters


def test_dcmqi_reads_the_same_voxels_at_the_same_place(found: Found, tmp_path: Path) -> None:
    command = [tool("segimage2itkimage"), "--inputDICOM", found.out / "segmentation.dcm"]
    subprocess.run([*command, "--outputDirectory", tmp_path, "-t", "nrrd"], check=True, capture_output=True)
    geometry, labels = found.segmentation.geometry, found.segmentation.labels
    for label in range(1, len(SIZES) + 1):
        (file,) = tmp_path.glob(f"*{label}.nrrd")
        image = sitk.ReadImage(str(file))
        inside = np.argwhere(sitk.GetArrayFromImage(image))[:, ::-1].tolist()
        places = np.array([image.TransformIndexToPhysicalPoint(index) for index in inside])
        indices = geometry.to_index_zyx(places)
        np.testing.assert_allclose(indices, np.rint(indices), atol=0.01)
        expected = np.argwhere(labels == label)
        assert sorted(np.rint(indices).astype(int).tolist()) == expected.tolist()


def test_dcmqi_reads_the_measurements_of_the_nodules(found: Found, tmp_path: Path) -> None:
    said = tid1500(found.out, tmp_path)
    assert (said["VerificationFlag"], said["observerContext"]["ObserverType"]) == ("UNVERIFIED", "DEVICE")
    segments = pydicom.dcmread(found.out / "segmentation.dcm")
    tracking = [one.TrackingUID for one in segments.SegmentSequence]
    for group, nodule in zip(said["Measurements"], found.segmentation.nodules, strict=True):
        assert group["segmentationSOPInstanceUID"] == segments.SOPInstanceUID
        assert (group["ReferencedSegment"], group["TrackingIdentifier"]) == (
            nodule.label,
            f"nodule {nodule.label}",
        )
        assert group["TrackingUniqueIdentifier"] == tracking[nodule.label - 1]
        assert group["Finding"]["CodeValue"] == "27925004"
        read = {
            (
                item["quantity"]["CodeValue"],
                item.get("derivationModifier", {}).get("CodeValue"),
                item["units"]["CodeValue"],
            ): float(item["value"])
            for item in group["measurementItems"]
        }
        assert read == pytest.approx(
            {
                ("118565006", None, "mm3"): nodule.volume_mm3,
                ("103339001", None, "mm"): nodule.longest_axial_diameter_mm,
                ("103340004", None, "mm"): nodule.perpendicular_axial_diameter_mm,
                ("81827009", "373098007", "mm"): nodule.mean_axial_diameter_mm,
                ("112031", "373098007", "[hnsf'U]"): nodule.mean_hu,
                ("112031", "386136009", "[hnsf'U]"): nodule.sd_hu,
            },
            abs=6e-4,
        )


def tid1500(folder: Path, scratch: Path) -> dict:
    said = scratch / "report.json"
    command = [tool("tid1500reader"), "--inputDICOM", folder / "report.dcm", "--outputMetadata", said]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(said.read_text())


@pytest.fixture
def plain(tmp_path: Path) -> Input:
    hu = np.full((4, 12, 12), -850, np.int16)
    geometry = Geometry((4, 12, 12), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), tuple(map(vector, np.eye(3))))
    write_series(tmp_path / "plain", hu, geometry, "2.25.21", "2.25.22", SECRETS[1])
    return find_inputs(tmp_path / "plain", KEY)[0]


def changed(one: Input, **tags: str | None) -> Input:
    for path in one.slices:
        dataset = pydicom.dcmread(path)
        for tag, value in tags.items():
            delattr(dataset, tag) if value is None else setattr(dataset, tag, value)
        dataset.save_as(path)
    return one


def test_without_nodules_there_is_a_report_alone_that_says_so(plain: Input, tmp_path: Path) -> None:
    empty = segmented(plain, np.zeros((4, 12, 12), np.float32))
    write(empty, read_source(plain), tmp_path / "out", run="r", checkpoint="1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.dcm"]
    assert problems(tmp_path / "out/report.dcm") == []
    codes = [
        str(one.value) for one in pydicom.dcmread(tmp_path / "out/report.dcm").iterall() if one.tag == 0x80100
    ]
    assert codes.count("2667000") == 1  # absent


def test_labels_can_share_frames_by_a_setting(plain: Input, tmp_path: Path) -> None:
    soft = np.zeros((4, 12, 12), np.float32)
    soft[1:3, 4:8, 4:8] = 1
    found = segmented(plain, soft, dicom_segmentation="labelmap")
    write(found, read_source(plain), tmp_path / "out", run="r", checkpoint="1")
    stored = pydicom.dcmread(tmp_path / "out/segmentation.dcm")
    assert stored.SegmentationType == "LABELMAP"
    assert np.count_nonzero(stored.pixel_array) == np.count_nonzero(found.labels) > 0


def test_tags_that_may_be_empty_are_filled_on_a_copy(plain: Input, tmp_path: Path) -> None:
    gone: Sequence[str] = (
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "ReferringPhysicianName",
        "StudyID",
    )
    for path in plain.slices:
        dataset = pydicom.dcmread(path)
        for tag in gone:
            if tag in dataset:
                delattr(dataset, tag)
        dataset.save_as(path)
    before = plain.slices[0].read_bytes()
    empty = segmented(plain, np.zeros((4, 12, 12), np.float32))
    write(empty, read_source(plain), tmp_path / "out", run="r", checkpoint="1")
    assert problems(tmp_path / "out/report.dcm") == []
    assert plain.slices[0].read_bytes() == before


def test_what_cannot_be_copied_is_refused_without_a_word_of_the_patient(plain: Input, tmp_path: Path) -> None:
    empty = segmented(plain, np.zeros((4, 12, 12), np.float32))
    changed(plain, PatientSex="SECRET")
    with pytest.raises(DataError, match="dicom-header-invalid") as caught:
        write(empty, read_source(plain), tmp_path / "out", run="r", checkpoint="1")
    assert "SECRET" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    changed(plain, FrameOfReferenceUID=None)
    with pytest.raises(DataError, match=r"tag-missing.*FrameOfReferenceUID"):
        read_source(plain)
    with pytest.raises(DataError, match="dicom-needed"):
        read_source(Input("c", "scan", tmp_path / "scan.nii"))


def test_no_warning_quotes_the_patients_name(
    plain: Input, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed(plain, PatientName="Single")  # which highdicom finds unlikely, and quotes
    empty = segmented(plain, np.zeros((4, 12, 12), np.float32))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        write(empty, read_source(plain), tmp_path / "out", run="r", checkpoint="1")
    assert not [one for one in heard if "Single" in str(one.message)]
    assert "Single" not in caplog.text


def test_a_folder_of_another_study_or_kind_is_left_alone(plain: Input, tmp_path: Path) -> None:
    source = read_source(plain)
    empty = segmented(plain, np.zeros((4, 12, 12), np.float32))
    for _ in range(2):
        write(empty, source, tmp_path / "out", run="r", checkpoint="1")
    source[0].StudyInstanceUID = "2.25.99"
    with pytest.raises(DataError, match="output-foreign"):
        require_own(tmp_path / "out", source)
    with pytest.raises(DataError, match="output-foreign"):
        require_own(tmp_path / "plain", source)
