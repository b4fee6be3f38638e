"""MONAI's part of `quality.py`: DynUNet or BasicUNet in the minutes given, on random crops of the crops.

    python quality_peer.py JOB.json

Learning rate, batch and widths have not been tuned; "dynunet-narrow" has the widths of lungseg's recipe.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.networks.nets import BasicUNet
from monai.utils import set_determinism
from monai_training import KEYS, THREADS, augmentation, dynunet, probability, train

CROP, WARMUP_STEPS = 48, 20
FILTERS = {"dynunet": (16, 32, 64, 128), "dynunet-narrow": (8, 16, 32, 64, 128)}


def network(name: str) -> torch.nn.Module:
    one = dynunet(FILTERS[name]) if name in FILTERS else None
    one = one or BasicUNet(3, 1, 1, features=(16, 16, 32, 64, 128, 16), norm=("instance", {"affine": True}))
    return one.to(memory_format=torch.channels_last_3d)


def loader(job: Any) -> DataLoader:
    steps = [
        mt.LoadImaged(KEYS), mt.EnsureChannelFirstd(KEYS),
        mt.ScaleIntensityRanged("image", -1000, 400, -1, 1, clip=True),
        mt.RandSpatialCropd(KEYS, (CROP,) * 3, random_size=False),
        *augmentation(turned_axes=(0, 1)),
    ]  # fmt: skip
    crops = Path(job.crops)
    files = [
        {"image": crops / "images" / f"{name}.nii.gz", "mask": crops / "masks" / f"{name}.nii.gz"}
        for name in job.split["train"]
    ]
    data = CacheDataset(files, mt.Compose(steps), progress=False)
    return DataLoader(data, batch_size=job.batch, shuffle=True, num_workers=0, drop_last=True)


def predict(job: Any, model: torch.nn.Module, name: str, images: list[tuple[int, ...]]) -> np.ndarray:
    """By windows of the size trained at; the mean over mirror images, given by their axes."""
    read = mt.Compose(
        [mt.LoadImage(), mt.EnsureChannelFirst(), mt.ScaleIntensityRange(-1000, 400, -1, 1, True)]
    )
    image = read(Path(job.crops) / "images" / f"{name}.nii.gz").as_tensor()[None]
    total = sum(probability(model, image.flip(axes), CROP).flip(axes) for axes in images)
    return (total[0, 0] / len(images) > 0.5).numpy().transpose(2, 1, 0)  # MONAI reads (x, y, z)


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(THREADS)
    set_determinism(job.seed)
    model = network(job.name)
    facts = train(model, loader(job), job.minutes, job.rate, WARMUP_STEPS)
    mirrors = [axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)]
    for title, images in (("masks", mirrors), ("plain", [()])):
        found = {name: predict(job, model, name, images) for name in job.split["test"]}
        np.savez_compressed(Path(job.folder) / f"{title}.npz", **found)
    torch.save(model.state_dict(), Path(job.folder) / "weights.pt")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
