"""The report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungseg.evaluate.report import HEADLINES, SEED_FIGURES, SEED_NOTE, notes, show
from lungseg.show import page

WIDTH, HEIGHT, MARGIN = 320, 240, 40
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Coordinates of an SVG of WIDTH x HEIGHT: ticks are (place, text), `lines` (dashes, points) of
    polylines."""

    title: str
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]
    dots: list[tuple[float, float]]


def render(tree: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """`tree` is the JSON's, `pictures` those of the worst nodules."""
    charts = [
        froc_chart(tree["detection"]),
        volume_chart(tree["nodules"]),
        reliability_chart(tree["calibration"]),
    ]
    return page.render(
        "lungseg.evaluate",
        "report.html.j2",
        {"show": show},
        tree=tree,
        notes=notes(tree),
        pictures=pictures,
        charts=[one for one in charts if one],
        headlines=HEADLINES,
        seed_figures=SEED_FIGURES,
        seed_note=SEED_NOTE,
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
    )


def froc_chart(detection: Mapping[str, Any]) -> Chart:
    curves = {
        rule: [(math.log2(max(x, 0.125)), y) for x, y in detection[rule]["curve"] if x <= 8 and y is not None]
        for rule in ("luna16", "overlap")
    }
    ticks = [(float(exponent), f"{2.0**exponent:g}") for exponent in range(-3, 4)]
    return _chart(
        "FROC: LUNA16's rule, and by overlap (dashed)",
        ("false positives a scan", ticks),
        ("sensitivity", _even(0, 1)),
        list(curves.values()),
    )


def volume_chart(nodules: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Bland and Altman (Lancet, 1986), of volumes, as shares of their mean; found nodules only."""
    pairs = [
        (one["volume_mm3"], one["predicted_volume_mm3"]) for one in nodules if one["predicted_volume_mm3"] > 0
    ]
    if not pairs:
        return None
    truth, predicted = np.array(pairs).T
    mean = (truth + predicted) / 2
    percent = 100 * (predicted - truth) / mean
    bias, spread = float(percent.mean()), 1.96 * float(percent.std(ddof=1)) if len(pairs) > 1 else 0.0
    low, high = math.floor(math.log10(mean.min())), math.ceil(math.log10(mean.max()))
    high = max(high, low + 1)
    return _chart(
        f"Bland-Altman of volumes: bias {bias:.0f} %, limits {bias - spread:.0f} % and {bias + spread:.0f} %",
        ("mean of both volumes, mm³", [(float(e), f"{10.0**e:g}") for e in range(low, high + 1)]),
        ("predicted minus truth, % of the mean", _even(-200, 200)),
        [[(low, y), (high, y)] for y in (bias, bias - spread, bias + spread)],
        list(zip(np.log10(mean).tolist(), percent.tolist(), strict=True)),
    )


def reliability_chart(calibration: Mapping[str, Any]) -> Chart | None:
    found = [
        (one["mean_score"], one["nodule_share"]) for one in calibration.get("bins", []) if one["candidates"]
    ]
    if not found:
        return None
    return _chart(
        f"Reliability of candidates: ECE {show(calibration['ece'])}, Brier {show(calibration['brier'])}",
        ("mean score", _even(0, 1)),
        ("share of nodules", _even(0, 1)),
        [found, [(0, 0), (1, 1)]],
        found,
    )


Ticks = list[tuple[float, str]]


def _even(low: float, high: float) -> Ticks:
    return [(float(value), f"{value:g}") for value in np.linspace(low, high, 5)]


def _chart(
    title: str,
    x_axis: tuple[str, Ticks],
    y_axis: tuple[str, Ticks],
    lines: Sequence[Points],
    dots: Points = (),
) -> Chart:
    """All lines but the first are dashed; the ends of the axes are their first and last ticks."""
    (x_title, x_ticks), (y_title, y_ticks) = x_axis, y_axis

    def share(value: float, ticks: Ticks) -> float:
        return (value - ticks[0][0]) / (ticks[-1][0] - ticks[0][0])

    def place(x: float, y: float) -> tuple[float, float]:
        right = MARGIN + share(x, x_ticks) * (WIDTH - MARGIN - 10)
        down = HEIGHT - MARGIN - share(y, y_ticks) * (HEIGHT - MARGIN - 10)
        return round(right, 1), round(down, 1)

    def joined(points: Points) -> str:
        return " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))

    return Chart(
        title,
        x_title,
        y_title,
        [(place(value, y_ticks[0][0])[0], text) for value, text in x_ticks],
        [(place(x_ticks[0][0], value)[1], text) for value, text in y_ticks],
        [("4 3" if number else "", joined(points)) for number, points in enumerate(lines)],
        [place(*point) for point in dots],
    )
