"""lungseg's part of `quality.py`: `jobs/recipes/lidc-crops.yaml` through the real prepare and train.

    python quality_ours.py JOB.json

Writes masks.npz, plain.npz of the same network without mirror images, and weights.keras into the job's folder
and prints what was done as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import SimpleITK as sitk  # noqa: N813

from lungseg.config import load_recipe, resegmented
from lungseg.dataset.prepare import prepare
from lungseg.segment.sliding import predict_volume
from lungseg.sources import pairs
from lungseg.storage import open_store
from lungseg.train.launch import train

RECIPE = Path(__file__).parents[2] / "jobs" / "recipes" / "lidc-crops.yaml"


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    os.environ.setdefault("LUNGSEG_CASE_KEY", "a key for this benchmark")
    folder = Path(job.folder)
    table = {pairs.patient_of(name): part for part, names in job.split.items() for name in names}
    (folder / "split.json").write_text(json.dumps(table))
    recipe = load_recipe(RECIPE, [
        f"data.split.file={folder / 'split.json'}", f"train.max_minutes={job.minutes}",
        "train.epochs=100000", "train.patience_epochs=100000", *job.settings,
    ])  # fmt: skip
    store = open_store(str(folder / "store"))
    cases = pairs.find_cases(Path(job.crops), recipe.data.pairs)
    prepare(store, "crops", cases, recipe.data, lambda done, total: None)
    train(store, "crops", "crops", recipe)
    lines = [json.loads(line) for line in store.get("runs/crops/metrics.jsonl").decode().splitlines()]

    from lungseg.runs.export import load_best

    model = load_best(store, "crops")
    masks, plain = {}, {}
    for name in job.split["test"]:
        image = sitk.ReadImage(str(Path(job.crops) / "images" / f"{name}.nii.gz"))
        volume_hu = sitk.GetArrayFromImage(image).astype(np.int16)
        masks[name] = predict_volume(model.predict, volume_hu, recipe) >= 0.5
        once = resegmented(recipe, ["segment.mirror=false"])
        plain[name] = predict_volume(model.predict, volume_hu, once) >= 0.5
    np.savez_compressed(folder / "masks.npz", **masks)
    np.savez_compressed(folder / "plain.npz", **plain)
    (folder / "weights.keras").write_bytes(store.get("runs/crops/best/model.keras"))
    precision = model.network.dtype_policy.compute_dtype
    print(json.dumps({"steps": lines[-1]["step"], "seconds": lines[-1]["seconds"], "precision": precision}))


if __name__ == "__main__":
    main()
