"""In which precision a network computes, chosen by the hardware."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import keras
import tensorflow as tf

from lungseg.config import TrainConfig

Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]


def choose_precision(config: TrainConfig) -> Precision:
    """ "auto" is bfloat16 with float32 weights where that is faster (see `gpu_precision`, `cpu_precision`),
    float16 with loss scaling on Volta and Turing, else float32."""
    if config.precision != "auto":
        return config.precision
    gpus = tf.config.list_physical_devices("GPU") if config.gpus_per_worker else []
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return gpu_precision(capability)
    return cpu_precision(described_cpus())


@functools.cache
def described_cpus() -> str:
    """What Linux says of this machine's CPUs, nothing where it is not Linux."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="ascii", errors="replace") if path.exists() else ""


def cpu_precision(cpuinfo: str) -> Precision:
    """What the CPU that Linux describes so computes faster in.

    By three CPUs: on an EPYC with AVX-512 BF16 a step took 0.6 to 0.7 of its time in float32, on a Xeon with
    AMX, which multiplies bfloat16 in tiles, 0.44 to 0.66, on one whose virtual machine hid AMX 1.4 to 1.5
    times as long. Intel's Cooper Lake, which has AVX-512 BF16 alone, has not been measured.
    """
    tiles = "amx_bf16" in cpuinfo
    vectors = "avx512_bf16" in cpuinfo and "AuthenticAMD" in cpuinfo
    return "mixed_bfloat16" if tiles or vectors else "float32"


def gpu_precision(compute_capability: tuple[int, int]) -> Precision:
    """What the tensor cores of a GPU multiply: bfloat16 from 8.0 on, float16 from 7.0 on."""
    if compute_capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if compute_capability >= (7, 0) else "float32"


def set_precision(config: TrainConfig) -> Precision:
    """Make Keras build its next layers in the recipe's precision, and say which that is."""
    precision = choose_precision(config)
    keras.mixed_precision.set_dtype_policy(precision)
    return precision
