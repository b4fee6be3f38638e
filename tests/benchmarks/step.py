"""A training step beside PyTorch's, and what streaming and a second worker cost. One run, one table each.

    uv run python tests/benchmarks/step.py --peer-python peers/bin/python [--rounds 5] [--steps 10] \
        [--rows 1 2 3 4 5 6] [--precisions float32 bfloat16]

Contestants take turns, each in a new process, so that a slow spell of the machine meets all of them.
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
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.servers import BUCKET, S3Server, s3_client  # noqa: E402
from step_contestants import flops  # noqa: E402

from lungseg.config import load_recipe  # noqa: E402
from lungseg.dataset.manifest import Manifest  # noqa: E402
from lungseg.dataset.shards import Patch, write_shard  # noqa: E402
from lungseg.storage import open_store  # noqa: E402
from lungseg.storage.keys import data_manifest  # noqa: E402
from lungseg.train.launch import train  # noqa: E402

CONTESTS = (
    (64, 2, 16, 4, 1), (96, 1, 16, 4, 1), (48, 2, 8, 5, 2), (32, 4, 8, 4, 2), (96, 1, 32, 5, 1),
    (64, 2, 16, 4, 2),
)  # fmt: skip
"""Voxels of a patch's side, patches, channels of the first level, levels, lungseg's replicas: the defaults,
larger patches, the recipe for crops, the demo's, the recipe for whole scans (one replica's share), and the
first once more with a replica a patch."""
PRECISIONS, PAIR = ("float32", "bfloat16"), ("lungseg", "torch")


def measure(python: str, name: str, contest: tuple[int, ...], precision: str, steps: int) -> float:
    """Median seconds of a step."""
    command = [python, str(HERE / "step_contestants.py"), name, *map(str, contest), precision, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr[-2000:]}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def compare(peer_python: str, rounds: int, steps: int, rows: list[int], precisions: list[str]) -> None:
    """Each contest in each precision, then both contestants in the precision that is fastest for each."""
    titles = ("patches", "width", "levels", "replicas", "precision", "lungseg s", "PyTorch s", "ratio")
    print(f"| {' | '.join(titles)} | share of the peak |")
    print("|---|--:|--:|--:|---|--:|--:|--:|--:|", flush=True)
    for contest in (CONTESTS[row - 1] for row in rows):
        side, batch, width, depth, replicas = contest
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for name, precision in product(("lungseg", "torch", "peak"), precisions):
                python = peer_python if name == "torch" else sys.executable
                one = measure(python, name, contest, precision, steps)
                seconds.setdefault((name, precision), []).append(one)
        fastest = [min(precisions, key=lambda one: statistics.median(seconds[name, one])) for name in PAIR]
        for ours, theirs in dict.fromkeys([*zip(precisions, precisions, strict=True), tuple(fastest)]):
            found, peer = seconds["lungseg", ours], seconds["torch", theirs]
            ratios = [a / b for a, b in zip(found, peer, strict=True)]
            rate = 2 * 27 * 32 * 32 * batch * (side // 2) ** 3 / statistics.median(seconds["peak", ours])
            print(
                f"| {batch} x {side}^3 | {width} | {depth} | {replicas} "
                f"| {ours if ours == theirs else f'fastest: {ours}, {theirs}'} "
                f"| {statistics.median(found):.3f} | {statistics.median(peer):.3f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"| {flops(*contest[:4]) / statistics.median(found) / rate:.0%} |",
                flush=True,
            )


@contextmanager
def server(folder: Path) -> Iterator[None]:
    running = S3Server(folder)
    os.environ.update(running.environment)
    running.start()
    try:
        s3_client().create_bucket(Bucket=BUCKET)
        yield
    finally:
        running.stop()


def epochs(store: Any, run: str) -> list[dict[str, float]]:
    """Of a run's epochs all but the first, which traces its graphs."""
    return [json.loads(line) for line in store.get(f"runs/{run}/metrics.jsonl").decode().splitlines()][1:]


def stream_and_workers(rounds: int) -> None:
    """Real runs through Ray from SeaweedFS, of 3 epochs of 12 steps of 4 x 48^3 patches in bfloat16."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)):
        store, shape = open_store(f"s3://{BUCKET}/step"), (48, 48, 48)
        random, shards = np.random.default_rng(0), {}
        for split, count in (("train", 96), ("val", 4)):
            rows = []
            for number in range(count):
                image, mask = random.normal(-700, 60, shape).astype(np.int16), np.zeros(shape, np.uint8)
                mask[20:28, 20:28, 20:28] = 1
                rows.append(Patch(image, mask, f"{split}{number}", "", "nodule", (0.0,) * 3, (1.0,) * 3))
            groups = [rows[i : i + 2] for i in range(0, count, 2)]
            key = f"data/step/shards/{split}-00000.arrow"
            shards[split] = (write_shard(store, key, groups, shape, "planes-lz4"),)
        manifest = Manifest("step", "benchmark", {}, shape, shards, {}, {}, {}, ())
        store.put(data_manifest("step"), manifest.to_bytes())
        pace: dict[int, list[float]] = {1: [], 2: []}
        waits: list[float] = []
        for number in range(rounds):
            for workers in pace:
                run = f"r{number}-{workers}"
                settings = [
                    "train.epochs=3", "train.steps_per_epoch=12", "train.global_batch=4",
                    f"train.workers={workers}", f"train.cpus_per_worker={2 // workers}",
                ]  # fmt: skip
                train(store, "step", run, load_recipe(None, settings))
                found = epochs(store, run)
                pace[workers] += [12 / epoch["train_seconds"] for epoch in found]
                waits += [epoch["data_wait_seconds"] / epoch["train_seconds"] for epoch in found]
    one, two = (statistics.median(pace[workers]) for workers in (1, 2))
    print("\n| workers | cores of each | steps/s |\n|--:|--:|--:|")
    print(f"| 1 | 2 | {one:.2f} |\n| 2 | 1 | {two:.2f} ({two / one:.2f} of one worker) |")
    print(f"\nwaiting for data: {statistics.median(waits):.2%} of the time (at most {max(waits):.2%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="of an environment with torch and monai")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    every = range(1, len(CONTESTS) + 1)
    parser.add_argument("--rows", type=int, nargs="+", choices=every, default=list(every))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    compare(options.peer_python, options.rounds, options.steps, options.rows, options.precisions)
    stream_and_workers(max(1, options.rounds // 2))


if __name__ == "__main__":
    main()
