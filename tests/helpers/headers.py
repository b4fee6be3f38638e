"""NIfTI files whose every header field can be wrong, written by nibabel."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

STEPS_MM = (0.7, 0.8, 2.5)  # along x, y, z
AXES = np.column_stack([np.diag([-0.7, -0.8, 2.5]), [110, 120, -300]])


def nifti(path: Path, array_zyx: np.ndarray, *, version: int = 1, order: str = "<", **fields: Any) -> Path:
    """The array under a header of 0.7 x 0.8 x 2.5 mm, both forms set, where `fields` say nothing else."""
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=order)
    header.set_data_dtype(array_zyx.dtype)
    header.set_data_shape(array_zyx.shape[::-1])
    header.set_zooms(STEPS_MM[: array_zyx.ndim])
    header.set_sform(np.vstack([AXES, (0, 0, 0, 1)]), code=1)
    header.set_qform(np.vstack([AXES, (0, 0, 0, 1)]), code=1)
    header["vox_offset"] = 352 if version == 1 else 544
    header["xyzt_units"] = 2
    for name, value in fields.items():
        if name == "srow":
            header["srow_x"], header["srow_y"], header["srow_z"] = value
        elif name == "pixdim":
            header["pixdim"][1:4] = value
        else:
            header[name] = value
    content = header.binaryblock + bytes(4) + array_zyx.astype(array_zyx.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.name.lower().endswith(".gz") else content)
    return path
