"""What `predict` writes: the mask on the scan's own grid, and its nodules as JSON."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from lungseg import __version__
from lungseg.errors import DataError
from lungseg.scan.volume import write_mask
from lungseg.segment.predict import Segmentation

DISCLAIMER = "research use only: not a medical device, not for diagnosis"


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
