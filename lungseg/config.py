"""Every setting of lungseg in one frozen tree: bounds, defaults and help stand here and nowhere else.

A recipe is a YAML file with the same tree; `--set a.b=c` overrides single fields. Unknown fields are
refused with the nearest valid name, since a misspelt setting that is silently ignored costs a night of
training.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lungseg.errors import ConfigError

Codec = Literal["raw", "lz4", "zstd"]
LossName = Literal["dice", "bce", "dice_bce", "dice_focal", "focal", "tversky", "focal_tversky"]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Shape = Annotated[tuple[int, int, int], Field(description="voxels (z, y, x)")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class LidcConfig(_Frozen):
    """The field's LIDC-IDRI protocol."""

    min_readers: int = Field(3, ge=1, le=4, description="readers who must have marked a nodule")
    consensus: float = Field(0.5, gt=0, le=1, description="share of readers whose union makes the mask")
    min_diameter_mm: float = Field(3.0, ge=0, description="smaller nodules become ignore regions")
    max_slice_thickness_mm: float = Field(2.5, gt=0, description="thicker scans are excluded")


class SplitConfig(_Frozen):
    """Shares of the patients in each split; what remains is for training."""

    val: Share = 0.15
    test: Share = 0.15
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError("val + test must be below 1, or nothing is left to train on")
        return self


class PatchConfig(_Frozen):
    """Which patches are cut from a training or validation scan."""

    shape_zyx: Shape = (64, 64, 64)
    positives_per_nodule: int = Field(4, ge=1, description="jittered patches around each nodule")
    jitter: Share = Field(0.6, description="largest offset of a nodule from the centre, as share of half")
    hard_negatives_per_scan: int = Field(8, ge=0, description="bright lung voxels away from nodules")
    lung_negatives_per_scan: int = Field(4, ge=0, description="random places in the lungs")
    outside_per_scan: int = Field(2, ge=0, description="random places in the body outside the lungs")
    seed: int = 0


class ShardConfig(_Frozen):
    """How patches lie in object storage."""

    target_mib: int = Field(128, ge=1, le=1024, description="bytes of one shard, before compression")
    rows_per_batch: int = Field(2, ge=1, description="patches in a record batch, the unit of I/O")
    codec: Codec = "lz4"
    seed: int = 0


class DataConfig(_Frozen):
    spacing_mm: Annotated[tuple[Positive, Positive, Positive], Field(description="(z, y, x)")] = (
        1.0,
        1.0,
        1.0,
    )
    lidc: LidcConfig = LidcConfig()
    split: SplitConfig = SplitConfig()
    patch: PatchConfig = PatchConfig()
    shard: ShardConfig = ShardConfig()


class StreamConfig(_Frozen):
    """Reading patches back: bounds on memory, time and patience."""

    prefetch_mib: int = Field(256, ge=1, description="decoded patches that may wait in memory")
    threads: int = Field(8, ge=1, le=128, description="parallel ranged GETs of one worker")
    refetches: int = Field(3, ge=0, description="new tries after a checksum mismatch")


class ModelConfig(_Frozen):
    """A 3D U-Net."""

    width: int = Field(16, ge=2, description="channels of the first level; doubles at each level")
    max_width: int = Field(320, ge=2)
    depth: int = Field(4, ge=2, le=7, description="resolution levels")
    norm: Literal["instance", "group", "batch", "none"] = "instance"
    dropout: float = Field(0.0, ge=0, lt=1)
    hu_window: Annotated[tuple[float, float], Field(description="HU mapped to -1 and 1, clipped beyond")] = (
        -1000.0,
        400.0,
    )

    @property
    def total_stride(self) -> int:
        """Every side of an input must be a multiple of this."""
        return 2 ** (self.depth - 1)

    @model_validator(mode="after")
    def _window_is_open(self) -> ModelConfig:
        if self.hu_window[0] >= self.hu_window[1]:
            raise ValueError("hu_window must rise: the first value is mapped to -1, the second to 1")
        return self


class LossConfig(_Frozen):
    name: LossName = "dice_bce"
    focal_gamma: float = Field(2.0, ge=0)
    tversky_alpha: Share = Field(0.3, description="weight of false positives; misses weigh 1 - alpha")
    reduction: Literal["sample", "batch"] = "batch"


class AugmentConfig(_Frozen):
    """Seeded, in-graph, on whole batches."""

    flips: bool = True
    turns: bool = Field(True, description="90-degree turns in the axial plane")
    noise_hu: float = Field(20.0, ge=0, description="largest standard deviation of added noise")
    brightness_hu: float = Field(30.0, ge=0, description="largest shift")
    contrast: float = Field(0.1, ge=0, lt=1, description="largest relative change of HU about the mean")


class OptimizerConfig(_Frozen):
    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0, description="decoupled")
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    clip_norm: float = Field(12.0, gt=0, description="global gradient norm")
    momentum: float = Field(0.99, ge=0, lt=1, description="of SGD, Nesterov")


class CheckpointConfig(_Frozen):
    every_epochs: int = Field(1, ge=1)
    keep_latest: int = Field(2, ge=1)
    keep_best: int = Field(1, ge=1)


class TrainConfig(_Frozen):
    epochs: int = Field(100, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1, description="default: once over the training patches")
    max_minutes: float | None = Field(None, gt=0, description="ends the run after the epoch then running")
    global_batch: int = Field(4, ge=1, description="patches of one step over all replicas")
    workers: int = Field(1, ge=1, description="Ray Train workers, one a node")
    cpus_per_worker: int | None = Field(None, ge=1, description="default: all cores of the smallest node")
    gpus_per_worker: int = Field(0, ge=0)
    logical_cpu_devices: int = Field(1, ge=1, description="replicas of one CPU worker, to try out mirroring")
    precision: Literal["auto", "float32", "mixed_bfloat16"] = "auto"
    seed: int = 0
    patience_epochs: int = Field(20, ge=1, description="early stopping: epochs without a better val Dice")
    max_failures: int = Field(3, ge=0, description="worker deaths that are survived by restarting the group")
    log_every_steps: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        replicas = self.workers * max(1, self.gpus_per_worker or self.logical_cpu_devices)
        if self.global_batch % replicas:
            raise ValueError(f"global_batch {self.global_batch} must be a multiple of {replicas} replicas")
        return self


class SegmentConfig(_Frozen):
    """From probabilities to nodules."""

    window_zyx: Shape = (96, 96, 96)
    overlap: float = Field(0.25, ge=0, lt=1)
    batch: int = Field(1, ge=1, description="windows predicted at once")
    threshold: float = Field(0.5, gt=0, lt=1)
    min_volume_mm3: float = Field(14.0, ge=0, description="smaller components go; a 3 mm ball has 14.1 mm3")
    lungs_only: bool = Field(True, description="skip windows without lung, drop components outside it")


class TuneConfig(_Frozen):
    """The search space of `lungseg tune`: lists are choices, pairs of floats log-uniform bounds."""

    learning_rate: tuple[Positive, Positive] = (1e-4, 1e-2)
    loss: tuple[LossName, ...] = ("dice", "dice_bce", "dice_focal")
    width: tuple[int, ...] = (8, 16)
    grace_epochs: int = Field(2, ge=1, description="ASHA stops no trial before")
    reduction_factor: int = Field(3, ge=2)
    concurrent_trials: int | None = Field(None, ge=1, description="default: what the cluster can place")


class Recipe(_Frozen):
    """The whole tree. Every field has a default, so an empty recipe is a valid one."""

    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    train: TrainConfig = TrainConfig()
    segment: SegmentConfig = SegmentConfig()
    tune: TuneConfig = TuneConfig()


def load_recipe(path: Path | str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe of a YAML file (or the defaults) with `a.b=c` overrides, c being a YAML value.

    Raises ConfigError: "recipe-missing", "recipe-syntax", "override-syntax", "field-unknown",
    "field-invalid".
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "recipe-missing", recipe=path, remedy=f"give a readable YAML file ({error})"
            ) from error
        except yaml.YAMLError as error:
            detail = " ".join(str(error).split())
            raise ConfigError(
                "recipe-syntax", recipe=path, message=detail, remedy="correct the YAML"
            ) from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError("recipe-syntax", recipe=path, remedy="a recipe is a mapping of sections")
        tree = loaded or {}
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a plain tree. Raises ConfigError("field-unknown" or "field-invalid")."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, field_names(), n=1, cutoff=0)
            raise ConfigError("field-unknown", field=field, remedy=f"did you mean {near[0]}?") from None
        # pydantic says "Value error, …" for our own validators.
        detail = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            "field-invalid",
            field=field,
            value=first["input"] if field else "",
            message=detail,
            remedy="correct it",
        ) from None


def field_names(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of every setting, sections included."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError("override-syntax", override=override, remedy="write --set section.field=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(
                "override-syntax", override=override, remedy=f"{section} is a value, not a section"
            )
        tree = child
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            "override-syntax", override=override, remedy="the value must be valid YAML"
        ) from error
    # YAML 1.1 reads 1e-3 as text; people write learning rates that way.
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    tree[last] = value
