"""Segmentation quality after equal minutes of training, on real nodules: lungseg beside MONAI.

    uv run python tests/benchmarks/quality.py --peer-python peers/bin/python --results quality.jsonl \
        [--only lungseg lungseg-pretrained dynunet dynunet-narrow basicunet] [--minutes 5 15] \
        [--folds 0 1 2 3 4] [--seeds 0 1] [--pretrained STORE] [--keep FOLDER] [--set a.b=c] \
        [--peer-rate 2e-3] [--peer-batch 4]

94 real LIDC nodules of 94 patients (51^3 voxels of 1 mm around each), 5 folds of patients. Every contestant
trains on the same patients with the same two cores for the same minutes, counted from the start of its loop
(graph tracing included, imports and the building of the network not), predicts the fold's
test crops by windows of 48^3, as trained, and is scored here by the Dice of each nodule at probability 0.5.
Nobody validates: the network of the last step is scored, with the mean over mirror images, as nnU-Net does,
and without. `lungseg-pretrained` begins with the weights of the run `phantoms` of STORE, a folder; whom that
run must not have seen, `--patients` prints. FOLDER is given the weights of each row. Contestants take turns
within a fold. Results are appended to a file as they come and are not measured again, so the hours may be had
in pieces; the table is printed from the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.servers import REAL_DATA  # noqa: E402

from lungseg.sources import pairs  # noqa: E402

CROPS = REAL_DATA / "lidc_crops"
CONTESTANTS = ("lungseg", "lungseg-pretrained", "dynunet", "dynunet-narrow", "basicunet")
PRETRAINED = "phantoms"
SMALL_VOXELS = 300


def split(fold: int) -> dict[str, list[str]]:
    """Names of the crops, one a patient."""
    names = sorted(file.name.removesuffix(".nii.gz") for file in (CROPS / "images").iterdir())
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    test = shuffled[fold::5]
    return {"train": [name for name in shuffled if name not in test], "test": test}


def run(contestant: str, fold: int, seed: int, minutes: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train, predict and score; a row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        work = {"crops": str(CROPS), "split": split(fold), "minutes": minutes, "folder": folder}
        work |= {"name": contestant, "batch": options.peer_batch, "rate": options.peer_rate, "seed": seed}
        work |= {"settings": [*options.set, f"train.seed={seed}"]}
        if contestant == "lungseg-pretrained":
            begun = Path(folder) / "store" / "runs" / PRETRAINED
            shutil.copytree(options.pretrained / "runs" / PRETRAINED, begun)
            work["settings"].append(f"train.init_from={PRETRAINED}")
        job.write_text(json.dumps(work))
        ours = contestant.startswith("lungseg")
        script = HERE / ("quality_ours.py" if ours else "quality_peer.py")
        command = [sys.executable if ours else options.peer_python, str(script), str(job)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{contestant} failed: {done.stderr[-3000:]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        scores = {}
        for file in sorted(Path(folder).glob("*.npz")):
            masks = np.load(file)
            scores[file.stem] = {name: score(name, masks[name]) for name in masks.files}
        for weights in Path(folder).glob("weights.*") if options.keep else []:
            title = f"{contestant}-{minutes:g}-fold{fold}-seed{seed}"
            shutil.copyfile(weights, options.keep / f"{title}{weights.suffix}")
    facts |= {"nodules": scores.pop("masks"), **scores}
    return {"contestant": contestant, "fold": fold, "seed": seed, "minutes": minutes, **facts}


def score(name: str, predicted: np.ndarray) -> tuple[float, int]:
    """Dice of a nodule, and its size in voxels."""
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(CROPS / "masks" / f"{name}.nii.gz"))) > 0
    total = int(reference.sum() + predicted.sum())
    return 2 * int((reference & (predicted > 0)).sum()) / max(total, 1), int(reference.sum())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| minutes | contestant | Dice, mean over folds | each fold | small | large | epochs or steps |",
        "|--:|---|--:|---|--:|--:|---|",
    ]
    for minutes in sorted({row["minutes"] for row in rows}):
        for contestant in CONTESTANTS:
            found = [row for row in rows if (row["minutes"], row["contestant"]) == (minutes, contestant)]
            if not found:
                continue
            lines.append(line(minutes, contestant, "nodules", found))
            lines.append(line(minutes, f"{contestant}, no mirror images", "plain", found))
    return "\n".join(lines)


def line(minutes: float, title: str, scores: str, rows: list[dict[str, Any]]) -> str:
    by_fold = {fold: [row for row in rows if row["fold"] == fold] for fold in {row["fold"] for row in rows}}
    folds = [
        statistics.mean(mean(row[scores].values()) for row in of_one) for _, of_one in sorted(by_fold.items())
    ]
    nodules = [nodule for row in rows for nodule in row[scores].values()]
    small = mean(nodule for nodule in nodules if nodule[1] < SMALL_VOXELS)
    large = mean(nodule for nodule in nodules if nodule[1] >= SMALL_VOXELS)
    each = " ".join(f"{fold:.3f}" for fold in folds)
    steps = f"{statistics.median(row['steps'] for row in rows):.0f} steps"
    means = f"{statistics.mean(folds):.3f} | {each} | {small:.3f} | {large:.3f}"
    return f"| {minutes:g} | {title} | {means} | {steps} |"


def lead(rows: list[dict[str, Any]]) -> str:
    """By how much lungseg is ahead on the same nodules, and the standard error of that mean over nodules."""
    dice: dict[tuple[float, str], dict[tuple[str, int], tuple[float, int]]] = {}
    for row in rows:
        one = dice.setdefault((row["minutes"], row["contestant"]), {})
        one.update({(name, row["seed"]): nodule for name, nodule in row["nodules"].items()})
    lines = []
    for (minutes, mine), ours in sorted(dice.items()):
        for peer in [peer for when, peer in sorted(dice) if when == minutes and mine.startswith("lungseg")]:
            theirs = dice[minutes, peer]
            of_each: dict[tuple[str, int], list[float]] = {}
            for name, seed in (ours.keys() & theirs.keys()) if mine != peer else ():
                gain = ours[name, seed][0] - theirs[name, seed][0]
                of_each.setdefault((name, ours[name, seed][1]), []).append(gain)
            sizes: dict[str, list[float]] = {size: [] for size in ("all", "small", "large")}
            for (_, voxels), gains in of_each.items():
                for size in ("all", "small" if voxels < SMALL_VOXELS else "large"):
                    sizes[size].append(statistics.mean(gains))
            told = [f"{size} {with_error(found)}" for size, found in sizes.items() if len(found) > 1]
            if told:
                lines.append(f"{minutes:g} minutes, {mine} less {peer}: {'; '.join(told)}")
    return "\n".join(lines)


def with_error(of_nodules: list[float]) -> str:
    error = statistics.stdev(of_nodules) / len(of_nodules) ** 0.5
    return f"{statistics.mean(of_nodules):+.3f}, standard error {error:.3f}, {len(of_nodules)} nodules"


def mean(nodules: Any) -> float:
    return statistics.mean(dice for dice, _ in nodules)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable, help="that has torch and monai")
    parser.add_argument("--peer-batch", type=int, default=4)
    parser.add_argument("--peer-rate", type=float, default=2e-3, help="the learning rate, at its highest")
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--pretrained", type=Path, help="a folder's store with the run phantoms")
    parser.add_argument("--patients", action="store_true", help="print those of all crops, and do no more")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 15])
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="a folder for the weights of each row")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--set", nargs="+", default=[], help="settings over lungseg's recipe")
    options = parser.parse_args()
    if not CROPS.exists():
        sys.exit(f"the crops are not there: {CROPS}")
    if options.patients:
        print("\n".join(sorted({pairs.patient_of(name) for name in split(0)["train"] + split(0)["test"]})))
        return
    if options.pretrained is None:
        options.only = [one for one in options.only if one != "lungseg-pretrained"]
    rows = []
    if options.results.exists():
        rows = [{"seed": 0} | json.loads(line) for line in options.results.read_text().splitlines()]
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    wanted = itertools.product(options.minutes, options.folds, options.seeds, options.only)
    for minutes, fold, seed, contestant in wanted:
        key = (contestant, fold, seed, minutes)
        if key in {(row["contestant"], row["fold"], row["seed"], row["minutes"]) for row in rows}:
            continue
        rows.append(run(*key, options))
        with options.results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{key}: {mean(rows[-1]['nodules'].values()):.3f}", file=sys.stderr, flush=True)
    print(table(rows))
    print(lead(rows))


if __name__ == "__main__":
    main()
