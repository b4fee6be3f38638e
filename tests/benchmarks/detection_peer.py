"""MONAI's part of `detection.py`: crops half of which have a nodule in the middle, DynUNet, a sliding window.

    python detection_peer.py JOB.json

The batch is lungseg's, and so are learning rate and norm unless others are given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import monai.transforms as mt
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.utils import set_determinism
from monai_training import KEYS, THREADS, augmentation, dynunet, probability, train

CROP, WINDOW, WARMUP_STEPS, SCANS, CROPS_A_SCAN = 32, 48, 30, 2, 2
FILTERS = (8, 16, 32, 64)


def load(file: Path) -> dict[str, np.ndarray]:
    arrays = np.load(file)
    return {"image": scaled(arrays["hu"]), "mask": arrays["mask"][None].astype(np.uint8)}


def scaled(hu: np.ndarray) -> np.ndarray:
    return np.clip((hu[None].astype(np.float32) + 1000) / 700 - 1, -1, 1)


def batches(files: list[Path]) -> DataLoader:
    # Where nodule and body are is found once a scan, and kept.
    places = {"fg_indices_key": "mask_fg_indices", "bg_indices_key": "mask_bg_indices"}
    steps = [
        mt.ToTensord(KEYS), mt.FgBgToIndicesd("mask", image_key="image", image_threshold=-0.99),
        mt.RandCropByPosNegLabeld(
            KEYS, "mask", (CROP,) * 3, pos=1, neg=1, num_samples=CROPS_A_SCAN, **places
        ),
        *augmentation(turned_axes=(1, 2)),
    ]  # fmt: skip
    data = CacheDataset([load(file) for file in files], mt.Compose(steps), progress=False)
    return DataLoader(
        data, batch_size=SCANS, shuffle=True, num_workers=0, drop_last=True, collate_fn=list_data_collate
    )


def predict(model: torch.nn.Module, hu: np.ndarray) -> np.ndarray:
    """float16 [z, y, x]; the body's box is tiled."""
    before = mt.CropForegroundd("image", "image", select_fn=lambda part: part > -0.28, margin=16)
    data = before({"image": torch.from_numpy(scaled(hu))})
    said = probability(model, data["image"][None].as_tensor(), WINDOW)[0, 0].numpy()
    whole = np.zeros(hu.shape, np.float16)
    first, last = (np.array(data[f"foreground_{end}_coord"]) for end in ("start", "end"))
    low, high = np.maximum(first, 0), np.minimum(last, hu.shape)
    there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    here = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
    whole[there] = said[here].astype(np.float16)
    return whole


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(THREADS)
    set_determinism(job.seed)
    model = dynunet(FILTERS, job.norm).to(memory_format=torch.channels_last_3d)
    loader = batches(sorted((Path(job.work) / "train").iterdir()))
    facts = train(model, loader, job.minutes, job.rate, WARMUP_STEPS)
    for file in sorted(Path(job.folder).glob("*.hu.npy")):
        np.save(file.with_name(file.name.replace(".hu.npy", ".npy")), predict(model, np.load(file)))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
