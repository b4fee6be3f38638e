"""Held-out scans whose network is known: it reads the probability out of the HU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import cc3d
import numpy as np

from lungseg.config import Recipe
from lungseg.config.stored import store_recipe
from lungseg.dataset.case import LabelledScan, Nodule, Outlines
from lungseg.dataset.cutting import to_grid
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.dataset.stored_scans import StoredScan, StoredScanEntry, write_scan
from lungseg.evaluate.kept import Prediction
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.run import Published, Run, load_published
from lungseg.runs.state import TrainState
from lungseg.scan.volume import Geometry, Volume, vector
from lungseg.storage import Store, keys

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
Spacing = tuple[float, float, float]


def labelled(
    numbers: np.ndarray,
    spacing_mm: Spacing,
    probability: np.ndarray | None = None,
    diameters_mm: Sequence[float] = (),
    outlines: dict[int, Outlines] | None = None,
) -> LabelledScan:
    """`diameters_mm` are the readers' mean ones; without them nobody's are known."""
    depth, height, width = numbers.shape
    grid = Geometry((depth, height, width), spacing_mm, (-30.0, 12.5, -400.0), AXIAL)
    hu = np.full(numbers.shape, -1000, np.int16)
    if probability is not None:
        hu += np.rint(1000 * probability).astype(np.int16)

    def describe(number: int) -> Nodule:
        inside = np.argwhere(numbers == number)
        volume_mm3 = len(inside) * math.prod(spacing_mm)
        known = bool(diameters_mm) and number > 0
        return Nodule(
            nodule_id=f"n{number}",
            centre_lps_mm=vector(grid.to_lps_mm(inside.mean(axis=0))),
            equivalent_diameter_mm=(6 * volume_mm3 / math.pi) ** (1 / 3),
            readers=4 if known else 0,
            mean_reader_diameter_mm=diameters_mm[number - 1] if known else None,
        )

    nodules = tuple(describe(number) for number in range(1, numbers.max(initial=0) + 1))
    regions = tuple(describe(-number) for number in range(1, -numbers.min(initial=0) + 1))
    return LabelledScan(Volume(hu, grid), numbers.astype(np.int16), nodules, regions, outlines or {})


def numbered(mask: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """Each component of a mask as a nodule, and of what is ignored as a region, which goes first."""
    regions = np.zeros(mask.shape, np.int16) if ignore is None else _components(ignore)
    return np.where(regions > 0, -regions, _components((mask != 0) & (regions == 0)))


def _components(mask: np.ndarray) -> np.ndarray:
    return cc3d.connected_components(mask != 0, connectivity=26).astype(np.int16)


def said(probability: np.ndarray, stored: StoredScan, lungs: np.ndarray | None = None) -> Prediction:
    return Prediction(stored.volume.geometry, probability.astype(np.float16), lungs)


def network(windows: np.ndarray) -> np.ndarray:
    """The probability that `labelled` painted."""
    return (windows + 1000) / 1000


def hold_out(
    store: Store,
    scans: Sequence[LabelledScan],
    spacing_mm: Spacing,
    patients: Sequence[int] = (),
    splits: Sequence[str] = (),
    run: str = "r",
    data: str = "d",
) -> tuple[Manifest, Published]:
    """A data set with these scans, each of a patient of its own and to test if not said otherwise, and a run
    on it, whose published checkpoint has no weights: to load them would fail. A scan is asked about once."""
    held: dict[str, list[StoredScanEntry]] = {}
    cases: dict[str, list[str]] = {}
    for number, scan in enumerate(scans):
        split, case_id = splits[number] if splits else "test", f"c{number}"
        cases.setdefault(split, []).append(case_id)
        if split != "train":
            key = keys.held_out(data, split, case_id)
            entry = write_scan(store, key, case_id, to_grid(scan, spacing_mm))
            entry = replace(entry, patient=patients[number] if patients else number)
            held.setdefault(split, []).append(entry)
    recipe = Recipe.model_validate({"data": {"spacing_mm": spacing_mm}, "segment": {"second_looks": 0}})
    config = recipe.data.model_dump(mode="json")
    held_out = {split: tuple(entries) for split, entries in held.items()}
    of_split = {split: tuple(names) for split, names in cases.items()} if splits else {}
    written = Manifest(data, "f", config, (16, 16, 16), {}, held_out, of_split, {}, ())
    store.put(keys.data_manifest(data), written.to_bytes())
    manifest = load_manifest(store, data)
    return manifest, publish(store, run, manifest, recipe)


def publish(store: Store, run: str, manifest: Manifest, recipe: Recipe) -> Published:
    tree, root = store_recipe(recipe), keys.run_root(run)
    store.put_json(
        keys.run(root), asdict(Run(run, "a", manifest.name, manifest.sha256, tree, {}, "2026-01-01"))
    )
    state = TrainState("a", 3, 1, manifest.sha256, tree, data=manifest.name)
    checkpoints = Checkpoints(store, root)
    checkpoints.publish_best(checkpoints.commit(state, {}, {}), state, b"not read here")
    return load_published(store, run)
