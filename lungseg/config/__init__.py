"""Every setting of lungseg in one frozen tree: bounds, defaults and help stand here and nowhere else.

A recipe is a YAML file with the same tree; `--set a.b=c` overrides single fields. Unknown fields are
refused with the nearest valid name, since a misspelt setting that is silently ignored costs a night of
training.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from lungseg.config.data import DataConfig, LidcConfig, PairsConfig, PatchConfig, ShardConfig, SplitConfig
from lungseg.config.fields import Codec, Frozen, LidcMask, Positive, Seed, Shape, Share
from lungseg.errors import ConfigError

__all__ = [
    "Codec",
    "DataConfig",
    "LidcConfig",
    "LidcMask",
    "PairsConfig",
    "PatchConfig",
    "ShardConfig",
    "SplitConfig",
]

LossName = Literal["dice", "bce", "dice_bce", "dice_focal", "focal", "tversky", "focal_tversky"]
Width = Annotated[int, Field(ge=2)]
Blocks = Annotated[int, Field(ge=1, le=16)]


class StreamConfig(Frozen):
    """Reading patches back: bounds on memory, disk, time and patience."""

    prefetch_mib: int = Field(256, ge=1, description="decoded patches that may wait in memory")
    threads: int = Field(16, ge=1, le=128, description="parallel ranged GETs of one worker")
    connect_seconds: Positive = Field(5.0, description="for a connection to open")
    # Stores send the first byte within a second; whatever takes ten is faster on a new connection, and all
    # GPUs wait for the slowest read.
    read_seconds: Positive = Field(10.0, description="between two pieces of an answer")
    # A server that is killed and started again is away for half a minute or more, most of which it spends
    # on electing a leader; two minutes outlive that, and cost less than a restart of all workers.
    retry_seconds: float = Field(120.0, ge=0, description="a read is tried again for, from its first failure")
    refetches: int = Field(3, ge=0, description="new tries after a checksum mismatch")
    hedge_factor: float = Field(
        3.0, ge=0, description="a read this many times slower than 95 % of them gets a second one; 0: never"
    )
    cache_dir: Path | None = Field(None, description="folder on a node's disk for fetched record batches")
    cache_gib: Positive = Field(50.0, description="the cache's bound; all workers of a node share it")


class ModelConfig(Frozen):
    """A 3D U-Net."""

    architecture: Literal["unet", "resenc"] = Field("unet", description="resenc: residual encoder")
    width: Width = Field(16, description="channels of the first level; doubles at each level")
    max_width: Width = Field(320, description="no level has more channels")
    depth: int = Field(4, ge=2, le=7, description="resolution levels")
    norm: Literal["instance", "group", "batch", "none"] = Field(
        "instance", description='"batch" keeps statistics that differ between replicas'
    )
    downsampling: Literal["pool", "stride"] = Field("pool", description="of unet; resenc has strides")
    residual_blocks: tuple[Blocks, ...] = Field((1, 2, 3, 3, 3, 3, 3), description="of resenc, at each level")
    deep_supervision: int = Field(0, ge=0, le=4, description="coarser levels with a loss of their own")
    members: int = Field(
        1, ge=1, le=16, description="networks of an ensemble, trained side by side; the mean is published"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the deepest channels dropped in training")
    hu_window: tuple[float, float] = Field(
        (-1000.0, 400.0), description="HU mapped to -1 and 1, clipped beyond"
    )

    @property
    def total_stride(self) -> int:
        """Every side of an input must be a multiple of this."""
        return 2 ** (self.depth - 1)

    @model_validator(mode="after")
    def _levels_are_there(self) -> ModelConfig:
        if self.deep_supervision > self.depth - 2:
            raise ValueError(f"deep_supervision must be at most depth - 2, here {self.depth - 2}")
        if self.architecture == "resenc" and len(self.residual_blocks) < self.depth:
            raise ValueError(f"residual_blocks must name {self.depth} levels, as model.depth")
        return self

    @model_validator(mode="after")
    def _window_is_open(self) -> ModelConfig:
        if self.hu_window[0] >= self.hu_window[1]:
            raise ValueError("hu_window must rise: the first value is mapped to -1, the second to 1")
        return self


class LossConfig(Frozen):
    """What training makes small."""

    name: LossName = Field("dice_bce", description="names with _ add two losses, but focal_tversky is one")
    focal_gamma: float = Field(2.0, ge=0, description="how little easy voxels count in focal losses")
    tversky_alpha: Share = Field(0.3, description="weight of false positives; misses weigh 1 - alpha")
    reduction: Literal["sample", "batch"] = Field(
        "batch", description="Dice and Tversky of each patch, or of all patches as one volume"
    )


class AugmentConfig(Frozen):
    """Seeded, in-graph; every sample draws for itself. Zero switches a transform off."""

    crop_zyx: Shape | None = Field(None, description="a random crop of each patch; default: all of it")
    flips: bool = Field(True, description="mirroring along each axis")
    turns: bool = Field(True, description="90-degree turns in the axial plane")
    warp_share: Share = Field(0.2, description="samples that are rotated, scaled and deformed")
    rotation_degrees: float = Field(15.0, ge=0, le=180, description="largest angle about each axis")
    scaling: float = Field(0.15, ge=0, lt=1, description="largest relative change of size")
    elastic: float = Field(0.15, ge=0, le=0.4, description="largest shift of a control point, in spacings")
    elastic_spacing: int = Field(16, ge=4, description="voxels between control points (cubic B-splines)")
    noise_hu: float = Field(20.0, ge=0, description="largest standard deviation of added noise")
    blur_share: Share = Field(0.1, description="samples that are blurred")
    blur_voxels: float = Field(1.0, gt=0, le=2, description="largest standard deviation of the blur")
    brightness_hu: float = Field(30.0, ge=0, description="largest shift")
    contrast: float = Field(0.1, ge=0, lt=1, description="largest relative change of HU about the mean")
    gamma: float = Field(0.2, ge=0, le=1, description="largest |log| of the exponent on the HU window")


class OptimizerConfig(Frozen):
    """How weights are updated."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="SGD is Nesterov's")
    learning_rate: Positive = Field(1e-3, description="after the warm-up")
    reference_batch: int | None = Field(
        None, ge=1, description="learning_rate is for this global batch and grows with it; default: as it is"
    )
    weight_decay: float = Field(1e-5, ge=0, description="decoupled; not on norms and biases")
    warmup_steps: int = Field(50, ge=0, description="steps in which the learning rate rises from 0")
    schedule: Literal["constant", "cosine", "polynomial"] = Field("cosine", description="after the warm-up")
    power: Positive = Field(0.9, description="of the polynomial")
    clip_norm: float = Field(12.0, gt=0, description="global gradient norm")
    momentum: float = Field(0.99, ge=0, lt=1, description="of SGD, Nesterov")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of an average of the weights, which is then validated; 0: none",
    )


class CheckpointConfig(Frozen):
    """What is committed to the store, and what is kept of it."""

    every_epochs: int = Field(1, ge=1, description="a new best and the last epoch are always committed")
    keep_latest: int = Field(2, ge=1, description="newest checkpoints of an attempt that are kept")
    keep_best: int = Field(1, ge=1, description="checkpoints of highest val Dice that are kept besides")


class TrainConfig(Frozen):
    """The run itself."""

    epochs: int = Field(100, ge=1, description="the learning-rate schedule ends with the last")
    steps_per_epoch: int | None = Field(None, ge=1, description="default: once over the training patches")
    max_minutes: float | None = Field(None, gt=0, description="the last epoch that fits in ends the run")
    global_batch: int = Field(4, ge=1, description="patches of one step over all replicas")
    workers: int = Field(1, ge=1, description="Ray Train workers, one a node")
    cpus_per_worker: int | None = Field(None, ge=1, description="default: all cores of the smallest node")
    gpus_per_worker: int = Field(0, ge=0, description="all GPUs of a node; 0 trains on CPU")
    logical_cpu_devices: int = Field(1, ge=1, description="replicas of one CPU worker, to try out mirroring")
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware multiplies it, else float16 on GPUs"
    )
    xla: Literal["auto", "always", "never"] = Field("auto", description="auto: on GPUs; on CPUs it is slower")
    seed: Seed = Field(0, description="of the weights, the order of patches and the augmentation")
    val_dice: Literal["pooled", "patches"] = Field(
        "pooled", description="of all patches as one volume, or mean over those that hold a nodule"
    )
    publish: Literal["best", "last"] = Field(
        "best", description="the epoch of highest val Dice, or the last, which needs no validation patients"
    )
    patience_epochs: int = Field(20, ge=1, description="early stopping: epochs without a better val Dice")
    min_delta: float = Field(0.0, ge=0, lt=1, description="what val Dice must gain to count as better there")
    init_from: str | None = Field(
        None, description="begin with the best weights of this run, of like network"
    )
    max_failures: int = Field(3, ge=0, description="worker deaths that are survived by restarting the group")
    log_every_steps: int = Field(
        10, ge=1, description="logging waits for the device; notices are heeded then"
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        replicas = self.workers * max(1, self.gpus_per_worker or self.logical_cpu_devices)
        if self.global_batch % replicas:
            raise ValueError(f"global_batch {self.global_batch} must be a multiple of {replicas} replicas")
        return self


class SegmentConfig(Frozen):
    """From probabilities to nodules."""

    window_zyx: Shape = Field((96, 96, 96), description="voxels (z, y, x) that are predicted at once")
    overlap: float = Field(0.25, ge=0, lt=1, description="share of a window's side that its neighbour covers")
    batch: int = Field(1, ge=1, description="windows predicted at once")
    mirror: bool = Field(
        False, description="mean over the 8 mirror images of each window, in 8 times the time"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="probability from which a voxel is nodule")
    min_volume_mm3: float = Field(14.0, ge=0, description="smaller components go; a 3 mm ball has 14.1 mm3")
    lungs_only: bool = Field(True, description="skip windows without lung, drop components outside it")


class TuneConfig(Frozen):
    """The search space of `lungseg tune`: lists are choices, pairs of floats log-uniform bounds."""

    learning_rate: tuple[Positive, Positive] = Field((1e-4, 1e-2), description="lowest and highest")
    loss: tuple[LossName, ...] = Field(
        ("dice", "dice_bce", "dice_focal"), min_length=1, description="choices"
    )
    width: tuple[Width, ...] = Field((8, 16), min_length=1, description="choices for model.width")
    grace_epochs: int = Field(2, ge=1, description="ASHA stops no trial before")
    reduction_factor: int = Field(3, ge=2, description="ASHA goes on with one trial in so many")
    concurrent_trials: int | None = Field(None, ge=1, description="default: what the cluster can place")

    @model_validator(mode="after")
    def _range_is_open(self) -> TuneConfig:
        if self.learning_rate[0] >= self.learning_rate[1]:
            raise ValueError("learning_rate must rise: the first value is the lowest")
        return self


def _cluster_default(name: str, otherwise: str | None = None) -> Any:
    return lambda: os.environ.get(f"LUNGSEG_{name}", otherwise)


class TelemetryConfig(Frozen):
    """Metrics for Prometheus. Who scrapes them is a matter of the cluster, whose charts set two defaults."""

    metrics_port: int | None = Field(
        default_factory=_cluster_default("METRICS_PORT"), ge=1, le=65535, description="default: no metrics"
    )
    metrics_host: str = Field(
        default_factory=_cluster_default("METRICS_HOST", "127.0.0.1"), description="address to listen on"
    )
    push_seconds: Positive = Field(5.0, description="between two reports of a worker to the endpoint")
    keep_seconds: Positive = Field(300.0, description="series vanish when nothing was reported for so long")


class Recipe(Frozen):
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
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)


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
            raise ConfigError("recipe-syntax", recipe=path, message=detail, remedy="correct it") from error
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
            remedy = f"did you mean {_nearest(field)}?"
            raise ConfigError("field-unknown", field=field, remedy=remedy) from None
        # pydantic says "Value error, …" for our own validators.
        detail = first["msg"].removeprefix("Value error, ")
        where = {"field": field, "value": first["input"] if field else ""}
        raise ConfigError("field-invalid", message=detail, remedy="correct it", **where) from None


def field_names(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of every setting, sections included."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def _nearest(field: str) -> str:
    """The fields of the same last name, which stand in another section, or else the one most alike."""
    names = field_names()
    same = [name for name in names if name.rpartition(".")[2] == field.rpartition(".")[2]]
    return " or ".join(same or difflib.get_close_matches(field, names, n=1, cutoff=0))


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
        tree[last] = yaml.safe_load(text)  # YAML 1.1 reads 1e-3 as text, which pydantic makes a number
    except yaml.YAMLError as error:
        raise ConfigError(
            "override-syntax", override=override, remedy="the value must be valid YAML"
        ) from error
