"""Settings of how scans become a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lungseg.config.fields import Codec, Frozen, Label, LidcMask, Seed, Shape, Share, Spacing

GET_BYTES = 12 << 20  # decoded; about a third of it on its way


class LidcConfig(Frozen):
    """The field's LIDC-IDRI protocol."""

    min_readers: int = Field(3, ge=1, le=4, description="readers who must have marked a nodule")
    consensus: float = Field(0.5, gt=0, le=1, description="share of readers who must have outlined a voxel")
    min_diameter_mm: float = Field(3.0, ge=0, description="smaller nodules become ignore regions")
    max_slice_thickness_mm: float = Field(2.5, gt=0, description="thicker scans are excluded")
    mask: LidcMask = Field("consensus", description="whose outline is the target; readers as clustered")
    ignore_others: bool = Field(True, description="other marks are ignore regions; false: background")
    public_ids: bool = Field(True, description="case ids as published (LIDC-IDRI-0001); false: keyed hashes")


class PairsConfig(Frozen):
    """What the values of a folder's masks mean."""

    label: Label | tuple[Label, ...] | Literal["any"] | None = Field(
        None,
        description='the target\'s value or values; "any": all but ignore; default: the only one there is',
    )
    ignore_label: Label = Field(255, description="neither target nor background; so is a label named ignore")


class SplitConfig(Frozen):
    """Shares of the patients in each split, on average; what remains is for training."""

    val: Share = Field(0.15, description="patients that choose the best epoch; of the others with folds")
    test: Share = Field(0.15, description="patients that only `lungseg evaluate` sees; not used with folds")
    seed: Seed = Field(0, description="another seed deals the patients out anew")
    folds: int | None = Field(None, ge=2, description="parts for cross-validation, of which one is tested")
    fold: int = Field(0, ge=0, description="the part that is tested, from 0")
    # Left out of everything that is written: a path may tell of a patient.
    file: Path | None = Field(
        None, exclude=True, description="CSV (patient,split) or JSON object, instead of shares or folds"
    )

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError("val + test must be below 1, or nothing is left to train on")
        if self.fold >= (self.folds or 1):
            raise ValueError("fold must be below folds")
        return self


class PatchConfig(Frozen):
    """Which patches are cut from a training or validation scan."""

    shape_zyx: Shape = Field((64, 64, 64), description="voxels (z, y, x), multiples of 2^(model.depth - 1)")
    positives_per_nodule: int = Field(4, ge=1, description="jittered patches around each nodule")
    jitter: Share = Field(0.6, description="largest offset of a nodule from the centre, as share of half")
    hard_negatives_per_scan: int = Field(8, ge=0, description="bright lung voxels away from nodules")
    lung_negatives_per_scan: int = Field(4, ge=0, description="random places in the lungs")
    outside_per_scan: int = Field(2, ge=0, description="random places in the body outside the lungs")
    seed: Seed = Field(0, description="of the jitter and the choice of negatives")


class ShardConfig(Frozen):
    """How patches lie in object storage."""

    target_mib: int = Field(128, ge=1, le=1024, description="MiB of one shard, before compression")
    rows_per_batch: int = Field(2, ge=1, description="patches in a record batch, the unit of the shuffle")
    batches_per_get: int | None = Field(
        None, ge=1, description="adjacent record batches of one GET; default: 12 MiB decoded, at most 8"
    )
    positive_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        exclude_if=lambda share: share is None,  # data sets of before are the same without it
        description="of training patches, those on nodules, by repeating either; default: as cut",
    )
    codec: Codec = Field("planes-lz4", description="of images; planes: like bits or bytes together")
    seed: Seed = Field(0, description="of the shuffle over all scans")

    def batches_of_get(self, patch_bytes: int) -> int:
        """Record batches that one GET fetches, of patches of so many decoded bytes: the fewer GETs, the less
        they cost the CPU, but what a lane has fetched and not yet given lies in memory."""
        return self.batches_per_get or min(8, max(1, GET_BYTES // (patch_bytes * self.rows_per_batch)))


class DataConfig(Frozen):
    """How scans become a data set."""

    spacing_mm: tuple[Spacing, Spacing, Spacing] = Field(
        (1.0, 1.0, 1.0), description="(z, y, x); scans are resampled to it, also by `lungseg predict`"
    )
    allow_not_hu: bool = Field(False, description="take scans whose values are probably no HU, and say so")
    lidc: LidcConfig = LidcConfig()
    pairs: PairsConfig = PairsConfig()
    split: SplitConfig = SplitConfig()
    patch: PatchConfig = PatchConfig()
    shard: ShardConfig = ShardConfig()
