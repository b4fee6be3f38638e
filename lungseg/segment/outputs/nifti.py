"""What `predict` writes: label map and mask on the scan's own grid, and the nodules as JSON."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lungseg import __version__
from lungseg.errors import DataError
from lungseg.scan.itk_files import itk_name
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Volume, write_mask, write_nifti
from lungseg.segment.outputs.report import render
from lungseg.segment.predict import Segmentation

DISCLAIMER = "research use only: not a medical device, not for diagnosis"


def require_own(folder: Path, scan: str) -> None:
    """Raises DataError("output-foreign") if `folder` is there and holds no results, and
    DataError("output-of-another-scan") if they are not those of `scan`: names of folders come again from
    patient to patient. Raises DataError("path-not-text") as SimpleITK would at the end."""
    itk_name(folder)
    if not folder.exists():
        return
    try:
        earlier = json.loads((folder / "nodules.json").read_bytes())["scan"]
    except (OSError, ValueError) as error:
        remedy = "give another --out, or remove what is there"
        raise DataError("output-foreign", folder=folder, remedy=remedy) from error
    except (LookupError, TypeError):
        earlier = None  # an earlier version did not write it down
    if earlier != scan:
        remedy = "give another --out, or remove that folder if the scan was replaced"
        raise DataError("output-of-another-scan", folder=folder, remedy=remedy)


def write(
    segmentation: Segmentation,
    folder: Path,
    *,
    scan: str,
    run: str,
    checkpoint: str,
    post: str = "",
    volume: Volume | None = None,
    with_probability: bool = False,
) -> None:
    """Write `folder`/nodules.nii.gz, whose values are the labels of `folder`/nodules.json, mask.nii.gz (1 in
    any nodule) and, if asked for, probability.nii.gz (float32, interpolated linearly), and with the scan's
    `volume` report.html; all or none of them.

    None holds patient data. Earlier results of the same scan (see `identity.scan_id`) are replaced. `post`
    says where settings come from, if not from run and call.
    Raises as `require_own`, and DataError("output-unwritable").
    """
    folder = Path(folder)
    require_own(folder, scan)
    grid = segmentation.geometry
    with replaced(folder) as fresh:
        write_nifti(fresh / "nodules.nii.gz", segmentation.labels.astype(np.uint16), grid)
        write_mask(fresh / "mask.nii.gz", segmentation.labels > 0, grid)
        if segmentation.lungs is not None:
            write_mask(fresh / "lungs.nii.gz", segmentation.lungs, segmentation.working)
        if with_probability:
            own = resample_onto(segmentation.probability, segmentation.working, grid)
            write_nifti(fresh / "probability.nii.gz", own, grid)
        facts = _describe(segmentation, scan, run, checkpoint, post)
        text = json.dumps(facts, indent=2, allow_nan=False)
        (fresh / "nodules.json").write_text(text + "\n", encoding="utf-8")
        if volume is not None:
            (fresh / "report.html").write_text(render(segmentation, volume, facts), encoding="utf-8")


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end; if anything fails, `folder` stays as
    it was.

    Raises DataError("output-unwritable").
    """
    fresh = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    stale = fresh.with_name(f"{fresh.name}.old")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if folder.exists():
            os.rename(folder, stale)
        try:
            os.rename(fresh, folder)
        except BaseException:
            if stale.exists():
                os.rename(stale, folder)
            raise
        shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise DataError(
            "output-unwritable", folder=folder, remedy=f"choose another --out ({error})"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _describe(
    segmentation: Segmentation, scan: str, run: str, checkpoint: str, post: str
) -> dict[str, object]:
    return {
        "disclaimer": DISCLAIMER,
        "software": f"lungseg {__version__}",
        "scan": scan,
        "run": run,
        "checkpoint": checkpoint,
        "settings": segmentation.config.model_dump(mode="json"),
        "post": post or None,
        "spacing_mm_zyx": list(segmentation.geometry.spacing_mm),
        "working_spacing_mm_zyx": list(segmentation.working.spacing_mm),
        "lungs_found": segmentation.lungs is not None,
        "warnings": list(segmentation.warnings),
        "nodules": [nodule.to_json() for nodule in segmentation.nodules],
    }
