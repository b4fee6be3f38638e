"""What `predict` writes for people: report.html, one file with a table, pictures and a viewer.

It holds the scan's pixels, and no other patient data. It needs neither network nor other files; without
WebGL its table and pictures say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np

from lungseg.scan.volume import Vector, Volume
from lungseg.segment.outputs.scene import Scene, ras
from lungseg.segment.predict import Segmentation
from lungseg.segment.quantify import NoduleMeasurement
from lungseg.show import page

MOST_BYTES = 15_000_000
PAGE_BYTES, ROW_BYTES = 100_000, 2_000  # style, script and text; and of each nodule
PICTURE_MM = 50.0
VIEWER = "niivue.umd.js"


def render(segmentation: Segmentation, volume: Volume, facts: Mapping[str, Any]) -> str:
    """The page of a scan `volume`, with the `facts` of nodules.json.

    It takes at most MOST_BYTES: the overview is coarser where it must be, and of many nodules the smallest
    have no picture of their own, and lie in the overview alone.
    """
    viewer = (files("lungseg.segment.outputs") / "viewer" / VIEWER).read_text(encoding="utf-8")
    scene = Scene(segmentation, volume)
    nodules = segmentation.nodules
    room = MOST_BYTES - len(viewer) - PAGE_BYTES - ROW_BYTES * len(nodules)
    lungs = scene.lungs()
    overview = scene.overview(room // 2)
    room -= sum(map(len, (lungs or "", *overview.values())))
    pictures: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for number, nodule in enumerate(nodules):
        picture = _picture(scene, nodule)
        part = {"surface": scene.surface(number), **scene.close_up(number)}
        room -= sum(len(text) for text in (*part.values(), *picture.values()) if isinstance(text, str))
        if room < 0:
            break
        pictures.append(picture)
        parts.append(part)
    return page.render(
        "lungseg.segment.outputs",
        "report.html.j2",
        {"show": _show},
        facts=facts,
        nodules=nodules,
        pictures=pictures,
        scene={
            "overview": overview,
            "lungs": lungs,
            "centres": [ras(one.centre_lps_mm) for one in nodules],
            "nodules": parts,
        },
        viewer=viewer,
        window_hu=page.LUNG_WINDOW_HU,
    )


def _picture(scene: Scene, nodule: NoduleMeasurement) -> dict[str, Any]:
    """The slice in which the nodule was measured: a PNG, and outline and axes in mm from its corner."""
    ends = np.array(nodule.long_axis_lps_mm)
    z, y, x = scene.box(ends.mean(axis=0, keepdims=True), PICTURE_MM / 2)
    index = round(float(scene.volume.geometry.to_index_zyx(ends.mean(axis=0))[0]))
    index = min(max(index, z.start), z.stop - 1)
    part = scene.volume.geometry.part((slice(index, index + 1), y, x))
    _, height_mm, width_mm = np.multiply(part.shape_zyx, part.spacing_mm).round(3).tolist()
    labels = scene.labels[index, y, x]

    def line(axis: tuple[Vector, Vector]) -> str:
        at_mm = (part.to_index_zyx(np.array(axis)) + 0.5) * part.spacing_mm
        (_, y1, x1), (_, y2, x2) = at_mm.tolist()
        return f"M{x1:.2f} {y1:.2f}L{x2:.2f} {y2:.2f}"

    return {
        "width_mm": width_mm,
        "height_mm": height_mm,
        "png": page.png(scene.volume.volume_hu[index, y, x]),
        "outline": page.outlines(labels == nodule.label, part.spacing_mm),
        "others": page.outlines((labels > 0) & (labels != nodule.label), part.spacing_mm),
        "axes": line(nodule.long_axis_lps_mm) + line(nodule.short_axis_lps_mm),
    }


def _show(value: float | str | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.{digits}f}"
