"""Real sweeps over crops of nodules: trials an hour, memory, and how the best Dice rose, by method and seed.

    uv run python tests/benchmarks/sweep_trials.py CROPS [--trials 4] [--minutes 60] [--seeds 1]
        [--methods "random" "TPE, ASHA"] [--cold] [--set tune.concurrent_trials=2]

CROPS holds images/ and masks/. A sweep ends after so many trials or minutes, whichever comes first. With
`--cold` its workers are not forked from a process that has their imports. Each sweep is a process of its own,
and methods take turns. With minutes a table of the best so far comes last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from meter import Meter, process_tree
from sweep import METHODS

from lungseg import cluster, warm
from lungseg.config import Recipe, load_recipe
from lungseg.dataset.prepare import prepare
from lungseg.sources import pairs
from lungseg.storage import open_store
from lungseg.tune.search import tune
from lungseg.tune.trials import Trials

RECIPE = Path(__file__).parents[2] / "jobs" / "recipes" / "lidc-crops.yaml"
SETTINGS = (
    "data.split.val=0.25", "data.split.test=0", "train.publish=best", "checkpoint.every_epochs=1",
    "train.steps_per_epoch=25", "train.epochs=4", "tune.grace_epochs=1",
    "tune.space.optimizer.learning_rate={log: [1.0e-4, 1.0e-1]}",
    "tune.space.loss.name={choice: [dice, dice_bce, tversky]}",
    "tune.space.augment.warp_share={range: [0, 0.6]}",
)  # fmt: skip


def recipe_of(options: argparse.Namespace, method: str, seed: int) -> Recipe:
    settings = [*SETTINGS, *METHODS[method], f"train.seed={100 * seed}", *options.set]
    return load_recipe(RECIPE, settings)


class Memory:
    """What the processes below this one hold, by their titles, when they hold the most: PSS in MiB."""

    def __init__(self) -> None:
        self.most: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            now: Counter[str] = Counter()
            count: Counter[str] = Counter()
            for pid, _ in process_tree():
                with suppress(OSError, IndexError):
                    words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()
                    title = next((word for word in words if word.startswith("ray::")), "everything else")
                    smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    now[title] += int(smaps.split("\nPss:")[1].split()[0]) / 1024
                    count[title] += 1
            if now.total() > self.most.total():
                self.most, self.count = now, count
            time.sleep(3)


def watched(began: float) -> list[tuple[int, float]]:
    """Seconds and best validation Dice so far, at each epoch from now on that was better."""
    rises: list[tuple[int, float]] = []
    report = Trials.report

    def noted(self: Trials, number: int, epoch: int, val_dice: float, seconds: float) -> bool:
        if not rises or val_dice > rises[-1][1]:
            rises.append((round(time.monotonic() - began), round(val_dice, 4)))
        return report(self, number, epoch, val_dice, seconds)

    Trials.report = noted
    return rises


def one(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """A sweep in this process."""
    store, recipe = open_store(options.store), recipe_of(options, method, seed)
    run = f"{method.replace(', ', '-').lower()}-{seed}-{'cold' if options.cold else 'warm'}"
    if options.cold:
        cluster.executable = lambda folder: shlex.quote(sys.executable)
        warm.Server.preload = lambda *arguments: None
    memory, began = Memory(), time.monotonic()
    rises = watched(began)
    with Meter(1.0) as meter:
        found = tune(store, "crops", run, recipe, options.trials, minutes=options.minutes)
    seconds = time.monotonic() - began
    return {
        "method": method, "seed": seed, "cold": options.cold, "trials": len(found),
        "seconds": round(seconds), "trials_an_hour": round(3600 * len(found) / seconds, 1),
        "cpu_seconds_a_trial": round(meter.cpu_seconds / len(found), 1),
        "seconds_trained_a_trial": round(sum(trial.seconds for trial in found) / len(found), 1),
        "best_val_dice": rises[-1][1], "rises": rises, "pss_mib": round(memory.most.total()),
        "by_process": {
            f"{memory.count[title]} {title}": round(mib) for title, mib in memory.most.most_common(8)
        },
    }  # fmt: skip


def table(sweeps: list[dict[str, Any]], minutes: float) -> str:
    """The best validation Dice so far, after a third of the minutes, two, and all: medians over the seeds."""
    at = [minutes / 3, 2 * minutes / 3, minutes]
    lines = ["| method | trials | " + " | ".join(f"after {one:g} min" for one in at) + " |"]
    lines.append("|---|--:|--:|--:|--:|")
    for method in dict.fromkeys(sweep["method"] for sweep in sweeps):
        those = [sweep for sweep in sweeps if sweep["method"] == method]
        cells = [f"{statistics.median(sweep['trials'] for sweep in those):g}"]
        for one in at:
            best = [
                max((dice for seconds, dice in sweep["rises"] if seconds <= 60 * one), default=0.0)
                for sweep in those
            ]
            cells.append(f"{statistics.median(best):.3f} ({min(best):.3f} to {max(best):.3f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("crops", type=Path)
    parser.add_argument("--trials", type=int, help="default: 4, or as the minutes allow")
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["random", "TPE, ASHA"])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes is None and options.trials is None:
        options.trials = 4
    os.environ.setdefault("LUNGSEG_CASE_KEY", "a key for this benchmark")
    if options.one:
        print(json.dumps(one(options, options.one[0], int(options.one[1]))), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        store, recipe = open_store(folder), recipe_of(options, options.methods[0], 0)
        cases = pairs.find_cases(options.crops, recipe.data.pairs)
        prepare(store, "crops", cases, recipe.data, lambda done, total: None)
        sweeps = []
        for seed, method in itertools.product(range(options.seeds), options.methods):
            command = [sys.executable, *sys.argv, "--store", store.uri, "--one", method, str(seed)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="", flush=True)
            sweeps.append(json.loads(done.stdout.splitlines()[-1]))
    if options.minutes:
        print(table(sweeps, options.minutes))


if __name__ == "__main__":
    main()
