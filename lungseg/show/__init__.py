"""Text for people: what the verbs print and the log says."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of their own width, two spaces apart."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def duration(seconds: float) -> str:
    """To two figures or so: nobody plans by the second what takes hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def val_dice_text(val_dice: float | None) -> str:
    """A checkpoint's validation Dice."""
    return "not validated" if val_dice is None else f"val Dice {val_dice:.4f}"
