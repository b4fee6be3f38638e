"""The data card: what a data set holds, as JSON for scripts and as one HTML page with pictures.

Everything comes from the manifest and the shards, so what the pictures show is what training sees. Both
files lie beside the manifest, hold case ids and no other name, and are the same bytes whoever writes them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from lungseg.dataset.case import IGNORE, Nodule
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.patches import STRATA
from lungseg.dataset.shards import POSITIVE, Extent, Patch, fetch, patches_of
from lungseg.dataset.splits import SPLITS
from lungseg.show import page
from lungseg.storage import Store, keys, to_json

SIZES_MM = (0.0, 6.0, 10.0, 20.0, math.inf)
"""Bounds of the size bins: the diameter of a ball of the nodule's volume."""
PICTURES = 24
_COUNTED = (("scan", "scans"), ("patient", "patients"), ("nodule", "nodules"), ("patch", "patches"))


def write_card(store: Store, manifest: Manifest) -> None:
    """card.html and then card.json beside the manifest, unless they are there."""
    page, tree = (keys.card(manifest.name, kind) for kind in ("html", "json"))
    if store.exists(tree) and store.get_json(tree)["manifest_sha256"] == manifest.sha256:
        return
    card = summarize(manifest)
    store.put(page, render(card, _pictures(store, manifest)).encode())
    store.put(tree, to_json(card))


def describe(manifest: Manifest) -> str:
    """A line for each split: its scans, patients, nodules and patches; and for each doubt about them."""
    lines = []
    for split, counts in manifest.counts.items():
        of_each = ", ".join(f"{counts[one]} {one}" for one in STRATA if one in counts)
        totals = ", ".join(f"{counts[many]} {one if counts[many] == 1 else many}" for one, many in _COUNTED)
        lines.append(f"{split:>5}: {totals}{f' ({of_each})' if of_each else ''}")
    if share := manifest.config["shard"].get("positive_share"):
        patches, on_nodules = sum(manifest.rows("train")), sum(manifest.positives("train"))
        lines.append(
            f"a pass over train gives {patches} patches, {on_nodules} of them on nodules "
            f"(data.shard.positive_share={share:g})"
        )
    return "\n".join([*lines, *(f"warning: {one}" for one in doubts(manifest))])


def doubts(manifest: Manifest) -> list[str]:
    """What makes a split useless although it has scans, and which scans are probably not in HU."""
    use = {"train": "nothing can be learnt from it", "val": "it cannot choose the best epoch"}
    silent = {s for s, counts in manifest.counts.items() if counts["scans"] and not counts["nodules"]}
    found = [f"{split} holds no nodule: {why}" for split, why in use.items() if split in silent]
    other = [(case_id, facts.not_hu) for case_id, facts in manifest.scans.items() if facts.not_hu]
    for case_id, why in other[:1]:
        found.append(f"{len(other)} scans are probably not in HU, such as {case_id}: {why}")
    return found


def summarize(manifest: Manifest) -> dict[str, Any]:
    """The card's figures. Spacings are those of the scans as they were read, in mm."""
    facts = manifest.scans.values()
    nodules = [nodule for one in facts for nodule in one.nodules]
    return {
        "data": manifest.name,
        "manifest_sha256": manifest.sha256,
        "settings": manifest.config,
        "splits": manifest.counts,
        "patients_by": manifest.patients_by,
        "doubts": doubts(manifest),
        "excluded": {
            "codes": dict(Counter(one.code for one in manifest.excluded).most_common()),
            "scans": [asdict(one) for one in manifest.excluded],
        },
        "slice_distance_mm": histogram([one.spacing_mm[0] for one in facts], 0.25),
        "pixel_mm": histogram([one.spacing_mm[1] for one in facts], 0.1),
        "slices": histogram([float(one.shape_zyx[0]) for one in facts], 50),
        "nodules_by_size": {
            split: by_size([n for case in manifest.cases[split] for n in manifest.scans[case].nodules])
            for split in SPLITS
        },
        "nodules_by_readers": dict(sorted(Counter(str(n.readers) for n in nodules if n.readers).items())),
        "reader_dice_by_size": reader_agreement(nodules),
    }


def histogram(values: Sequence[float], width: float) -> list[dict[str, float]]:
    """Counts of `values` in bins [from, to) of one width, from the lowest to the highest; [] for none.

    A value within a billionth of a bound counts above it: 0.3 is in [0.3, 0.4), whatever floats say.
    """
    counts = Counter(math.floor(value / width + 1e-9) for value in values)
    if not counts:
        return []
    bins = range(min(counts), max(counts) + 1)
    return [{"from": round(n * width, 6), "to": round((n + 1) * width, 6), "count": counts[n]} for n in bins]


def by_size(nodules: Sequence[Nodule]) -> dict[str, int]:
    return {title: len(found) for title, found in _bins(nodules).items()}


def reader_agreement(nodules: Iterable[Nodule]) -> dict[str, dict[str, float | int | None]]:
    """For each size bin and "all" the mean over nodules of the readers' mean pairwise Dice."""
    known = [nodule for nodule in nodules if nodule.reader_dice is not None]
    groups = {**_bins(known), "all": known}
    return {
        title: {
            "nodules": len(found),
            "dice": round(fmean(n.reader_dice or 0.0 for n in found), 4) if found else None,
        }
        for title, found in groups.items()
    }


def _bins(nodules: Sequence[Nodule]) -> dict[str, list[Nodule]]:
    between = (f"{low:g}-{high:g} mm" for low, high in pairwise(SIZES_MM[1:-1]))
    titles = (f"< {SIZES_MM[1]:g} mm", *between, f">= {SIZES_MM[-2]:g} mm")
    return {
        title: [nodule for nodule in nodules if low <= nodule.equivalent_diameter_mm < high]
        for title, (low, high) in zip(titles, pairwise(SIZES_MM), strict=True)
    }


def _pictures(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """One nodule each of record batches at equal distances through the training set."""
    places = [
        Extent(shard, number, number + 1)
        for shard in manifest.shards["train"]
        for number, batch in enumerate(shard.batches)
        if batch.positives
    ]
    count = min(PICTURES, len(places))
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for n in range(count):
        place = places[n * len(places) // count]
        rows = patches_of(fetch(store, place), manifest.patch_shape_zyx, place.shard.codec)
        patch = next(row for row in rows if row.stratum == POSITIVE)
        seen.setdefault((patch.case_id, patch.nodule_id), picture(patch))
    return list(seen.values())


def picture(patch: Patch) -> dict[str, Any]:
    """The axial slice with most of the target: a PNG in the lung window, and outlines of masks in mm.

    Row and column are the patch's y and x, so the patient's right is on the left and front on top.
    """
    target = patch.mask == 1
    z = int(target.sum(axis=(1, 2)).argmax())
    _, height_mm, width_mm = np.multiply(patch.mask.shape, patch.spacing_mm).round(3).tolist()
    return {
        "case_id": patch.case_id,
        "nodule_id": patch.nodule_id,
        "width_mm": width_mm,
        "height_mm": height_mm,
        "png": page.png(patch.image_hu[z]),
        "target": page.outlines(target[z], patch.spacing_mm),
        "ignore": page.outlines(patch.mask[z] == IGNORE, patch.spacing_mm),
    }


def render(card: dict[str, Any], pictures: Sequence[dict[str, Any]]) -> str:
    """One page that needs no other file, no script and no network."""
    return page.render("lungseg.dataset", "card.html.j2", {}, card=card, pictures=pictures, splits=SPLITS)
