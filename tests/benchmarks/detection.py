"""Detection on whole scans after equal minutes of training: lungseg beside MONAI.

    uv run python tests/benchmarks/detection.py --peer-python peers/bin/python --work FOLDER \
        [--minutes 8] [--seeds 0 1 2] [--only lungseg MONAI] [--set a.b=c] [--choose] \
        [--peer-rate 2e-3] [--peer-norm batch]

24 hard phantoms (`lungseg phantom --hard`), 16 to train on and 8 to test. Every contestant gets the same
scans on the grid of 1 mm, the same two cores and minutes, counted from the start of its loop (what prepares
the data is not counted), and a U-Net of equal levels; it says of each test scan a probability, and all are
scored here by the code of `lungseg evaluate`, with the same threshold, smallest size and candidates. MONAI
has RandCropByPosNegLabel, DynUNet and SlidingWindowInferer on the body's box; it knows no lungs, so a second
row has what lies in them (by lungseg). lungseg's second row is the same network without second looks. Nobody
validates: the network of the last step is scored. Contestants take turns; phantoms, data set and results
stay in the folder, and measured rows are not measured again. With --choose 12 of the 16 are trained on and
the other 4 tested, which is where settings may be chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import ray

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from detection_ours import DATA, RECIPE, SETTINGS  # noqa: E402

from lungseg.config import Recipe, load_recipe  # noqa: E402
from lungseg.dataset.manifest import Manifest, load_manifest  # noqa: E402
from lungseg.dataset.prepare import prepare  # noqa: E402
from lungseg.dataset.stored_scans import read_scan  # noqa: E402
from lungseg.evaluate.case import CaseResult, evaluate_case  # noqa: E402
from lungseg.evaluate.kept import Prediction  # noqa: E402
from lungseg.evaluate.summary import summary_tree  # noqa: E402
from lungseg.scan.lungs import lung_mask  # noqa: E402
from lungseg.scan.resample import resample, resample_onto  # noqa: E402
from lungseg.sources import lidc  # noqa: E402
from lungseg.sources.phantom.write import write_phantom  # noqa: E402
from lungseg.storage import Store, open_store  # noqa: E402
from lungseg.telemetry import progress  # noqa: E402

TRAIN, TEST, SEED = 16, 8, 0
CHOICE = "choice"
CONTESTANTS = ("lungseg", "MONAI")
COLUMNS = {
    "cpm": "CPM",
    "sensitivity": "sensitivity",
    "false_positives_per_scan": "false positives a scan",
    "per_nodule_dice": "Dice a nodule",
    "dice": "Dice a scan",
    "soft_dice": "soft Dice a scan",
    "ece": "calibration error",
}


def make_data(work: Path, recipe: Recipe) -> tuple[Store, Manifest]:
    """The data set in a store, and for MONAI each training scan as .npz on the same grid: made once."""
    store = open_store(str(work / "store"))
    if (work / "data_is_made").exists():
        return store, load_manifest(store, DATA)
    choosing = work.name == CHOICE
    dicom = (work.parent if choosing else work) / "dicom"
    with progress("phantoms") as report:
        write_phantom(dicom, TRAIN + TEST, SEED, report, hard=True)
    cases, _ = lidc.find_cases(dicom, recipe.data.lidc)
    table = every(3, sorted(case.case_id for case in cases))
    if choosing:
        table = every(4, [name for name, split in table.items() if split == "train"])
    cases = [case for case in cases if case.case_id in table]
    (work / "split.json").write_text(json.dumps(table))
    with progress("scans prepared") as report:
        manifest = prepare(store, DATA, cases, recipe.data, report)
    ray.shutdown()  # nothing runs beside the contestants
    (work / "train").mkdir(exist_ok=True)
    for case in cases:
        if case.case_id in manifest.cases["train"]:
            scan = case.load()
            working = resample(scan.volume, recipe.data.spacing_mm)
            nodule = (scan.numbers > 0).astype(np.float32)
            mask = resample_onto(nodule, scan.volume.geometry, working.geometry)
            np.savez(work / "train" / case.case_id, hu=working.volume_hu, mask=mask >= 0.5)
    (work / "data_is_made").touch()
    return store, manifest


def every(count: int, names: list[str]) -> dict[str, str]:
    return {name: "test" if number % count == count - 1 else "train" for number, name in enumerate(names)}


def run(contestant: str, seed: int, work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train, predict and score; the rows of the results."""
    recipe = load_recipe(RECIPE, [*SETTINGS, f"data.split.file={work / 'split.json'}"])
    store, manifest = make_data(work, recipe)
    entries = manifest.require_held_out("test")
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        facts = {"work": str(work), "folder": folder, "seed": seed, "minutes": options.minutes}
        facts |= {"settings": options.set, "rate": options.peer_rate, "norm": options.peer_norm}
        job.write_text(json.dumps(facts))
        if contestant == "MONAI":
            for entry in entries:
                np.save(Path(folder) / f"{entry.case_id}.hu.npy", read_scan(store, entry).volume.volume_hu)
        ours = contestant == "lungseg"
        script = HERE / ("detection_ours.py" if ours else "detection_peer.py")
        done = subprocess.run(
            [sys.executable if ours else options.peer_python, str(script), str(job)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{contestant} failed: {done.stderr[-3000:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        scored = Scored(work, contestant, Path(folder), recipe)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            of_scans = list(pool.map(scored.scan, range(len(entries))))
    for number, title in enumerate(titles(contestant, options)):
        tree = summary_tree([scan[number] for scan in of_scans], recipe.segment.candidate_score)
        figures = tree["summary"] | {
            "cpm": tree["detection"]["luna16"]["cpm"]["value"],
            "ece": tree["calibration"]["ece"],
            "cpm_by_score": tree["detection"]["cpm_by_score"],
        }
        chosen = {name: figures[name] for name in (*COLUMNS, "nodules", "cpm_by_score")}
        yield {"contestant": title, "seed": seed, "minutes": options.minutes, **told, **chosen}


def titles(contestant: str, options: argparse.Namespace) -> list[str]:
    if contestant == "lungseg":
        title = " ".join([contestant, *options.set])
        return [title, f"{title}, without second looks"]
    title = f"{contestant}, {options.peer_norm} norm, rate {options.peer_rate:g}"
    return [title, f"{title}, in the lungs"]


@dataclass(frozen=True)
class Scored:
    work: Path
    contestant: str
    folder: Path
    recipe: Recipe

    def scan(self, number: int) -> list[CaseResult]:
        """What a test scan's probabilities are worth, for each of `titles`."""
        store, manifest = make_data(self.work, self.recipe)
        entry = manifest.require_held_out("test")[number]
        stored = read_scan(store, entry)
        lungs = lung_mask(stored.volume)
        ours = self.contestant == "lungseg"
        scored = []
        for suffix, within in [("", lungs), (".plain", lungs)] if ours else [("", None), ("", lungs)]:
            probability = np.load(self.folder / f"{entry.case_id}{suffix}.npy")
            prediction = Prediction(stored.volume.geometry, probability, within)
            scored.append(evaluate_case(stored, prediction, self.recipe.segment, entry.case_id, number))
        return scored


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and the least and the most."""
    by_score = {score: f"CPM by {score}" for score in rows[0]["cpm_by_score"]}
    lines = [
        f"| minutes | contestant | seeds | steps | {' | '.join((COLUMNS | by_score).values())} |",
        f"|--:|---|--:|--:|{'--:|' * len(COLUMNS | by_score)}",
    ]
    for minutes, title in dict.fromkeys((row["minutes"], row["contestant"]) for row in rows):
        those = [row for row in rows if (row["minutes"], row["contestant"]) == (minutes, title)]
        steps = f"{statistics.median(row['steps'] for row in those):.0f}"
        cells = []
        for name in COLUMNS | by_score:
            values = [(row | row["cpm_by_score"])[name] for row in those]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {minutes:g} | {title} | {len(those)} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, help="that has torch and monai")
    parser.add_argument("--work", type=Path, required=True, help="where phantoms and results stay")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--peer-rate", type=float, default=2e-3, help="learning rate, at its highest")
    parser.add_argument("--peer-norm", choices=("batch", "instance"), default="batch")
    parser.add_argument("--set", nargs="+", default=[], help="settings over lungseg's recipe")
    parser.add_argument("--choose", action="store_true", help="train and test on the scans to train on")
    options = parser.parse_args()
    os.environ.setdefault("LUNGSEG_CASE_KEY", "a key for this benchmark")
    work = options.work.resolve() / (CHOICE if options.choose else "")
    work.mkdir(parents=True, exist_ok=True)
    results = work / "detection.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed in options.seeds:
        for contestant in options.only:
            if (titles(contestant, options)[0], seed, options.minutes) in {
                (row["contestant"], row["seed"], row["minutes"]) for row in rows
            }:
                continue
            for row in run(contestant, seed, work, options):
                rows.append(row)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['contestant']}, seed {seed}: CPM {row['cpm']:.3f}", file=sys.stderr, flush=True)
    if rows:
        print(f"{rows[0]['nodules']} nodules in {TRAIN // 4 if options.choose else TEST} scans")
        print(table(rows))


if __name__ == "__main__":
    main()
