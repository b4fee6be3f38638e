"""What a scanner makes of HU: noise that neighbours share and, as its kernel is smooth or sharp, edges."""

from __future__ import annotations

import numpy as np
from scipy import fft

SOFTEST, SHARPEST = 0.45, 0.75
"""Cycles a mm at which a kernel leaves 1/e of the contrast, from smooth to sharp."""
OVERSHOOT = 0.5
"""What the sharpest kernel adds to the middle frequencies."""
MIDDLE = 0.3  # cycles a mm


def noisy(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise that neighbouring pixels share, as a reconstruction kernel leaves it, and round."""
    sigma_hu = rng.uniform(20, 32)
    scanned = np.empty(hu.shape, np.int16)
    for index, plane in enumerate(hu):
        white = rng.standard_normal((plane.shape[0] + 1, plane.shape[1] + 1), dtype=np.float32)
        # The sum of four has twice the deviation of one.
        noise = (white[1:, 1:] + white[1:, :-1] + white[:-1, 1:] + white[:-1, :-1]) / 2
        scanned[index] = np.clip(np.rint(plane + sigma_hu * noise), -1024, 3071)
    return scanned


def reconstructed(
    hu: np.ndarray, spacing_mm: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """int16 HU [z, y, x] by one kernel, drawn from smooth to sharp, on float32 `hu`.

    The noise of filtered back-projection has a power of |f| MTF(f)^2 (Riederer, Pelc and Chesler, Phys. Med.
    Biol. 1978): a smooth kernel's is little and coarse, a sharp one's strong and fine. Slices share up to
    half of it, as those that overlap do; thick ones have less.
    """
    sharpness = rng.uniform()
    sigma_hu = rng.uniform(0.8, 1.2) * (12 + 45 * sharpness) / np.sqrt(max(spacing_mm[0], 1.0))
    shared = rng.uniform(0, 0.5)
    rows, columns = hu.shape[1:]
    frequency = np.hypot(
        fft.fftfreq(rows, spacing_mm[1])[:, None], fft.rfftfreq(columns, spacing_mm[2])
    ).astype(np.float32)
    mtf = np.exp(-((frequency / (SOFTEST + sharpness * (SHARPEST - SOFTEST))) ** 2))
    mtf *= 1 + OVERSHOOT * sharpness * (frequency / MIDDLE) ** 2 * np.exp(1 - (frequency / MIDDLE) ** 2)
    grain = np.sqrt(frequency) * mtf
    grain *= sigma_hu / _deviation(grain, columns)
    scanned = np.empty(hu.shape, np.int16)
    noise = np.zeros((rows, columns), np.float32)
    for index, plane in enumerate(hu):
        white = rng.standard_normal((rows, columns), dtype=np.float32)
        noise = np.sqrt(1 - shared**2) * white + (shared * noise if index else 0)
        seen = fft.irfft2(fft.rfft2(plane) * mtf + fft.rfft2(noise) * grain, s=(rows, columns))
        scanned[index] = np.clip(np.rint(seen), -1024, 3071)
    return scanned


def _deviation(gain: np.ndarray, columns: int) -> float:
    """Of white noise of unit deviation that passed `gain`, a half-plane [rows, columns / 2 + 1]."""
    both = np.full(gain.shape[1], 2.0)
    both[0] = 1
    if columns % 2 == 0:
        both[-1] = 1
    return float(np.sqrt((gain**2 * both).sum() / (gain.shape[0] * columns)))
