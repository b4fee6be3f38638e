"""Pages for people: one HTML file each that needs no other file and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LUNG_WINDOW_HU = (-1350.0, 150.0)
"""The usual one: width 1500, centre -600."""


def render(package: str, template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """The page of a template beside the modules of `package`; `page.css` of this folder is what all share."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("lungseg.show", ".")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)


def png(image_hu: np.ndarray) -> str:
    """[y, x] in the lung window, as the base64 of a data URL."""
    from PIL import Image

    low, high = LUNG_WINDOW_HU
    grey = np.clip((image_hu - low) / (high - low), 0, 1) * 255
    file = io.BytesIO()
    Image.fromarray(np.rint(grey).astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def outlines(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> str:
    """Where the mask [y, x] crosses 0.5, as an SVG path in mm from the corner of the first pixel."""
    from skimage.measure import find_contours

    _, y_mm, x_mm = spacing_mm
    parts = []
    for line in find_contours(np.pad(mask, 1).astype(float), 0.5):
        # The padding is one pixel, and a pixel's centre half a pixel from its corner.
        points = (f"{(x - 0.5) * x_mm:.2f} {(y - 0.5) * y_mm:.2f}" for y, x in line)
        parts.append("M" + "L".join(points) + "Z")
    return "".join(parts)
