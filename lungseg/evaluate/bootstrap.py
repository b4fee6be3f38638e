"""How far a figure can be trusted: intervals, differences, ranks and tests over patients.

A figure of a split is a `Statistic`: given how often each scan is there, it says what comes out. With every
scan there once that is the figure itself; patients drawn with replacement (Efron, 1979) give its spread.
Scans of one patient come and go together, since they are no independent evidence. Runs are compared on the
same draws, so that what is hard for both cancels out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

REPLICATES = 2000
LEVEL = 0.95
FEW_PATIENTS = 10

Patients = Sequence[int] | Sequence[str]
"""Whose each scan is."""
Statistic = Callable[[np.ndarray], np.ndarray]
"""Of int weights [replicates, scans] a value for each replicate, NaN where it has none."""


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its percentile interval at LEVEL, all None where it has no value."""

    value: float | None
    low: float | None
    high: float | None
    patients: int

    @property
    def means_little(self) -> bool:
        """Of so few patients, the draws hardly differ from one another, whatever the population does."""
        return self.patients < FEW_PATIENTS


def resample(patients: Patients, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """int64 [replicates, scans]: how often each scan is there."""
    names, of_scan = np.unique(patients, return_inverse=True)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    return drawn[:, of_scan]


@dataclass(frozen=True)
class Ratio:
    """The sum over scans of one by that of the other: a mean over scans (`denominators` all 1), over nodules,
    or a rate."""

    numerators: tuple[float, ...]
    denominators: tuple[float, ...]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        parts, wholes = weights @ np.array(self.numerators), weights @ np.array(self.denominators)
        return np.divide(parts, wholes, out=np.full(len(weights), np.nan), where=wholes != 0)


def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> Ratio:
    above, below = (tuple(float(one) for one in values) for values in (numerators, denominators))
    return Ratio(above, below)


def difference(a: Statistic, b: Statistic) -> Statistic:
    """b - a on the same draws."""
    return lambda weights: b(weights) - a(weights)


def interval(statistic: Statistic, patients: Patients, weights: np.ndarray) -> Interval:
    """`weights` as `resample(patients)` makes them; draws in which the figure has no value are left out."""
    [value] = statistic(np.ones((1, len(patients)), np.int64))
    low, high = bounds(statistic(weights))
    if math.isnan(value) or math.isnan(low):
        return Interval(None, None, None, len(set(patients)))
    return Interval(float(value), float(low), float(high), len(set(patients)))


def bounds(spread: np.ndarray) -> np.ndarray:
    """Low and high bound, [2, ...], of values [replicates, ...]; NaN where no draw has one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.asarray(np.nanquantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0))


def rank_shares(
    statistics: Sequence[Statistic], weights: np.ndarray, higher_is_better: bool = True
) -> np.ndarray:
    """[runs, ranks]: in which share of the draws each run comes first, second and so on; equals share the
    better rank (Wiesenfarth et al., Methods and open-source toolkit for analyzing and visualizing challenge
    results, 2021: challengeR). Draws in which a run has no value are left out."""
    values = np.array([statistic(weights) for statistic in statistics])
    values = values[:, ~np.isnan(values).any(axis=0)]
    ranks = stats.rankdata(-values if higher_is_better else values, method="min", axis=0)
    places = np.arange(1, len(statistics) + 1)
    return (ranks[:, :, None] == places).sum(axis=1) / max(values.shape[1], 1)


def by_patient(statistic: Statistic, patients: Patients) -> np.ndarray:
    """float64 [patients], in their order: the figure of each one's scans alone."""
    _, of_scan = np.unique(patients, return_inverse=True)
    return statistic(np.equal.outer(np.arange(of_scan.max() + 1), of_scan).astype(np.int64))


def wilcoxon(a: np.ndarray, b: np.ndarray) -> float | None:
    """The two-sided p of Wilcoxon's signed-rank test (1945) of paired values, one a patient; 1.0 where no
    pair differs, None where there is no pair without NaN."""
    differences = np.round((b - a)[~np.isnan(b - a)], 12)  # or the last bits of equals would be ranked
    if not differences.size:
        return None
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p corrected for the others (Holm, 1979): the smallest times their number, the next times one
    less, and none smaller than the one before it, in the order given."""
    given = np.asarray(p_values, np.float64)
    order = np.argsort(given, kind="stable")
    corrected = np.empty(len(given))
    corrected[order] = np.minimum(1, np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)))
    return corrected.tolist()
