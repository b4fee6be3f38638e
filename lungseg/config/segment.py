"""Settings of how probabilities become nodules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lungseg.config.fields import CandidateScore, Frozen, Shape


class SegmentConfig(Frozen):
    """From probabilities to nodules."""

    window_zyx: Shape = Field(
        (96, 96, 96),
        description="most voxels (z, y, x) predicted at once; fewer, where as many windows do",
    )
    overlap: float = Field(0.25, ge=0, lt=1, description="share of a window's side that its neighbour covers")
    batch: int = Field(1, ge=1, description="windows predicted at once")
    mirror: bool = Field(
        False, description="mean over the 8 mirror images of each window, in 8 times the time"
    )
    second_looks: int = Field(
        16, ge=0, description="most places found to see again, in the middle of a window of a patch's shape"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="probability from which a voxel is nodule")
    min_volume_mm3: float = Field(14.0, ge=0, description="smaller components go; a 3 mm ball has 14.1 mm3")
    lungs_only: bool = Field(True, description="skip windows without lung, drop components outside it")
    candidate_threshold: float = Field(
        0.1, gt=0, lt=1, description="probability from which a voxel may be of a candidate, for the FROC"
    )
    candidate_score: CandidateScore = Field(
        "p95", description="which of a candidate's probabilities ranks it"
    )
    min_score: float = Field(
        0.0, ge=0, lt=1, description="nodules whose candidate has a lower candidate_score go"
    )
    solid_hu: float = Field(
        -300.0, ge=-1000, le=1000, description="HU from which a nodule's voxel counts as its solid part"
    )
    dicom_segmentation: Literal["binary", "labelmap"] = Field(
        "binary", description="of `predict --dicom`; binary is what every viewer reads"
    )
