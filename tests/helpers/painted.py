"""Scans of painted balls, as files of pairs or loaded, and the settings of small data sets."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from lungseg.config import DataConfig, PairsConfig
from lungseg.dataset.case import LabelledScan, Nodule
from lungseg.scan.volume import Geometry, Volume
from lungseg.sources import pairs
from lungseg.storage import Store

TREE: dict[str, Any] = {
    "split": {"val": 0.25, "test": 0.25, "seed": 2},  # which deals four patients out as 2, 1 and 1
    "patch": {"shape_zyx": [16, 16, 16]},
    "shard": {"target_mib": 1},
}
CONFIG = DataConfig.model_validate(TREE)
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def ball(geometry: Geometry, centre_mm: tuple[float, ...], radius_mm: float) -> np.ndarray:
    place = geometry.to_lps_mm(np.stack(np.indices(geometry.shape_zyx), axis=-1))
    return (np.linalg.norm(place - centre_mm, axis=-1) <= radius_mm).astype(np.uint8)


def write_pairs(folder: Path, count: int, shape: tuple[int, int, int] = (14, 30, 24)) -> list[pairs.PairCase]:
    """`count` scans of blobs, two of each patient, at (2.0, 1.0, 1.5) mm."""
    rng = np.random.default_rng(0)
    grid = Geometry(shape, (2.0, 1.0, 1.5), (-10.0, 5.0, 100.0), AXIAL)
    reach = np.multiply(shape, grid.spacing_mm)[::-1]
    names = [f"MUSTER^ERIKA^{number:02d}" for number in range(count)]
    for name in names:
        mask = np.zeros(shape, np.uint8)
        for _ in range(2):
            centre = grid.origin_lps_mm + rng.uniform(0.2, 0.8, 3) * reach
            mask |= ball(grid, tuple(centre), rng.uniform(2.5, 4.5))
        hu = rng.normal(-800, 80, shape) + 850.0 * mask
        hu[:, : shape[1] // 3] = rng.normal(30, 20, hu[:, : shape[1] // 3].shape)
        for kind, array in (("images", hu.astype(np.int16)), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(grid.spacing_mm[::-1])
            image.SetOrigin(grid.origin_lps_mm)
            sitk.WriteImage(image, str(folder / kind / f"{name}.nii.gz"))
    with (folder / "patients.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["name", "patient"], *([n, f"MUSTER^ERIKA-{i // 2}"] for i, n in enumerate(names))]
        )
    return pairs.find_cases(folder, PairsConfig())


def labelled(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> LabelledScan:
    """A ball of 6 mm radius as nodule, and one of 5 mm beside it to be ignored where it is no nodule."""
    grid = Geometry(shape, spacing_mm, (-30.0, 12.5, -400.0), AXIAL)
    centre = grid.to_lps_mm(np.subtract(shape, 1) / 2)
    mask, ignore = ball(grid, tuple(centre), 6), ball(grid, (*(centre[:2] + 7), centre[2]), 5)
    hu = np.full(shape, -800, np.int16)
    hu[mask == 1] = 50
    x, y, z = centre.tolist()
    numbers = np.where(mask, 1, -ignore.astype(np.int16)).astype(np.int16)
    return LabelledScan(Volume(hu, grid), numbers, (Nodule("n1", (x, y, z), 12.0, 4),))


def quiet(done: int, total: int) -> None:
    pass


def contents(store: Store) -> dict[str, bytes]:
    return {item.key: store.get(item.key) for item in store.find()}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def of_data_sets(store: Store) -> dict[str, bytes]:
    return {key: data for key, data in contents(store).items() if key.startswith("data/")}
