"""HU at the outlines of LIDC-IDRI's readers, in patients and in hard phantoms.

    uv run python tests/outline_figures.py [--scans 24]

The mean over nodules of the median HU at each depth within the outline (negative: outside it), on a grid of
1 mm. Readers were to outline the outer border: in patients a nodule's HU are half of the way to lung some way
within its outline, and in phantoms at the outline.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

import edt
import numpy as np
import SimpleITK as sitk  # noqa: N813
from helpers.servers import REAL_DATA

from lungseg.scan.resample import resample, resample_onto
from lungseg.scan.volume import Volume
from lungseg.sources.phantom import crops
from lungseg.sources.phantom.choose import CROPS, all_scans
from lungseg.sources.phantom.synthesis import Phantom

CROPS_OF_PATIENTS = REAL_DATA / "lidc_crops"
EDGES_MM = np.arange(-2.0, 5.01, 1.0)
FEWEST_VOXELS = 60  # of a nodule, and 10 of a depth: fewer have no median worth a mean


def patients() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """HU and mask of each real crop, on 1 mm."""
    for file in sorted((CROPS_OF_PATIENTS / "images").iterdir()):
        both = (file, CROPS_OF_PATIENTS / "masks" / file.name)
        hu, mask = (sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in both)
        yield hu, mask > 0


def phantoms(scans: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same of up to two nodules of each scan."""
    for scan in islice(all_scans(0, CROPS), scans):
        own = scan.geometry
        phantom = Phantom(own.shape_zyx, own.spacing_mm, scan.lesions, (0, scan.scan_id), hard=True)
        for number in range(min(2, len(scan.marks))):
            box = crops.around(scan, number)
            volume = Volume(phantom.image(box), own.part(box))
            working = resample(volume, (1.0, 1.0, 1.0))
            nodule = (crops.mask_of(scan, number)[box] == crops.NODULE).astype(np.float32)
            yield working.volume_hu, resample_onto(nodule, volume.geometry, working.geometry) >= 0.5


def by_depth(hu: np.ndarray, mask: np.ndarray) -> list[float]:
    depth_mm = np.where(mask, edt.edt(mask) - 0.5, 0.5 - edt.edt(~mask))
    places = np.digitize(depth_mm, EDGES_MM)
    parts = (hu[places == number] for number in range(1, len(EDGES_MM)))
    return [float(np.median(part)) if part.size > 10 else np.nan for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scans", type=int, default=24)
    options = parser.parse_args()
    if not CROPS_OF_PATIENTS.exists():
        sys.exit(f"the crops of patients are not there: {CROPS_OF_PATIENTS}")
    middles = (EDGES_MM[1:] + EDGES_MM[:-1]) / 2
    print(f"depth, mm  {' '.join(f'{depth:>6}' for depth in middles)}")
    for title, found in (("patients", patients()), ("phantoms", phantoms(options.scans))):
        rows = [by_depth(hu, mask) for hu, mask in found if mask.sum() >= FEWEST_VOXELS]
        means = " ".join(f"{hu:6.0f}" for hu in np.nanmean(rows, axis=0))
        print(f"{title:10} {means}   {len(rows)} nodules")


if __name__ == "__main__":
    main()
