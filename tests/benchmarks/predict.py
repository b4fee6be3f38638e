"""`lungseg predict` beside MONAI's SlidingWindowInferer: a scan from its DICOM folder to a mask in a file.

    uv run python tests/benchmarks/predict.py --peer-python peers/bin/python [--rounds 3]

The same plain U-Net (MONAI's DynUNet of equal levels and widths), windows of 96^3 that share a quarter of a
side, lungseg's as small as their number allows, 1 mm, two threads. Each prediction is a new process;
contestants take turns within a round. Every one brings the scan to 1 mm and the answer back: MONAI tiles the
body's box, lungseg what has lung in it, and it also measures nodules and writes its page. The real chest CT
is CPTAC C3N-00247, which lies in `ct_c3n00247` of the folder that `tests/helpers/servers.py` names REAL_DATA;
without it there is only the phantom.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.networks import publish_untrained  # noqa: E402
from helpers.servers import REAL_DATA  # noqa: E402
from predict_contestants import DEPTH, OVERLAP, SIDE  # noqa: E402

from lungseg.dataset.manifest import Manifest  # noqa: E402
from lungseg.dataset.shards import Patch, write_shard  # noqa: E402
from lungseg.sources.phantom.write import write_phantom  # noqa: E402
from lungseg.storage import Store, keys, open_store  # noqa: E402

PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
PAIR = ("lungseg", "MONAI")
Found = dict[str, Any]


def publish(store: Store, widths: list[int]) -> None:
    """A run for each width and precision. Nothing passes the threshold: random weights mark noise, and to
    measure that takes longer than the windows."""
    shards = {
        split: (write_shard(store, f"data/d/shards/{split}.arrow", [[_patch()]], (SIDE,) * 3, "planes-lz4"),)
        for split in ("train", "val")
    }
    manifest = Manifest("d", "benchmark", {}, (SIDE,) * 3, shards, {}, {}, {}, ())
    store.put(keys.data_manifest("d"), manifest.to_bytes())
    for width, (name, policy) in product(widths, PRECISIONS.items()):
        publish_untrained(store, f"w{width}-{name}", manifest, [
            f"model.width={width}", f"model.depth={DEPTH}", "model.downsampling=stride",
            f"train.precision={policy}", "train.global_batch=1",
            f"segment.window_zyx=[{SIDE}, {SIDE}, {SIDE}]",
            f"segment.overlap={OVERLAP}",
            "segment.threshold=0.999",
            "segment.second_looks=0",
        ])  # fmt: skip


def _patch() -> Patch:
    """No network is trained on it, but a run must fit its data."""
    hu = np.zeros((SIDE,) * 3, np.int16)
    return Patch(hu, hu.astype(np.uint8), "c", "", "nodule", (0.0,) * 3, (1.0,) * 3)


def find_scans(folder: Path, real: Path) -> dict[str, Path]:
    """What is predicted, by name: one phantom, and the real chest CT where it is."""
    write_phantom(folder / "phantom", 1, 0, lambda done, total: None)
    scans = {"phantom": next((folder / "phantom").rglob("*.dcm")).parent}
    if real.is_dir():
        return {"real CT": real, **scans}
    print(f"real CT is not at {real}: fetch CPTAC C3N-00247's chest series there", file=sys.stderr)
    return scans


def measure(python: str, name: str, job: dict[str, Any]) -> Found:
    """Seconds a window (mean of all but the first), a scan and to the first window, and MiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({**job, "out": f"{folder}/out"}))
        command = [python, str(HERE / "predict_contestants.py"), name, str(path)]
        limited = {
            "OMP_NUM_THREADS": str(job["threads"]),
            "TF_NUM_INTRAOP_THREADS": str(job["threads"]),
            "TF_NUM_INTEROP_THREADS": str(job["threads"]),
        }
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limited})
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    first, last, count = told["windows"][0], told["windows"][-1], len(told["windows"])
    return {
        "window": (last - first) / max(1, count - 1), "scan": told["scan"], "first": first,
        "peak_mib": told["peak_mib"], "windows": count, "load": os.getloadavg()[0],
    }  # fmt: skip


def row(title: str, ours: list[Found], theirs: list[Found]) -> str:
    """One line of the table: medians, and ratios round by round (lowest to highest)."""

    def both(field: str, digits: int) -> str:
        return " | ".join(
            f"{statistics.median(one[field] for one in rows):.{digits}f}" for rows in (ours, theirs)
        )

    def ratio(field: str) -> str:
        found = [a[field] / b[field] for a, b in zip(ours, theirs, strict=True)]
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    return (
        f"| {title} | {ours[0]['windows']}, {theirs[0]['windows']} | {both('window', 3)} | {ratio('window')} "
        f"| {both('scan', 1)} | {ratio('scan')} | {both('first', 1)} | {both('peak_mib', 0)} |"
    )


def compare(
    scans: dict[str, Path], widths: list[int], precisions: list[str], peer: str, rounds: int, base: Found
) -> list[Found]:
    """Prints the table; each measurement is a record of what is returned."""
    print("| scan | width | precision | windows | s/window | MONAI | ratio | s/scan | MONAI | ratio "
          "| first window, s | MONAI | peak MiB | MONAI |")  # fmt: skip
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    records: list[Found] = []
    for (scan, series), width in product(scans.items(), widths):
        found: dict[tuple[str, str], list[Found]] = {}
        for _, precision, name in product(range(rounds), precisions, PAIR):
            job = {**base, "series": str(series), "width": width, "precision": precision}
            job["run"] = f"w{width}-{precision}"
            one = measure(peer if name == "MONAI" else sys.executable, name, job)
            found.setdefault((name, precision), []).append(one)
            records.append({"scan": scan, "width": width, "precision": precision, "by": name, **one})
        for precision in precisions:
            title = f"{scan} | {width} | {precision}"
            print(row(title, *(found[name, precision] for name in PAIR)), flush=True)
        ours, theirs = (
            min(precisions, key=lambda one: statistics.median(r["scan"] for r in found[name, one]))
            for name in PAIR
        )
        title = f"{scan} | {width} | fastest: {ours}, {theirs}"
        print(row(title, found["lungseg", ours], found["MONAI", theirs]), flush=True)
    loads = np.array([record["load"] for record in records])
    print(f"\nload of the machine: {np.median(loads):.1f} ({loads.min():.1f} to {loads.max():.1f})")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", required=True, help="of an environment with torch, monai and itk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32])
    # A CPU without bfloat16 takes minutes for a window of it.
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--scans", nargs="+", help="some of: real CT, phantom")
    parser.add_argument("--real", type=Path, default=REAL_DATA / "ct_c3n00247", help="folder of the real CT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for every single measurement")
    options = parser.parse_args()
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "LUNGSEG_CASE_KEY": "the key of a benchmark"}
    with tempfile.TemporaryDirectory() as folder:
        publish(open_store(folder), options.widths)
        scans = find_scans(Path(folder) / "scans", options.real)
        chosen = {name: scans[name] for name in options.scans or scans}
        base = {"store": folder, "threads": options.threads}
        records = compare(
            chosen, options.widths, options.precisions, options.peer_python, options.rounds, base
        )
    if options.json:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
