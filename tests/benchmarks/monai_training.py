"""How MONAI's networks are trained and asked in `quality.py` and `detection.py`; PyTorch's Python runs it.

AdamW, a cosine over the time that has passed, Dice and cross-entropy, mirrors, turns, intensity; channels
last; in bfloat16 where a few passes, before the minutes begin, have shown that it is faster.
"""

from __future__ import annotations

import math
import time
from typing import Any

import monai.transforms as mt
import torch
from monai.data import DataLoader
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet

THREADS = 2
KEYS = ("image", "mask")


def dynunet(filters: tuple[int, ...], norm: str = "instance") -> torch.nn.Module:
    strides = [1] + [2] * (len(filters) - 1)
    return DynUNet(
        3, 1, 1, [3] * len(filters), strides, strides[1:], filters=filters, norm_name=(norm, {"affine": True})
    )


def augmentation(turned_axes: tuple[int, int]) -> list[Any]:
    return [
        *(mt.RandFlipd(KEYS, 0.5, axis) for axis in range(3)),
        mt.RandRotate90d(KEYS, 0.75, 3, turned_axes),
        mt.RandScaleIntensityd("image", 0.1, 1.0),
        mt.RandShiftIntensityd("image", 0.05, prob=1.0),
        mt.RandGaussianNoised("image", 0.5, std=0.02),
    ]


def train(
    model: torch.nn.Module, batches: DataLoader, minutes: float, highest_rate: float, warmup_steps: int
) -> dict[str, Any]:
    """For so many minutes; what was done, for the results."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), highest_rate)
    loss_of = DiceCELoss(sigmoid=True, batch=True)
    model.in_bfloat16 = faster_in_bfloat16(model, channels_last(next(iter(batches))["image"]))
    began, steps = time.monotonic(), 0
    while True:
        for batch in batches:
            seconds = time.monotonic() - began
            share = seconds / (minutes * 60)
            if share >= 1:
                model.eval()
                precision = "bfloat16" if model.in_bfloat16 else "float32"
                return {"steps": steps, "seconds": seconds, "precision": precision}
            rate = highest_rate * min(1, (steps + 1) / warmup_steps) * (1 + math.cos(math.pi * share)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=model.in_bfloat16):
                logits = model(channels_last(batch["image"]))
            loss_of(logits.float(), (torch.as_tensor(batch["mask"]) > 0).float()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 12)
            optimizer.step()
            steps += 1


def channels_last(image: Any) -> torch.Tensor:
    return torch.as_tensor(image).contiguous(memory_format=torch.channels_last_3d)


def faster_in_bfloat16(model: torch.nn.Module, image: torch.Tensor) -> bool:
    """By the shortest of a few passes, forward and backward, in either precision."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(4):
        for enabled, times in seconds.items():
            began = time.monotonic()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = model(image)
            logits.float().mean().backward()
            times.append(time.monotonic() - began)
    return min(seconds[True]) < min(seconds[False])


def probability(model: torch.nn.Module, image: torch.Tensor, window: int) -> torch.Tensor:
    """Of an image [1, 1, …], by MONAI's sliding window."""
    # Eight at a time: for a single window of few channels PyTorch takes its slow convolution, not oneDNN's.
    windows = SlidingWindowInferer((window,) * 3, sw_batch_size=8, overlap=0.25, mode="gaussian")

    def forward(part: torch.Tensor) -> torch.Tensor:
        return model(channels_last(part)).float()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=model.in_bfloat16):
        return torch.sigmoid(windows(image, forward).float())
