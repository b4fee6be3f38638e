"""Settings of a run, and of its checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lungseg.config.fields import Frozen, Seed


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
    gpus_per_worker: int = Field(0, ge=0, description="of each worker, which must have them; 0 trains on CPU")
    logical_cpu_devices: int = Field(1, ge=1, description="replicas of one CPU worker; one a core is faster")
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware is faster in it, else float16 on GPUs"
    )
    xla: Literal["auto", "always", "never"] = Field("auto", description="auto: on GPUs; on CPUs it is slower")
    seed: Seed = Field(0, description="of the weights, the order of patches and the augmentation")
    val_dice_mode: Literal["pooled", "patches"] = Field(
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
    wait_minutes: float = Field(
        15, ge=0, description="how long a job on a cluster waits for its nodes, and for its store"
    )
    log_every_steps: int = Field(
        10, ge=1, description="logging waits for the device; notices are heeded then"
    )

    @property
    def replicas_per_worker(self) -> int:
        return self.gpus_per_worker or self.logical_cpu_devices

    @model_validator(mode="after")
    def _devices_go_together(self) -> TrainConfig:
        if self.logical_cpu_devices > 1 and (self.workers > 1 or self.gpus_per_worker):
            raise ValueError("logical_cpu_devices is for one worker without GPUs: set it to 1")
        replicas = self.workers * self.replicas_per_worker
        if self.global_batch % replicas:
            raise ValueError(f"global_batch {self.global_batch} must be a multiple of {replicas} replicas")
        return self
