"""Folders of the Medical Segmentation Decathlon and of nnU-Net, and what the values of their masks mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lungseg.config import PairsConfig
from lungseg.dataset.case import LabelledScan
from lungseg.errors import LungsegError
from lungseg.sources.pairs import find_cases

# As the Decathlon writes it for its lung task, and as nnU-Net wants it.
MSD = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "cancer"}, "numTraining": 2}
NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "nodule": 1, "ignore": 2},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}
SEVERAL = {**NNUNET, "labels": {"background": 0, "lung": 1, "nodule": 2, "vessel": 3, "ignore": 4}}


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def mask_of(*values: int) -> np.ndarray:
    """A mask with each value on a plane of its own, two voxels apart."""
    mask = np.zeros((2 * len(values) + 1, 4, 5), np.uint8)
    for number, value in enumerate(values):
        mask[2 * number] = value
    return mask


def dataset(folder: Path, described: Any, channel: str = "", *, mask: np.ndarray | None = None) -> Path:
    mask = mask_of(1) if mask is None else mask
    for name in ("lung_001", "lung_003"):
        save(folder / "imagesTr" / f"{name}{channel}.nii.gz", np.full(mask.shape, -700, np.int16))
        save(folder / "labelsTr" / f"{name}.nii.gz", mask)
    # The Decathlon's archives bring these along from a Mac.
    (folder / "imagesTr" / "._lung_001.nii.gz").write_bytes(b"\0")
    text = described if isinstance(described, str) else json.dumps(described)
    (folder / "dataset.json").write_text(text)
    return folder


def load(folder: Path, **settings: Any) -> LabelledScan:
    return find_cases(folder, PairsConfig(**settings))[0].load()


def planes(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask.any(axis=(1, 2))).tolist()


def refusal(folder: Path, **settings: Any) -> LungsegError:
    with pytest.raises(LungsegError) as caught:
        load(folder, **settings)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("described", "channel"), [(MSD, ""), (MSD, "_0000"), (NNUNET, "_0000"), (NNUNET, "")]
)
def test_both_layouts_are_read_as_they_are(tmp_path, described, channel):
    cases = find_cases(dataset(tmp_path, described, channel), PairsConfig())
    assert [case.image.name for case in cases] == [f"lung_00{n}{channel}.nii.gz" for n in (1, 3)]
    assert [case.mask.name for case in cases] == ["lung_001.nii.gz", "lung_003.nii.gz"]
    assert len({case.patient_id for case in cases}) == 2
    scan = cases[1].load()
    assert (scan.volume.volume_hu == -700).all()
    assert planes(scan.mask) == [0]
    assert len(scan.nodules) == 1


def test_a_case_whose_own_name_ends_like_a_channel_is_left_its_name(tmp_path):
    for kind in ("images", "masks"):
        save(tmp_path / kind / "scan_0001.nii.gz", mask_of(1))
    assert len(find_cases(tmp_path, PairsConfig())) == 1


def test_the_ignore_label_is_neither_target_nor_background(tmp_path):
    scan = load(dataset(tmp_path / "named", NNUNET, mask=mask_of(1, 2)))
    assert (planes(scan.mask), planes(scan.ignore)) == ([0], [2])
    scan = load(dataset(tmp_path / "by value", MSD, mask=mask_of(1, 255)))
    assert (planes(scan.mask), planes(scan.ignore)) == ([0], [2])
    scan = load(dataset(tmp_path / "by setting", MSD, mask=mask_of(1, 9)), ignore_label=9)
    assert (planes(scan.mask), planes(scan.ignore)) == ([0], [2])
    # Named in dataset.json, it may stand alone: a scan without nodules.
    assert planes(load(dataset(tmp_path / "alone", NNUNET, mask=mask_of(2))).ignore) == [0]


@pytest.mark.parametrize(
    ("label", "target"), [(2, [2]), ([2, 3], [2, 4]), ("any", [0, 2, 4]), (4, [6]), ([3], [4])]
)
def test_the_chosen_labels_are_the_target_and_the_others_background(tmp_path, label, target):
    scan = load(dataset(tmp_path, SEVERAL, mask=mask_of(1, 2, 3, 4)), label=label)
    assert planes(scan.mask) == target
    assert planes(scan.ignore) == ([] if label == 4 else [6])


def test_several_labels_are_refused_by_name_before_any_voxel_is_read(tmp_path):
    folder = dataset(tmp_path, SEVERAL)
    with pytest.raises(LungsegError) as caught:
        find_cases(folder, PairsConfig())
    assert caught.value.code == "labels-several"
    assert "1 (lung), 2 (nodule), 3 (vessel)" in str(caught.value)
    assert "dataset.json" in str(caught.value)
    assert "data.pairs.label" in caught.value.remedy
    wrong = refusal(folder, label=5)
    assert (wrong.code, wrong.where["label"]) == ("label-unknown", 5)
    assert "2 (nodule)" in wrong.remedy


@pytest.mark.parametrize("values", [(1, 2), (3,), (255,)])
def test_a_mask_whose_values_nobody_explains_is_refused(tmp_path, values):
    for kind, array in (("images", mask_of(*values).astype(np.int16)), ("masks", mask_of(*values))):
        save(tmp_path / kind / "one.nrrd", array)
    error = refusal(tmp_path)
    assert error.code == "labels-several"
    assert "one.nrrd" in str(error)
    assert f"labels={', '.join(map(str, values))}" in str(error)
    assert planes(load(tmp_path, label=values[-1]).mask) == [2 * len(values) - 2]


def test_a_value_that_dataset_json_does_not_name_is_refused_with_those_it_names(tmp_path):
    error = refusal(dataset(tmp_path, MSD, mask=mask_of(1, 7)))
    assert error.code == "labels-several"
    assert "1 (cancer), 7" in str(error)


@pytest.mark.parametrize(
    ("described", "code", "named"),
    [
        ("{", "dataset-invalid", "dataset.json"),
        ("[]", "dataset-invalid", "dataset.json"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "dataset-invalid", "dataset.json"),
        ({**NNUNET, "channel_names": {"0": "CT", "1": "PET"}}, "image-multichannel", "CT, PET"),
        ({**NNUNET, "file_ending": ".png"}, "file-ending", ".png"),
        ({**NNUNET, "numTraining": 3}, "dataset-incomplete", "promised=3, here=2"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(tmp_path, described, code, named):
    error = refusal(dataset(tmp_path, described))
    assert error.code == code
    assert named in str(error)


def test_a_second_channel_or_a_fourth_dimension_is_refused(tmp_path):
    folder = dataset(tmp_path / "channels", {"labels": NNUNET["labels"]}, "_0000")
    save(folder / "imagesTr" / "lung_001_0001.nii.gz", np.zeros((3, 4, 5), np.int16))
    error = refusal(folder)
    assert error.code == "image-multichannel"
    assert "lung_001_0001.nii.gz" in str(error)
    folder = dataset(tmp_path / "time", MSD)
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), np.int16), isVector=False)
    sitk.WriteImage(image, str(folder / "imagesTr" / "lung_003.nii.gz"))
    error = refusal(folder)
    assert error.code == "image-not-3d"
    assert "lung_003.nii.gz" in str(error)
    folder = dataset(tmp_path / "vector", MSD)
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5, 2), np.int16), isVector=True)
    sitk.WriteImage(image, str(folder / "imagesTr" / "lung_001.nii.gz"))
    assert refusal(folder).code == "image-not-scalar"


def test_both_names_of_one_case_are_refused(tmp_path):
    folder = dataset(tmp_path, NNUNET, "_0000")
    save(folder / "imagesTr" / "lung_001.nii.gz", np.zeros((3, 4, 5), np.int16))
    assert refusal(folder).code == "pair-ambiguous"
