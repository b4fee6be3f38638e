"""The demo's chain on a real S3 server, by the verbs alone: DICOM in, a model pulled by plain boto3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.marked import mark_download
from helpers.servers import BUCKET, s3_client
from helpers.unpacked import unpacked

from lungseg.scan.identity import case_id, case_key
from lungseg.storage import open_store

pytestmark = pytest.mark.slow
Verb = Callable[..., str]

RECIPE = """
data:
  patch: {shape_zyx: [32, 32, 32], positives_per_nodule: 2, hard_negatives_per_scan: 2}
  split: {val: 0.3, test: 0.3}
model: {width: 4, depth: 3}
train: {epochs: 2, steps_per_epoch: 4, global_batch: 2, workers: 2, cpus_per_worker: 1}
segment: {window_zyx: [96, 96, 96], threshold: 0.9, min_volume_mm3: 1000}
"""
"""Above 0.5 a network of eight steps marks hundreds of specks, and each of them is measured."""


@pytest.fixture(scope="module")
def download(lungseg: Verb, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Phantoms with marks wherever a patient's data could stand, and these marks."""
    folder = tmp_path_factory.mktemp("download")
    lungseg("phantom", "--out", folder / "dicom", "--scans", "3", "--seed", "1")
    return folder / "dicom", mark_download(folder / "dicom")


@pytest.fixture(scope="module")
def chain(
    lungseg: Verb,
    ray_cluster: Any,
    download: tuple[Path, list[bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """A trained run "first" in a bucket, and an empty folder for what verbs write."""
    folder = tmp_path_factory.mktemp("chain")
    store = "s3://lungseg-test/chain"
    (folder / "recipe.yaml").write_text(RECIPE)
    lungseg("prepare", "lidc", download[0], "--store", store, "--data", "phantoms",
            "--recipe", folder / "recipe.yaml")  # fmt: skip
    lungseg("train", "--store", store, "--data", "phantoms", "--run", "first",
            "--recipe", folder / "recipe.yaml")  # fmt: skip
    (folder / "recipe.yaml").unlink()
    return folder, store


@pytest.fixture(scope="module")
def evaluation(lungseg: Verb, chain: tuple[Path, str]) -> tuple[Path, str]:
    """The folder of the run's evaluation, and what was printed."""
    folder, store = chain
    out = folder / "evaluation"
    return out, lungseg("evaluate", "--store", store, "--run", "first", "--out", out)


@pytest.fixture(scope="module")
def segmented(
    lungseg: Verb, chain: tuple[Path, str], download: tuple[Path, list[bytes]]
) -> tuple[Path, Path]:
    """A phantom's series, and the folder of its segmentation."""
    folder, store = chain
    series = next(path for path in sorted(download[0].rglob("*")) if list(path.glob("*.dcm")))
    lungseg("predict", series, "--store", store, "--run", "first", "--out", folder / "segmented")
    return series, folder / "segmented"


def test_plain_boto3_pulls_a_best_model_that_keras_can_use(chain: tuple[Path, str], tmp_path: Path) -> None:
    s3_client().download_file(BUCKET, "chain/runs/first/best/model.keras", str(tmp_path / "model.keras"))
    pointer = s3_client().get_object(Bucket=BUCKET, Key="chain/runs/first/best.json")
    best = json.loads(pointer["Body"].read())
    digest = hashlib.sha256((tmp_path / "model.keras").read_bytes()).hexdigest()
    assert digest == best["model_sha256"]
    import keras

    import lungseg.model.unet  # noqa: F401 - registers the window layer

    model = keras.models.load_model(tmp_path / "model.keras")
    probability = np.asarray(model(np.full((1, 32, 32, 32, 1), -800, np.float32)))
    assert probability.shape == (1, 32, 32, 32, 1)
    assert ((probability >= 0) & (probability <= 1)).all()


def test_the_run_is_listed_pulled_and_evaluated(
    lungseg: Verb, chain: tuple[Path, str], evaluation: tuple[Path, str]
) -> None:
    folder, store = chain
    assert "first" in lungseg("runs", "--store", store)
    lungseg("pull", "--store", store, "--run", "first", "--out", folder / "pulled")
    assert (folder / "pulled" / "weights.safetensors").stat().st_size > 1000
    out, shown = evaluation
    assert "Dice (full scan" in shown
    (report,) = out.glob("evaluation-*.json")
    assert json.loads(report.read_text())["split"] == "test"


def test_scans_are_segmented_onto_their_own_grid(segmented: tuple[Path, Path]) -> None:
    compare(*segmented)


def test_real_scans_are_segmented_onto_their_own_grid(
    lungseg: Verb, chain: tuple[Path, str], real_data: Path, tmp_path: Path
) -> None:
    series = [real_data / "ct64", real_data / "ct_c3n00247"]
    lungseg("predict", *series, "--store", chain[1], "--run", "first", "--out", tmp_path)
    for one in series:
        compare(one, tmp_path)


def test_a_scan_that_is_not_in_hu_is_warned_of_on_the_terminal_and_in_the_result(
    lungseg: Verb,
    chain: tuple[Path, str],
    segmented: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Few slices: to a network of eight steps all that is as bright as this is one nodule.
    image = sitk.ReadImage([str(path) for path in sorted(segmented[0].glob("*.dcm"))[:24]])
    sitk.WriteImage(sitk.Cast(image, sitk.sitkInt16) + 1024, str(tmp_path / "shifted.mha"))
    lungseg("predict", tmp_path / "shifted.mha", "--store", chain[1], "--run", "first", "--out", tmp_path)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("shifted.mha: the values are probably no HU" in line for line in warned)
    assert any("shifted.mha: no lungs were found" in line for line in warned)
    (result,) = tmp_path.glob("*/nodules.json")
    assert len(json.loads(result.read_text())["warnings"]) == 2


def compare(series: Path, out: Path) -> None:
    """The geometry of a mask is that which ITK's own DICOM reader gives the scan."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    result = out / case_id(series.name, case_key())
    scan, mask = reader.Execute(), sitk.ReadImage(str(result / "mask.nii.gz"))
    assert mask.GetSize() == scan.GetSize()
    assert np.allclose(mask.GetOrigin(), scan.GetOrigin(), atol=1e-3)
    assert np.allclose(mask.GetSpacing(), scan.GetSpacing(), atol=1e-3)
    assert np.allclose(mask.GetDirection(), scan.GetDirection(), atol=1e-5)
    assert json.loads((result / "nodules.json").read_text())["run"] == "first"


def test_nothing_that_was_written_tells_of_a_patient(
    chain: tuple[Path, str],
    download: tuple[Path, list[bytes]],
    evaluation: tuple[Path, str],
    segmented: tuple[Path, Path],
) -> None:
    """Every byte of the store and of all reports, with what Arrow, gzip and zip hold compressed."""
    folder, uri = chain
    store = open_store(uri)
    objects = {item.key: store.get(item.key) for item in store.find()}
    objects |= {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    kinds = {key.rpartition(".")[2] for key in objects}
    assert kinds >= {"arrow", "json", "jsonl", "keras", "safetensors", "gz", "txt"}
    texts = [(key, text) for key, data in objects.items() for text in unpacked(key, data)]
    assert any(b"LIDC-IDRI-" in text for key, text in texts if key.endswith(".arrow"))  # this search finds
    for mark in [*download[1], str(download[0]).encode()]:
        assert [key for key, text in texts if mark in text] == []


def test_real_lidc_nodules_go_through_prepare_pairs(
    lungseg: Verb, ray_cluster: Any, real_data: Path, s3_uri: str
) -> None:
    small = ("--set", "data.patch.shape_zyx=[48,48,48]", "--set", "data.patch.positives_per_nodule=2")
    shown = lungseg(
        "prepare", "pairs", real_data / "lidc_crops", "--store", s3_uri, "--data", "crops", *small
    )
    counts = {line.split(":")[0].strip(): line for line in shown.splitlines()}
    assert "65 scans, 65 patients, 65 nodules, 130 patches" in counts["train"]
    assert "19 scans" in counts["val"]
    assert "10 scans" in counts["test"]
