"""Segment a new scan: a mask on the scan's own grid, and its nodules in patient coordinates."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungseg import __version__
from lungseg.config import Recipe
from lungseg.data.dicom import read_series
from lungseg.data.identity import case_id, case_key
from lungseg.data.lungs import lung_mask
from lungseg.data.resample import resample, resample_onto
from lungseg.data.volume import SUFFIXES, Geometry, Volume, read_image, write_mask
from lungseg.errors import DataError
from lungseg.segment.postprocess import components
from lungseg.segment.quantify import NoduleMeasurement, measure
from lungseg.segment.sliding import Predictor, predict_volume

DISCLAIMER = "research use only: not a medical device, not for diagnosis"


@dataclass(frozen=True)
class Segmentation:
    """`labels` is int32 [z, y, x] on `geometry`, the input's own grid: 0 background, 1 the largest nodule."""

    labels: np.ndarray
    geometry: Geometry
    nodules: tuple[NoduleMeasurement, ...]
    threshold: float
    lungs_found: bool


def read_input(path: Path) -> Volume:
    """The scan of a DICOM folder, or of a NIfTI or NRRD file.

    Raises DataError("input-missing") and whatever `dicom.read_series` or `volume.read_image` raise.
    """
    path = Path(path)
    _require(path)
    return read_series(path) if path.is_dir() else read_image(path)


def case_name(path: Path) -> str:
    """The input's own name, without an image suffix."""
    name = Path(path).resolve().name
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
    return name.removesuffix(suffix) or "scan"


def case_ids(inputs: Sequence[Path]) -> list[str]:
    """A folder name for each input, before any work is done: the keyed hash of the input's own name, which
    `lungseg prepare pairs` gives the same scan.

    Raises DataError("input-missing"), DataError("input-ambiguous") if two would share a folder, and as
    `case_key`.
    """
    for path in inputs:
        _require(Path(path))
    names = [case_name(path) for path in inputs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        remedy = "rename one, or predict them with different --out"
        raise DataError("input-ambiguous", names=",".join(twice), remedy=remedy)
    key = case_key()
    return [case_id(name, key) for name in names]


def _require(path: Path) -> None:
    if not path.exists():
        raise DataError("input-missing", input=path, remedy="give a DICOM folder, a NIfTI or an NRRD file")


def segment(
    predict: Predictor, volume: Volume, recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> Segmentation:
    """Nodules of `volume`, found at the spacing that the network was trained at (`recipe.data.spacing_mm`).

    The probability is resampled linearly back onto the scan's grid and thresholded there, so that the
    mask has no stairs of the working grid. Where no lungs are found, the whole scan is searched.
    """
    config = recipe.segment
    working = resample(volume, recipe.data.spacing_mm)
    lungs = lung_mask(working)
    lungs_found = bool(lungs.any())
    coarse = predict_volume(
        predict,
        working.volume_hu,
        config,
        lungs=lungs if lungs_found else None,
        progress=progress,
        multiple=recipe.model.total_stride,
    )
    probability = resample_onto(coarse, working.geometry, volume.geometry)
    own_lungs = resample_onto(lungs, working.geometry, volume.geometry) if lungs_found else None
    labels = components(probability, config, volume.geometry.spacing_mm, own_lungs)
    nodules = tuple(measure(labels, volume, probability))
    return Segmentation(labels, volume.geometry, nodules, config.threshold, lungs_found)


def write(segmentation: Segmentation, folder: Path, *, run: str, checkpoint: str) -> None:
    """Write `folder`/mask.nii.gz (1 in any nodule) and `folder`/nodules.json, both or none.

    Neither holds patient data. Results of an earlier run in `folder` are replaced.
    Raises DataError("output-foreign") if `folder` is something else, DataError("output-unwritable").
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "nodules.json").is_file():
        raise DataError("output-foreign", folder=folder, remedy="give another --out, or remove what is there")
    fresh = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    stale = fresh.with_name(f"{fresh.name}.old")
    try:
        fresh.mkdir(parents=True)
        write_mask(fresh / "mask.nii.gz", segmentation.labels > 0, segmentation.geometry)
        text = json.dumps(_describe(segmentation, run, checkpoint), indent=2, allow_nan=False)
        (fresh / "nodules.json").write_text(text + "\n", encoding="utf-8")
        if folder.exists():
            os.rename(folder, stale)
        os.rename(fresh, folder)
    except OSError as error:
        raise DataError(
            "output-unwritable", folder=folder, remedy=f"choose another --out ({error})"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def _describe(segmentation: Segmentation, run: str, checkpoint: str) -> dict[str, object]:
    return {
        "disclaimer": DISCLAIMER,
        "software": f"lungseg {__version__}",
        "run": run,
        "checkpoint": checkpoint,
        "threshold": segmentation.threshold,
        "spacing_mm_zyx": list(segmentation.geometry.spacing_mm),
        "lungs_found": segmentation.lungs_found,
        "nodules": [nodule.to_json() for nodule in segmentation.nodules],
    }
