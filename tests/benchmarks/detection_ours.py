"""lungseg's part of `detection.py`: `jobs/recipes/scans-cpu.yaml` through the real train and predict.

    python detection_ours.py JOB.json

Writes what the network says of each test scan, float16 [z, y, x], into the job's folder, once more as .plain
without second looks, and prints what was done as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lungseg.config import load_recipe, resegmented
from lungseg.dataset.manifest import load_manifest
from lungseg.dataset.stored_scans import read_scan
from lungseg.scan.lungs import lung_mask
from lungseg.segment.sliding import predict_volume
from lungseg.storage import open_store
from lungseg.train.launch import train

DATA = "hard"
RECIPE = Path(__file__).parents[2] / "jobs" / "recipes" / "scans-cpu.yaml"
SETTINGS = [
    "data.lidc.max_slice_thickness_mm=5",
    "data.split.val=0",
    "train.steps_per_epoch=25",
    "train.epochs=100000",
    "train.patience_epochs=100000",
    "train.publish=last",
    "checkpoint.every_epochs=20",
]


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    work, run = Path(job.work), f"seed{job.seed}"
    recipe = load_recipe(RECIPE, [
        *SETTINGS, f"data.split.file={work / 'split.json'}", f"train.max_minutes={job.minutes}",
        f"train.seed={job.seed}", *job.settings,
    ])  # fmt: skip
    data = open_store(str(work / "store"))
    train(data, DATA, run, recipe, "restart")
    lines = [json.loads(line) for line in data.get(f"runs/{run}/metrics.jsonl").decode().splitlines()]

    from lungseg.runs.export import load_best

    model = load_best(data, run)
    for entry in load_manifest(data, DATA).require_held_out("test"):
        volume = read_scan(data, entry).volume
        lungs = lung_mask(volume)
        for suffix, asked in (("", recipe), (".plain", resegmented(recipe, ["segment.second_looks=0"]))):
            said = predict_volume(model.predict, volume.volume_hu, asked, lungs=lungs)
            np.save(Path(job.folder) / f"{entry.case_id}{suffix}.npy", said.astype(np.float16))
    precision = model.network.dtype_policy.compute_dtype
    print(json.dumps({"steps": lines[-1]["step"], "seconds": lines[-1]["seconds"], "precision": precision}))


if __name__ == "__main__":
    main()
