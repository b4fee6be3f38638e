"""What scoring costs besides the network: one scan of 300 x 512 x 512, and 20 of them at another threshold.

    uv run python tests/benchmarks/evaluate.py [--scans 20]

A scan has 8 nodules of 4 to 24 mm, each outlined by four readers; the network marks them a voxel off, and 30
more places, of which about half pass the threshold. Each row is a fresh process: wall and CPU seconds from
the store to the figures (one scan) or to the written report (20 scans), without imports, and the peak of its
memory with all that it imported.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.scored import hold_out, labelled

from lungseg.config import resegmented
from lungseg.dataset.case import Outlines
from lungseg.dataset.manifest import load_manifest
from lungseg.dataset.stored_scans import read_scan
from lungseg.evaluate.kept import Prediction, keep
from lungseg.evaluate.protocol import Scoring, evaluate_split
from lungseg.evaluate.scans import Member, held_out
from lungseg.runs.run import load_published
from lungseg.storage import Store, keys, open_store

SHAPE, SPACING_MM, WORKING_MM = (300, 512, 512), (1.0, 0.7, 0.7), (1.0, 1.0, 1.0)
PLACES = 30
RADII_MM = (2, 2.5, 3, 4, 5, 7, 9, 12)


def make(store: Store, scans: int) -> None:
    """The data set, the run, and what its network said of each scan."""
    random = np.random.default_rng(0)
    numbers = np.zeros(SHAPE, np.int16)
    outlines = {}
    for number, radius in enumerate(RADII_MM, 1):
        centre = random.integers([60, 130, 130], [240, 380, 380])
        inside, first = _ball(centre, radius, SPACING_MM)
        numbers[tuple(slice(a, a + n) for a, n in zip(first, inside.shape, strict=True))][inside] = number
        outlines[number] = Outlines(first, np.stack([inside] * 4))
    scan = labelled(
        numbers, SPACING_MM, diameters_mm=[2.0 * radius for radius in RADII_MM], outlines=outlines
    )
    scan.volume.volume_hu[:] = random.integers(-1000, 200, SHAPE, dtype=np.int16)
    manifest, model = hold_out(store, [scan] * scans, WORKING_MM)
    working = read_scan(store, manifest.held_out["test"][0]).volume.geometry
    probability = 0.01 * random.random(working.shape_zyx, dtype=np.float32)
    for nodule, radius in zip(scan.nodules, RADII_MM, strict=True):
        _mark(probability, np.rint(working.to_index_zyx(nodule.centre_lps_mm)).astype(int) + 1, radius, 0.9)
    for _ in range(PLACES):
        centre = random.integers(50, np.subtract(working.shape_zyx, 50))
        _mark(probability, centre, random.uniform(2, 6), random.uniform(0.2, 1))
    box = (slice(10, 290), slice(50, 310), slice(30, 330))  # as large as the lungs of an adult
    lungs = np.ones(probability[box].shape, np.uint8)
    said = Prediction(working.part(box), probability[box].astype(np.float16), lungs)
    for entry in manifest.held_out["test"]:
        keep(store, entry, model, "test", said)


def _ball(
    centre: np.ndarray, radius_mm: float, spacing_mm: tuple[float, ...]
) -> tuple[np.ndarray, tuple[int, int, int]]:
    reach = [int(radius_mm / step) + 1 for step in spacing_mm]
    offsets = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), axis=-1)
    z, y, x = np.subtract(centre, reach).tolist()
    return np.linalg.norm(offsets * spacing_mm, axis=-1) <= radius_mm, (z, y, x)


def _mark(probability: np.ndarray, centre: np.ndarray, radius: float, top: float) -> None:
    offsets = np.stack(np.meshgrid(*[np.arange(-18, 19)] * 3, indexing="ij"), axis=-1)
    blob = top / (1 + np.exp(1.5 * (np.linalg.norm(offsets, axis=-1) - radius)))
    place = tuple(slice(max(0, c - 18), c + 19) for c in centre.tolist())
    cut = tuple(
        slice(s.start - c + 18, s.start - c + 18 + n)
        for s, c, n in zip(place, centre.tolist(), probability[place].shape, strict=True)
    )
    probability[place] = np.maximum(probability[place], blob[cut])


def no_network(windows: np.ndarray) -> np.ndarray:
    raise AssertionError("the network was asked")


def measure(store: Store, what: str) -> None:
    manifest, model = load_manifest(store, "d"), load_published(store, "r")
    began, cpu = time.monotonic(), time.process_time()
    if what == "one scan":
        scan, *_ = held_out(store, [Member(model, manifest, no_network)], "test")
        result, _ = Scoring(scan, model.recipe.segment, False).run()
        found = f"{result.components} components"
    else:
        other = replace(model, recipe=resegmented(model.recipe, ["segment.threshold=0.4"]))
        with tempfile.TemporaryDirectory() as out:
            members = [Member(other, manifest, no_network)]
            done = evaluate_split(store, members, "test", Path(out), lambda *_: None, lambda *_: None)
        found = f"{done.model['cases']} scans"
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    load = os.getloadavg()[0]
    print(f"| {what} | {seconds:.1f} | {cpu:.1f} | {peak_mib:.0f} | {load:.1f} | {found} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--measure", nargs=2, metavar=("STORE", "WHAT"))
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(open_store(arguments.measure[0]), arguments.measure[1])
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        make(store, arguments.scans)
        size_mib = (
            sum(store.size(item.key) or 0 for item in store.find(keys.run_root("r")))
            / arguments.scans
            / (1 << 20)
        )
        print(f"kept of a scan: {size_mib:.0f} MiB\n")
        print("| what | wall s | CPU s | peak MiB | load | found |\n|---|--:|--:|--:|--:|---|", flush=True)
        for what in ("one scan", "all at another threshold"):
            subprocess.run([sys.executable, __file__, "--measure", folder, what], check=True)
    return None


if __name__ == "__main__":
    main()
