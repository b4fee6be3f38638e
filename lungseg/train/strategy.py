"""Which devices a worker uses, in which precision, and how replicas are kept equal.

One worker mirrors over its own devices; several add an all-reduce between workers (NCCL on GPU, ring on
CPU). Called once in a process, before TensorFlow touches a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from lungseg.config import Recipe, TrainConfig
from lungseg.errors import ConfigError


def look_for_devices() -> None:
    """TensorFlow's first look, at which its C++ speaks up about drivers that are not there."""
    tf.config.list_physical_devices()


def make_strategy(recipe: Recipe, world_size: int, threads: int | None) -> tf.distribute.Strategy:
    """The strategy of this worker; for several, TF_CONFIG names the peers (Ray Train sets it).

    Raises ConfigError("gpus-missing", "devices-differ") rather than train on other devices than the recipe's.
    """
    config = recipe.train
    _share_cores(config, recipe.model.members, threads)
    gpus = tf.config.list_physical_devices("GPU") if config.gpus_per_worker else []
    require_gpus(config, len(gpus))
    # TensorFlow takes whatever it sees: between workers even where others were named.
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if config.logical_cpu_devices > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * config.logical_cpu_devices
        tf.config.set_logical_device_configuration(cpu, parts)
    devices = [f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(config.replicas_per_worker)]
    strategy = _between_workers(bool(gpus)) if world_size > 1 else tf.distribute.MirroredStrategy(devices)
    require_devices(config, world_size, strategy.num_replicas_in_sync, strategy.extended.worker_devices)
    return strategy


def require_gpus(config: TrainConfig, visible: int) -> None:
    """Raises ConfigError("gpus-missing", "devices-differ") unless TensorFlow sees as many as asked for."""
    asked = config.gpus_per_worker
    if asked == visible:
        return
    if visible < asked:
        code, remedy = "gpus-missing", "check nvidia-smi, install lungseg[gpu], or ask for fewer"
    else:
        code, remedy = "devices-differ", "hide some by CUDA_VISIBLE_DEVICES, or raise train.gpus_per_worker"
    raise ConfigError(code, gpus_per_worker=asked, visible_to_tensorflow=visible, remedy=remedy)


def require_devices(config: TrainConfig, world_size: int, replicas: int, devices: Sequence[str]) -> None:
    """Raises ConfigError("devices-differ") unless the strategy's replicas over all workers, and this worker's
    devices, are the recipe's: others would see another part of each batch than the order deals out."""
    kind = "GPU" if config.gpus_per_worker else "CPU"
    wanted = config.replicas_per_worker
    if (
        world_size != config.workers
        or replicas != world_size * wanted
        or len(devices) != wanted
        or not all(f"device:{kind}:" in device for device in devices)
    ):
        raise ConfigError(
            "devices-differ",
            workers=world_size,
            replicas=replicas,
            devices=" ".join(devices),
            asked=f"{config.workers} workers of {wanted} {kind}",
            remedy="set train.workers and train.gpus_per_worker to what there is",
        )


def _share_cores(config: TrainConfig, members: int, threads: int | None) -> None:
    """Ray counts CPUs but binds none: two workers that each take all cores slow both down. What runs side by
    side has its own cores: two convolutions on one each take less time than both on two."""
    if threads:
        beside = min(threads, config.logical_cpu_devices * members)
        tf.config.threading.set_intra_op_parallelism_threads(threads // beside)
        # Devices wait for each other, so each has a thread even where there are fewer cores.
        tf.config.threading.set_inter_op_parallelism_threads(max(beside, config.logical_cpu_devices))


def _between_workers(gpus: bool) -> tf.distribute.Strategy:
    kind = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind.NCCL if gpus else kind.RING)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
