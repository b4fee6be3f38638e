"""Seeded shuffles that are the same for ever, whatever NumPy is installed."""

from __future__ import annotations

import numpy as np


def permutation(count: int, seed: int, pass_number: int) -> np.ndarray:
    """A shuffle of range(count). Philox's raw stream is fixed for ever (NEP 19), unlike
    Generator.permutation, so a run can be resumed under another NumPy."""
    return np.argsort(_Draws(seed, pass_number)(count), kind="stable")


class _Draws:
    """One random stream, drawn from in turn."""

    def __init__(self, seed: int, pass_number: int) -> None:
        self._raw = np.random.Philox(key=np.array([seed, pass_number], dtype=np.uint64)).random_raw

    def __call__(self, count: int) -> np.ndarray:
        return np.asarray(self._raw(count), np.uint64)

    def uniform(self, count: int) -> np.ndarray:
        return (self(count) >> np.uint64(11)).astype(np.float64) / 2**53
