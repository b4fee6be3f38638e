"""What every source of training data hands to `prepare`: one case a scan, loaded where it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lungseg.data.volume import Volume


@dataclass(frozen=True)
class Nodule:
    """A nodule of the reference: `diameter_mm` is that of a ball of the same volume."""

    nodule_id: str
    centre_lps_mm: tuple[float, float, float]
    diameter_mm: float
    readers: int


@dataclass(frozen=True)
class LabelledScan:
    """A scan on its own grid; `mask` (1 nodule) and `ignore` (1 neither target nor false positive)
    are uint8 [z, y, x] on the grid of `volume`."""

    volume: Volume
    mask: np.ndarray
    ignore: np.ndarray
    nodules: tuple[Nodule, ...]


class Case(Protocol):
    """A picklable handle. `case_id` names the scan wherever anything is written; it is a keyed hash, or
    public. `patient_id` only decides the split and is never written anywhere."""

    @property
    def case_id(self) -> str: ...

    @property
    def patient_id(self) -> str: ...

    def load(self) -> LabelledScan: ...
