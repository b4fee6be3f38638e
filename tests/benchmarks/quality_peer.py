"""MONAI's part of `quality.py`: DynUNet or BasicUNet on Dice and cross-entropy, in the minutes given.

    python quality_peer.py JOB.json

AdamW, a cosine over the time that has passed, random crops, mirrors, turns, intensity; channels last;
bfloat16 where the CPU multiplies it, which is faster there, and far slower elsewhere.
Learning rate, batch and widths have not been tuned; "dynunet-narrow" has the widths of lungseg's recipe.
"""

from __future__ import annotations

import itertools
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
from monai.data import CacheDataset, DataLoader
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet, DynUNet
from monai.utils import set_determinism

THREADS, CROP, WARMUP = 2, 48, 20
BFLOAT16 = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
FILTERS = {"dynunet": (16, 32, 64, 128), "dynunet-narrow": (8, 16, 32, 64, 128)}


def network(name: str) -> torch.nn.Module:
    norm = ("INSTANCE", {"affine": True})
    if name in FILTERS:
        filters = FILTERS[name]
        strides = [1] + [2] * (len(filters) - 1)
        kernels = [3] * len(filters)
        one = DynUNet(3, 1, 1, kernels, strides, strides[1:], filters=filters, norm_name=norm)
    else:
        one = BasicUNet(3, 1, 1, features=(16, 16, 32, 64, 128, 16), norm=norm)
    return one.to(memory_format=torch.channels_last_3d)


def loader(job: Any) -> DataLoader:
    keys = ["image", "mask"]
    steps = [
        mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys),
        mt.ScaleIntensityRanged("image", -1000, 400, -1, 1, clip=True),
        mt.RandSpatialCropd(keys, (CROP,) * 3, random_size=False),
        *(mt.RandFlipd(keys, 0.5, axis) for axis in range(3)),
        mt.RandRotate90d(keys, 0.75, 3, (0, 1)),
        mt.RandScaleIntensityd("image", 0.1, 1.0), mt.RandShiftIntensityd("image", 0.05, prob=1.0),
        mt.RandGaussianNoised("image", 0.5, std=0.02),
    ]  # fmt: skip
    crops = Path(job.crops)
    files = [
        {"image": crops / "images" / f"{name}.nii.gz", "mask": crops / "masks" / f"{name}.nii.gz"}
        for name in job.split["train"]
    ]
    data = CacheDataset(files, mt.Compose(steps), progress=False)
    return DataLoader(data, batch_size=job.batch, shuffle=True, num_workers=0, drop_last=True)


def train(job: Any, model: torch.nn.Module, batches: DataLoader) -> int:
    optimizer, loss_of = torch.optim.AdamW(model.parameters(), job.rate), DiceCELoss(sigmoid=True, batch=True)
    began, done, limit = time.monotonic(), 0, job.minutes * 60
    while True:
        for batch in batches:
            share = (time.monotonic() - began) / limit
            if share >= 1:
                return done
            rate = job.rate * min(1, (done + 1) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            image = batch["image"].as_tensor().contiguous(memory_format=torch.channels_last_3d)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                logits = model(image)
            loss_of(logits.float(), (batch["mask"].as_tensor() > 0).float()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 12)
            optimizer.step()
            done += 1


def predict(job: Any, model: torch.nn.Module, name: str, images: list[tuple[int, ...]]) -> np.ndarray:
    """MONAI's sliding window of the size trained at; the mean over mirror images, given by their axes."""
    read = mt.Compose(
        [mt.LoadImage(), mt.EnsureChannelFirst(), mt.ScaleIntensityRange(-1000, 400, -1, 1, True)]
    )
    image = read(Path(job.crops) / "images" / f"{name}.nii.gz").as_tensor()[None]
    # Eight at a time: for a single window of few channels PyTorch takes its slow convolution, not oneDNN's.
    windows = SlidingWindowInferer((CROP,) * 3, sw_batch_size=8, overlap=0.25, mode="gaussian")
    total = torch.zeros_like(image)

    def forward(part: torch.Tensor) -> torch.Tensor:
        return model(part.contiguous(memory_format=torch.channels_last_3d)).float()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        for axes in images:
            logits = windows(image.flip(axes), forward)
            total += torch.sigmoid(logits.float()).flip(axes)
    return (total[0, 0] / len(images) > 0.5).numpy().transpose(2, 1, 0)  # MONAI reads (x, y, z)


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(THREADS)
    set_determinism(job.seed)
    model, batches = network(job.name), loader(job)
    began = time.monotonic()
    steps = train(job, model.train(), batches)
    seconds = time.monotonic() - began
    model.eval()
    mirrors = [axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)]
    for title, images in (("masks", mirrors), ("plain", [()])):
        found = {name: predict(job, model, name, images) for name in job.split["test"]}
        np.savez_compressed(Path(job.folder) / f"{title}.npz", **found)
    torch.save(model.state_dict(), Path(job.folder) / "weights.pt")
    precision = "bfloat16" if BFLOAT16 else "float32"
    print(json.dumps({"steps": steps, "seconds": seconds, "precision": precision}))


if __name__ == "__main__":
    main()
