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
from servers import BUCKET, s3_client

pytestmark = pytest.mark.slow
Verb = Callable[..., str]

RECIPE = """
data:
  patch: {shape_zyx: [32, 32, 32], positives_per_nodule: 2, hard_negatives_per_scan: 2}
  split: {val: 0.3, test: 0.3}
model: {width: 4, depth: 3}
train: {epochs: 2, steps_per_epoch: 4, global_batch: 2, workers: 2, cpus_per_worker: 1}
segment: {window_zyx: [96, 96, 96]}
"""


@pytest.fixture(scope="module")
def chain(lungseg: Verb, ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A trained run "first" in a bucket, and the folder of its phantoms."""
    folder = tmp_path_factory.mktemp("chain")
    store = "s3://lungseg-test/chain"
    (folder / "recipe.yaml").write_text(RECIPE)
    lungseg("phantom", "--out", folder / "dicom", "--scans", "3", "--seed", "1")
    lungseg("prepare", "lidc", folder / "dicom", "--store", store, "--data", "phantoms",
            "--recipe", folder / "recipe.yaml")  # fmt: skip
    lungseg("train", "--store", store, "--data", "phantoms", "--run", "first",
            "--recipe", folder / "recipe.yaml")  # fmt: skip
    return folder, store


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
    lungseg: Verb, chain: tuple[Path, str], tmp_path: Path
) -> None:
    _, store = chain
    assert "first" in lungseg("runs", "--store", store)
    lungseg("pull", "--store", store, "--run", "first", "--out", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "weights.safetensors").stat().st_size > 1000
    shown = lungseg("evaluate", "--store", store, "--run", "first", "--out", tmp_path / "evaluation")
    assert "Dice (full scan" in shown
    (report,) = (tmp_path / "evaluation").glob("evaluation-*.json")
    assert json.loads(report.read_text())["split"] == "test"


def test_scans_are_segmented_onto_their_own_grid(
    lungseg: Verb, chain: tuple[Path, str], tmp_path: Path
) -> None:
    folder, store = chain
    predict_and_compare(lungseg, [next((folder / "dicom").glob("LIDC-IDRI-*/*/*"))], store, tmp_path)


def test_real_scans_are_segmented_onto_their_own_grid(
    lungseg: Verb, chain: tuple[Path, str], real_data: Path, tmp_path: Path
) -> None:
    predict_and_compare(lungseg, [real_data / "ct64", real_data / "ct_c3n00247"], chain[1], tmp_path)


def predict_and_compare(lungseg: Verb, series: list[Path], store: str, out: Path) -> None:
    """The geometry of each mask is that which ITK's own DICOM reader gives the scan."""
    lungseg("predict", *series, "--store", store, "--run", "first", "--out", out)
    for one in series:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(one)))
        scan, mask = reader.Execute(), sitk.ReadImage(str(out / one.name / "mask.nii.gz"))
        assert mask.GetSize() == scan.GetSize()
        assert np.allclose(mask.GetOrigin(), scan.GetOrigin(), atol=1e-3)
        assert np.allclose(mask.GetSpacing(), scan.GetSpacing(), atol=1e-3)
        assert np.allclose(mask.GetDirection(), scan.GetDirection(), atol=1e-5)
        assert json.loads((out / one.name / "nodules.json").read_text())["run"] == "first"


def test_real_lidc_nodules_go_through_prepare_pairs(
    lungseg: Verb, ray_cluster: Any, real_data: Path, s3_uri: str
) -> None:
    small = ("--set", "data.patch.shape_zyx=[48,48,48]", "--set", "data.patch.positives_per_nodule=2")
    shown = lungseg(
        "prepare", "pairs", real_data / "lidc_crops", "--store", s3_uri, "--data", "crops", *small
    )
    counts = {line.split(":")[0].strip(): line for line in shown.splitlines()}
    assert "66 scans, 66 nodules, 132 patches" in counts["train"]
    assert "14 scans" in counts["val"]
    assert "14 scans" in counts["test"]
