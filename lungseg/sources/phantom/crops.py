"""Crops around the nodules of hard phantoms, as pairs of image and mask: thousands in the time of some scans.

A crop shows what a phantom of LIDC-IDRI's scan would show there, and each nodule that a reader drew has one:
shapes for a network to learn before it sees the few nodules of one's own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.errors import DataError
from lungseg.scan.volume import write_mask, write_nifti
from lungseg.sources.phantom.anatomy import Window
from lungseg.sources.phantom.choose import CROPS, Scan, all_scans
from lungseg.sources.phantom.cores import on_all_cores
from lungseg.sources.phantom.synthesis import Phantom
from lungseg.sources.phantom.write import NOT_A_PATIENT, VERSION, unwritable
from lungseg.telemetry import Progress

SIDE_MM = 64.0
BYTES_EACH = 1 << 29
NODULE, IGNORED = 1, 255  # as `prepare pairs` reads masks unless told otherwise


def write_crops(
    out: Path,
    crops: int,
    seed: int,
    progress: Progress = lambda done, total: None,
    without: Collection[str] = (),
) -> None:
    """Write `crops` pairs to out/images and out/masks, NAME.nii.gz in both, for `prepare pairs`.

    A crop has a side of 64 mm on the grid of its scan, less where the scan ends, and a nodule in its middle,
    which is 1 in the mask; others are 255. Voxels depend on the seed and the nodule alone, fewer crops are
    the beginning of more, and what an earlier call wrote is kept. All cores are used. No contour is taken of
    the patients `without`.
    Raises DataError: "phantom-arguments", "phantom-too-many", "phantom-patient-unknown",
    "phantom-folder-taken", "phantom-unwritable".
    """
    if crops < 1 or seed < 0:
        remedy = "ask for at least one crop and a seed from 0"
        raise DataError("phantom-arguments", crops=crops, seed=seed, remedy=remedy)
    jobs = _jobs(all_scans(seed, CROPS, without), crops)
    first = list(islice(jobs, 1))  # here it turns out whether the patients are known
    _own(out, {"made_by": NOT_A_PATIENT, "seed": seed, "version": VERSION, "without": sorted(without)})
    progress(0, crops)
    written, tasks = 0, ((out, scan, count, seed) for scan, count in chain(first, jobs))
    for count in on_all_cores(_write, tasks, BYTES_EACH):
        progress(written := written + count, crops)
    if written < crops:
        raise DataError("phantom-too-many", crops=crops, remedy=f"ask for at most {written} crops")


def _jobs(scans: Iterator[Scan], crops: int) -> Iterator[tuple[Scan, int]]:
    """Each scan with how many of its nodules are wanted, all together `crops`, as long as there are scans."""
    for scan in scans:
        yield scan, min(len(scan.marks), crops)
        crops -= min(len(scan.marks), crops)
        if not crops:
            return


def _write(out: Path, scan: Scan, count: int, seed: int) -> int:
    """The pairs of the first `count` nodules; each image last: where it is, the mask is too."""
    names = [f"{scan.patient_id}_n{number + 1:02d}.nii.gz" for number in range(count)]
    missing = [number for number, name in enumerate(names) if not (out / "images" / name).exists()]
    if missing:
        shape, spacing_mm = scan.geometry.shape_zyx, scan.geometry.spacing_mm
        phantom = Phantom(shape, spacing_mm, scan.lesions, (seed, scan.scan_id), hard=True)
    for number in missing:
        box = around(scan, number)
        geometry = scan.geometry.part(box)
        write_mask(out / "masks" / names[number], mask_of(scan, number)[box], geometry)
        write_nifti(out / "images" / names[number], phantom.image(box), geometry)
    return count


def _own(out: Path, says: dict[str, Any]) -> None:
    """Make the folders, and say what is in them; or find that they were made otherwise, perhaps with contours
    of a patient who is to be left out."""
    table, images = out / "phantom.json", out / "images"
    try:
        if not table.exists() and not (images.is_dir() and any(images.iterdir())):
            for folder in (images, out / "masks"):
                folder.mkdir(parents=True, exist_ok=True)
            table.write_text(json.dumps(says))
        ours = table.exists() and json.loads(table.read_text()) == says
    except OSError as error:
        raise unwritable(out, error, "1 MB a crop") from error
    except ValueError:
        ours = False
    if not ours:
        remedy = "give another --out: here lie real pairs, or phantoms of another seed, version or --without"
        raise DataError("phantom-folder-taken", folder=out, remedy=remedy)


def around(scan: Scan, number: int) -> Window:
    """The part of the scan's grid that a crop shows."""
    geometry, box = scan.geometry, scan.marks[number].box
    sides = []
    for side, spacing, count in zip(box, geometry.spacing_mm, geometry.shape_zyx, strict=True):
        middle, half = (side.start + side.stop) / 2, SIDE_MM / spacing / 2
        sides.append(slice(max(round(middle - half), 0), min(round(middle + half), count)))
    slices, rows, columns = sides
    return slices, rows, columns


def mask_of(scan: Scan, number: int) -> np.ndarray:
    """uint8 [z, y, x] of the whole scan."""
    mask = np.zeros(scan.geometry.shape_zyx, np.uint8)
    for mark, lesion in zip(scan.marks, scan.lesions, strict=True):
        mask[mark.box][lesion.mask] = IGNORED
    mask[scan.marks[number].box][scan.lesions[number].mask] = NODULE
    return mask
