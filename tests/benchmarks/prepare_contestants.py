"""One contestant of `prepare.py`, in a process of its own.

    python prepare_contestants.py NAME JOB.json

Says "ready" when everything is imported, begins at a line on standard input, and prints JSON at the end. Of
each scan it reads the DICOM series and a mask, brings both to 1 mm and cuts the patches asked for.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SIDE = 64
AIR_HU = -1024
Worker = Callable[[Any], int]
"""Takes a scan (`series`, `mask`, `patches`) and gives the number of patches it cut."""


STAGES: dict[str, float] = {}
"""Seconds of lungseg's, over all scans."""


def _timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
    began = time.monotonic()
    result = function(*arguments)
    STAGES[stage] = STAGES.get(stage, 0.0) + time.monotonic() - began
    return result


def lungseg() -> Worker:
    """What `lungseg prepare` does with a scan, the lung mask and the choice of hard negatives included."""
    from lungseg.config import PatchConfig
    from lungseg.dataset import cutting as scans
    from lungseg.dataset.case import LabelledScan
    from lungseg.scan.dicom import read_series
    from lungseg.scan.volume import read_labels
    from lungseg.sources.pairs import _nodules

    scans.lung_mask = partial(_timed, "lungs", scans.lung_mask)  # type: ignore[assignment]

    def work(scan: Any) -> int:
        mask, geometry = _timed("mask file", read_labels, Path(scan.mask))
        mask = mask.astype(np.uint8)
        volume = _timed("DICOM", read_series, Path(scan.series))
        labelled = LabelledScan(volume, *_nodules(mask, geometry))
        stored = _timed("to 1 mm", scans.to_grid, labelled, (1.0, 1.0, 1.0))
        config = PatchConfig(shape_zyx=(SIDE,) * 3)
        return len(_timed("lungs and patches", scans.cut_patches, "c", labelled, stored, config))

    return work


def simpleitk() -> Worker:
    """The floor: reading, resampling and cutting at any places, without any check or choice."""
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    def work(scan: Any) -> int:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(scan.series))
        image, mask = reader.Execute(), sitk.ReadImage(scan.mask, sitk.sitkUInt8)
        arrays = []
        for one, how, fill in ((image, sitk.sitkLinear, AIR_HU), (mask, sitk.sitkNearestNeighbor, 0)):
            size = [round(count * step) for count, step in zip(one.GetSize(), one.GetSpacing(), strict=True)]
            same = (one.GetOrigin(), (1.0, 1.0, 1.0), one.GetDirection(), fill, one.GetPixelID())
            arrays.append(sitk.GetArrayFromImage(sitk.Resample(one, size, sitk.Transform(), how, *same)))
        return len(_cut(*arrays, scan.patches))

    return work


def _cut(hu: np.ndarray, mask: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every other patch on the mask, the rest anywhere."""
    random = np.random.default_rng(0)
    inside = np.flatnonzero(mask)
    places = [random.choice(inside) if n % 2 else random.integers(mask.size) for n in range(count)]
    found = []
    for place in np.stack(np.unravel_index(places, mask.shape), axis=1):
        first = np.clip(place - SIDE // 2, 0, np.subtract(mask.shape, SIDE))
        box = tuple(slice(a, a + SIDE) for a in first)
        found.append((hu[box].copy(), mask[box].copy()))
    return found


def monai() -> Worker:
    """LoadImage, Spacing and RandCropByPosNegLabel, as MONAI's tutorials chain them."""
    import monai.transforms as mt
    import torch

    torch.set_num_threads(1)
    keys = ["image", "mask"]
    read = [
        mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys),
        mt.Spacingd(keys, (1.0, 1.0, 1.0), mode=("bilinear", "nearest")),
    ]  # fmt: skip

    def work(scan: Any) -> int:
        cut = mt.RandCropByPosNegLabeld(keys, "mask", (SIDE,) * 3, num_samples=scan.patches)
        return len(mt.Compose([*read, cut])({"image": scan.series, "mask": scan.mask}))

    return work


def main(arguments: Sequence[str]) -> None:
    name, job = arguments
    scans = [SimpleNamespace(**scan) for scan in json.loads(Path(job).read_text())]
    work = {"lungseg": lungseg, "SimpleITK": simpleitk, "MONAI": monai}[name]()
    print("ready", flush=True)
    sys.stdin.readline()
    patches = sum(work(scan) for scan in scans)
    status = Path("/proc/self/status").read_text()  # getrusage tells the peak of whoever forked us, too
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    stages = {stage: seconds / len(scans) for stage, seconds in STAGES.items()}
    print(json.dumps({"patches": patches, "peak_mib": peak_kib / 1024, "stages": stages}))


if __name__ == "__main__":
    main(sys.argv[1:])
