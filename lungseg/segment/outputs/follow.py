"""What `follow` shows and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lungseg import __version__
from lungseg.errors import DataError
from lungseg.segment.follow import NOISE_SHARE, Followed, Result
from lungseg.segment.outputs.nifti import DISCLAIMER
from lungseg.show import table

NOISE = f"Changes of less than {NOISE_SHARE:.0%} are within what two CTs of one day differ by."
_HEADER = ("earlier", "later", "apart mm", "mm3", "mean mm", "change", "doubles in days", "")


def as_table(rows: Sequence[Followed], days: float, lungs_dice: float | None) -> str:
    """For people; labels are those of both nodules.json."""
    laid = f" The lungs, laid upon one another, have a Dice of {lungs_dice:.3f}." if lungs_dice else ""
    told = f"{days:g} days. {NOISE}{laid}\n{DISCLAIMER.capitalize()}."
    return f"{table(_HEADER, [_line(row) for row in rows])}\n{told}"


def write(
    rows: Sequence[Followed],
    days: float,
    lungs_dice: float | None,
    earlier: Result,
    later: Result,
    folder: Path,
) -> Path:
    """Write `folder`/follow.json. Raises DataError("output-unwritable")."""
    said = {
        "disclaimer": DISCLAIMER,
        "software": f"lungseg {__version__}",
        "earlier_scan": earlier.scan,
        "later_scan": later.scan,
        "days": days,
        "noise_share": NOISE_SHARE,
        "lungs_dice": lungs_dice,
        "nodules": [asdict(row) for row in rows],
    }
    path = folder / "follow.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(said, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        remedy = f"choose another --out ({error})"
        raise DataError("output-unwritable", folder=folder, remedy=remedy) from error
    return path


def _line(row: Followed) -> tuple[str, ...]:
    labels = tuple("-" if label is None else str(label) for label in (row.earlier, row.later))
    volumes = " -> ".join("-" if mm3 is None else f"{mm3:.0f}" for mm3 in (row.earlier_mm3, row.later_mm3))
    if row.volume_change is None:
        return *labels, "", volumes, "", "", "", "gone" if row.later is None else "new"
    return (
        *labels,
        "given" if row.apart_mm is None else f"{row.apart_mm:.1f}",
        volumes,
        f"{row.earlier_mean_axial_diameter_mm:.1f} -> {row.later_mean_axial_diameter_mm:.1f}",
        f"{row.volume_change:+.0%}",
        "-" if row.doubling_days is None else f"{row.doubling_days:.0f}",
        "" if row.beyond_noise else "within noise",
    )
