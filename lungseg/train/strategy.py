"""Which devices a worker uses, in which precision, and how replicas are kept equal.

One worker mirrors over its own devices; several add an all-reduce between workers (NCCL on GPU, ring on
CPU). Called once in a process, before TensorFlow touches a device.
"""

from __future__ import annotations

import tensorflow as tf

from lungseg.config import Recipe


def make_strategy(recipe: Recipe, world_size: int, threads: int | None) -> tf.distribute.Strategy:
    """The strategy of this worker; for several, TF_CONFIG names the peers (Ray Train sets it)."""
    config, members = recipe.train, recipe.model.members
    if threads:
        # Ray counts CPUs but binds none: two workers that each take all cores slow both down. What runs
        # side by side has its own cores: two convolutions on one each take less time than both on two.
        beside = min(threads, config.logical_cpu_devices * members)
        tf.config.threading.set_intra_op_parallelism_threads(threads // beside)
        # Devices wait for each other, so each has a thread even where there are fewer cores.
        tf.config.threading.set_inter_op_parallelism_threads(max(beside, config.logical_cpu_devices))
    gpus = tf.config.list_physical_devices("GPU") if config.gpus_per_worker else []
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if not gpus and config.logical_cpu_devices > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * config.logical_cpu_devices
        tf.config.set_logical_device_configuration(cpu, parts)
    if world_size > 1:
        kind = tf.distribute.experimental.CommunicationImplementation
        options = tf.distribute.experimental.CommunicationOptions(
            implementation=kind.NCCL if gpus else kind.RING
        )
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    count = len(gpus) or config.logical_cpu_devices
    return tf.distribute.MirroredStrategy([f"{'GPU' if gpus else 'CPU'}:{i}" for i in range(count)])
