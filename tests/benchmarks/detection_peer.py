"""MONAI's part of `detection.py`: crops half of which have a nodule in the middle, DynUNet, a sliding window.

    python detection_peer.py JOB.json

AdamW, a cosine over the time that has passed, Dice and cross-entropy, mirrors, turns, intensity; channels
last; bfloat16 where the CPU multiplies it. Learning rate and batch are lungseg's; they have not been tuned.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from monai.utils import set_determinism

THREADS, CROP, WINDOW, RATE, WARMUP, SCANS, CROPS_A_SCAN = 2, 32, 48, 2e-3, 30, 2, 2
FILTERS = (8, 16, 32, 64)
BFLOAT16 = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))


def network() -> torch.nn.Module:
    strides = [1] + [2] * (len(FILTERS) - 1)
    norm = ("INSTANCE", {"affine": True})
    one = DynUNet(3, 1, 1, [3] * len(FILTERS), strides, strides[1:], filters=FILTERS, norm_name=norm)
    return one.to(memory_format=torch.channels_last_3d)


def load(file: Path) -> dict[str, np.ndarray]:
    arrays = np.load(file)
    image = np.clip((arrays["hu"][None].astype(np.float32) + 1000) / 700 - 1, -1, 1)
    return {"image": image, "mask": arrays["mask"][None].astype(np.uint8)}


def batches(files: list[Path]) -> DataLoader:
    keys = ["image", "mask"]
    # Where nodule and body are is found once a scan, and kept.
    places = {"fg_indices_key": "mask_fg_indices", "bg_indices_key": "mask_bg_indices"}
    steps = [
        mt.ToTensord(keys), mt.FgBgToIndicesd("mask", image_key="image", image_threshold=-0.99),
        mt.RandCropByPosNegLabeld(
            keys, "mask", (CROP,) * 3, pos=1, neg=1, num_samples=CROPS_A_SCAN, **places
        ),
        *(mt.RandFlipd(keys, 0.5, axis) for axis in range(3)),
        mt.RandRotate90d(keys, 0.75, 3, (1, 2)),
        mt.RandScaleIntensityd("image", 0.1, 1.0), mt.RandShiftIntensityd("image", 0.05, prob=1.0),
        mt.RandGaussianNoised("image", 0.5, std=0.02),
    ]  # fmt: skip
    data = CacheDataset([load(file) for file in files], mt.Compose(steps), progress=False)
    return DataLoader(
        data, batch_size=SCANS, shuffle=True, num_workers=0, drop_last=True, collate_fn=list_data_collate
    )


def train(job: Any, model: torch.nn.Module, loader: DataLoader) -> int:
    optimizer, loss_of = torch.optim.AdamW(model.parameters(), RATE), DiceCELoss(sigmoid=True, batch=True)
    began, done, limit = time.monotonic(), 0, job.minutes * 60
    while True:
        for batch in loader:
            share = (time.monotonic() - began) / limit
            if share >= 1:
                return done
            rate = RATE * min(1, (done + 1) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            image = torch.as_tensor(batch["image"]).contiguous(memory_format=torch.channels_last_3d)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                logits = model(image)
            loss_of(logits.float(), torch.as_tensor(batch["mask"]).float()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 12)
            optimizer.step()
            done += 1


def predict(model: torch.nn.Module, hu: np.ndarray) -> np.ndarray:
    """float16 [z, y, x]; the body's box is tiled."""
    image = torch.from_numpy(np.clip((hu[None].astype(np.float32) + 1000) / 700 - 1, -1, 1))
    before = mt.CropForegroundd("image", "image", select_fn=lambda part: part > -0.28, margin=16)
    data = before({"image": image})
    windows = SlidingWindowInferer((WINDOW,) * 3, sw_batch_size=8, overlap=0.25, mode="gaussian")

    def forward(part: torch.Tensor) -> torch.Tensor:
        return model(part.contiguous(memory_format=torch.channels_last_3d)).float()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        data["image"] = torch.sigmoid(windows(data["image"][None].as_tensor(), forward))[0]
    whole = np.zeros(hu.shape, np.float16)
    first, last = (np.array(data[f"foreground_{end}_coord"]) for end in ("start", "end"))
    low, high = np.maximum(first, 0), np.minimum(last, hu.shape)
    there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    here = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
    whole[there] = data["image"][0].numpy()[here].astype(np.float16)
    return whole


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(THREADS)
    set_determinism(job.seed)
    model = network()
    loader = batches(sorted((Path(job.work) / "train").iterdir()))
    began = time.monotonic()
    steps = train(job, model.train(), loader)
    seconds = time.monotonic() - began
    model.eval()
    for file in sorted(Path(job.folder).glob("*.hu.npy")):
        said = predict(model, np.load(file))
        np.save(file.with_name(file.name.replace(".hu.npy", ".npy")), said)
    precision = "bfloat16" if BFLOAT16 else "float32"
    print(json.dumps({"steps": steps, "seconds": seconds, "precision": precision}))


if __name__ == "__main__":
    main()
