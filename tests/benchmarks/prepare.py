"""From a DICOM series to 1 mm and patches: lungseg beside MONAI, and beside SimpleITK alone as the floor.

    uv run python tests/benchmarks/prepare.py --peer-python peers/bin/python [--rounds 3]

7 series, 6 phantoms and one real chest CT (CPTAC C3N-00247), each with a mask on its own grid. Every
contestant reads both, brings both to 1 mm and cuts patches of 64^3, as many as lungseg cuts of that scan. One
process on one core, then two on one each; imports do not count. lungseg also checks the series, finds the
lungs and chooses hard negatives in them; SimpleITK and MONAI cut anywhere. Contestants take turns within a
round. Memory is the peak of a process, which holds one scan at a time, with everything that it imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config import LidcConfig, PatchConfig
from lungseg.dataset.cutting import cut_patches, to_grid
from lungseg.scan.dicom import read_series
from lungseg.scan.volume import Volume, write_mask
from lungseg.sources import lidc
from lungseg.sources.phantom.write import write_phantom

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.servers import REAL_DATA  # noqa: E402

PHANTOMS = 6
CONTESTANTS = ("lungseg", "SimpleITK", "MONAI")


def write_scans(folder: Path) -> list[dict[str, Any]]:
    """The series, a mask beside each, and how many patches lungseg cuts of it."""
    write_phantom(folder / "phantoms", PHANTOMS, 0, lambda done, total: None)
    cases, _ = lidc.find_cases(folder / "phantoms", LidcConfig())
    scans = []
    for case in cases:
        scan = case.load()
        stored = to_grid(scan, (1.0, 1.0, 1.0))
        cut = cut_patches("c", scan, stored, PatchConfig())
        scans.append(_scan(folder, case.folder, scan.volume, scan.mask, len(cut)))
    if (REAL_DATA / "ct_c3n00247").exists():
        volume = read_series(REAL_DATA / "ct_c3n00247")
        mask = np.zeros(volume.geometry.shape_zyx, np.uint8)
        mask[45:50, 240:260, 150:170] = 1  # has no mask of its own: any place will do
        scans.append(_scan(folder, REAL_DATA / "ct_c3n00247", volume, mask, 18))
    return scans


def _scan(folder: Path, series: Path, volume: Volume, mask: np.ndarray, patches: int) -> dict[str, Any]:
    path = folder / f"{series.name}.nii.gz"
    write_mask(path, mask, volume.geometry)
    return {"series": str(series), "mask": str(path), "patches": patches}


def run(name: str, scans: list[dict[str, Any]], cores: int, python: str, folder: Path) -> dict[str, Any]:
    """Scans a minute, the largest peak of a process in MiB, and seconds of a scan's stages (lungseg's)."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **single, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
    processes = []
    for core in range(cores):
        job = folder / f"job{core}.json"
        job.write_text(json.dumps(scans[core::cores]))
        command = ["taskset", "-c", str(core), python, str(HERE / "prepare_contestants.py"), name, str(job)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    for process in processes:
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            sys.exit(f"{name} failed: {process.communicate()[1][-2000:]}")
    began = time.monotonic()
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    results = []
    for process in processes:
        out, errors = process.communicate()
        if process.returncode:
            sys.exit(f"{name} failed: {errors[-2000:]}")
        results.append(json.loads(out.splitlines()[-1]))
    seconds = time.monotonic() - began
    peak = max(result["peak_mib"] for result in results)
    return {"pace": 60 * len(scans) / seconds, "peak_mib": peak, "stages": results[0]["stages"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, help="that has monai and itk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    options = parser.parse_args()
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans = write_scans(folder)
        print(f"{len(scans)} series, {sum(scan['patches'] for scan in scans)} patches", file=sys.stderr)
        for number in range(options.rounds):
            for cores in (1, 2):
                for contestant in options.only:
                    python = options.peer_python if contestant == "MONAI" else sys.executable
                    one = run(contestant, scans, cores, python, folder)
                    found[contestant, cores].append(one)
                    print(f"round {number + 1}, {contestant}, {cores}: {one}", file=sys.stderr, flush=True)
    print("| contestant | cores | scans a minute | lungseg by it | peak MiB |\n|---|--:|--:|--:|--:|")
    for (contestant, cores), rows in found.items():
        ours = found["lungseg", cores]
        ratios = [mine["pace"] / its["pace"] for mine, its in zip(ours, rows, strict=False)]
        peak = max(row["peak_mib"] for row in rows)
        paces = spread([row["pace"] for row in rows], 1)
        print(f"| {contestant} | {cores} | {paces} | {spread(ratios, 2)} | {peak:.0f} |")
    stages = [row["stages"] for row in found["lungseg", 1]]
    for stage in stages[0] if stages else ():
        print(f"{stage}: {statistics.median(one[stage] for one in stages):.2f} s of a scan on one core")


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
