"""Every setting of lungseg in one frozen tree: bounds, defaults and help stand here and nowhere else."""

from __future__ import annotations

from lungseg.config.augment import AugmentConfig
from lungseg.config.data import DataConfig, LidcConfig, PairsConfig, PatchConfig, ShardConfig, SplitConfig
from lungseg.config.fields import Codec, LidcMask, LossName
from lungseg.config.loss import LossConfig
from lungseg.config.model import ModelConfig
from lungseg.config.optimizer import OptimizerConfig
from lungseg.config.recipe import Recipe, field_names, load_recipe, parse_recipe, resegmented
from lungseg.config.segment import SegmentConfig
from lungseg.config.stream import StreamConfig
from lungseg.config.telemetry import TelemetryConfig
from lungseg.config.train import CheckpointConfig, TrainConfig
from lungseg.config.tune import TuneConfig

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "Codec",
    "DataConfig",
    "LidcConfig",
    "LidcMask",
    "LossConfig",
    "LossName",
    "ModelConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PatchConfig",
    "Recipe",
    "SegmentConfig",
    "ShardConfig",
    "SplitConfig",
    "StreamConfig",
    "TelemetryConfig",
    "TrainConfig",
    "TuneConfig",
    "field_names",
    "load_recipe",
    "parse_recipe",
    "resegmented",
]
