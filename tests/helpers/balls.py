"""A small data set to train on within seconds, written straight as shards."""

from __future__ import annotations

import numpy as np

from lungseg.dataset.case import IGNORE
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.dataset.shards import Patch, write_shard
from lungseg.storage import Store
from lungseg.storage.keys import data_manifest

SHAPE_ZYX = (16, 16, 16)


def write_balls(store: Store, name: str = "balls", train: int = 24, val: int = 6) -> Manifest:
    """Patches of a ball of tissue in noisy lung, every third without one; ignore voxels in a corner."""
    written = {}
    for split, count in (("train", train), ("val", val)):
        patches = [_patch(f"{split}-{number}", number) for number in range(count)]
        groups = [patches[i : i + 3] for i in range(0, count, 3)]
        written[split] = (
            write_shard(store, f"data/{name}/shards/{split}-00000.arrow", groups, SHAPE_ZYX, "lz4"),
        )
    manifest = Manifest(name, "balls", {}, SHAPE_ZYX, written, {}, {}, {}, ())
    store.put(data_manifest(name), manifest.to_bytes())
    return load_manifest(store, name)


def _patch(case_id: str, number: int) -> Patch:
    random = np.random.default_rng(number)
    image = random.normal(-800, 40, SHAPE_ZYX)
    mask = np.zeros(SHAPE_ZYX, np.uint8)
    if number % 3:
        centre, radius = random.uniform(5, 11, 3), random.uniform(2.5, 5)
        distance_mm = np.linalg.norm(np.moveaxis(np.indices(SHAPE_ZYX), 0, -1) - centre, axis=-1)
        mask[distance_mm <= radius] = 1
        image[mask == 1] += 800
    mask[-2:, -2:, -2:] = IGNORE
    stratum = "nodule" if number % 3 else "lung"
    return Patch(image.astype(np.int16), mask, case_id, "", stratum, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
