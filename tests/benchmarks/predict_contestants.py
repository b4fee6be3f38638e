"""One contestant of `predict.py`, in a process of its own: a scan from its DICOM folder to a mask in a file.

    python predict_contestants.py lungseg|MONAI JOB.json

Run by the interpreter that has the contestant's framework. Prints JSON: seconds since the command at which
each window was done, and at which the mask was written, and the peak of memory. The network's weights are
random: its arithmetic does not depend on them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SPACING_MM = (1.0, 1.0, 1.0)
SIDE, OVERLAP, DEPTH = 96, 0.25, 4
"""Voxels of a window's side, the share that neighbours have in common, and levels: the recipe's defaults."""


def seconds() -> float:
    """Since this process began: the kernel counts in hundredths."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def lungseg(job: dict[str, Any]) -> list[float]:
    """The command `lungseg predict`, whose bar of progress notes when windows are done."""
    from lungseg import telemetry
    from lungseg.cli import main

    windows: list[float] = []

    @contextmanager
    def noted(title: str) -> Iterator[Any]:
        yield lambda done, total: windows.append(seconds())

    telemetry.progress = noted  # type: ignore[assignment]
    sys.argv = ["lungseg", "predict", job["series"], "--out", job["out"], "--store", job["store"],
                "--run", job["run"]]  # fmt: skip
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    return windows


def monai(job: dict[str, Any]) -> list[float]:
    """MONAI's own chain: to the working grid, the body's box, the windows, and back to the scan's grid."""
    import monai.transforms as mt
    import torch
    from monai.inferers import SlidingWindowInferer
    from monai.networks.nets import DynUNet

    torch.set_num_threads(job["threads"])
    filters, strides = [job["width"] * 2**level for level in range(DEPTH)], [1] + [2] * (DEPTH - 1)
    norm = ("INSTANCE", {"affine": True})
    network = DynUNet(3, 1, 1, [3] * DEPTH, strides, strides[1:], filters=filters, norm_name=norm)
    network = network.eval().to(memory_format=torch.channels_last_3d)
    before = mt.Compose([
        mt.LoadImaged("image"), mt.EnsureChannelFirstd("image"), mt.Spacingd("image", SPACING_MM),
        mt.CropForegroundd("image", "image", select_fn=lambda hu: hu > -500, margin=16),
        mt.ScaleIntensityRanged("image", -1000, 400, -1, 1, clip=True), mt.EnsureTyped("image"),
    ])  # fmt: skip
    after = mt.Compose([
        mt.Activationsd("said", sigmoid=True),
        mt.Invertd("said", before, "image", nearest_interp=False, to_tensor=True),
        mt.AsDiscreted("said", threshold=0.5),
        mt.SaveImaged("said", output_dir=job["out"], output_dtype="uint8", print_log=False),
    ])  # fmt: skip
    inferer = SlidingWindowInferer(
        (SIDE,) * 3, 1, OVERLAP, mode="gaussian", padding_mode="constant", cval=-1.0
    )
    windows: list[float] = []

    def predict(window: Any) -> Any:
        said = network(window.to(memory_format=torch.channels_last_3d)).float()
        windows.append(seconds())
        return said

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, job["precision"] == "bfloat16"):
        data = before({"image": job["series"]})
        data["said"] = inferer(data["image"][None], predict)[0]
        after(data)
    return windows


def main() -> None:
    name, path = sys.argv[1:]
    job = json.loads(Path(path).read_text())
    windows = {"lungseg": lungseg, "MONAI": monai}[name](job)
    done = seconds()
    status = Path("/proc/self/status").read_text()  # getrusage tells the peak of whoever forked us, too
    peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print("\n" + json.dumps({"windows": windows, "scan": done, "peak_mib": peak_mib}))


if __name__ == "__main__":
    main()
