"""A sweep's trials as a table: on a terminal renewed while it runs, and at its end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from lungseg.telemetry import talks
from lungseg.tune.trials import Trial, by_score

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HEADER = ("trial", "state", "val Dice", "s/scan", "epochs", "minutes", "seed", "settings")
_BEST_SHOWN = 8


def cells(trial: Trial) -> tuple[str, ...]:
    """A row below `HEADER`."""
    settings = " ".join(f"{name}={_short(value)}" for name, value in trial.values.items())
    dice = "-" if trial.val_dice is None else f"{trial.val_dice:.4f}"
    pace = "-" if trial.scan_seconds is None else f"{trial.scan_seconds:.1f}"
    minutes = f"{trial.seconds / 60:.1f}"
    epochs = str(len(trial.curve))
    return trial.name, trial.state, dice, pace, epochs, minutes, str(trial.seed), trial.error or settings


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def live(stream: TextIO) -> Iterator[Callable[[Sequence[Trial]], None]]:
    """Yields what shows the trials: below the log's lines on a terminal, elsewhere nowhere."""
    if not (stream.isatty() and talks()):
        yield lambda trials: None
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, markup=False, highlight=False)
    with (
        Live(console=console, refresh_per_second=2, transient=True, redirect_stderr=False) as shown,
        _lines_above(console, stream),
    ):
        yield lambda trials: shown.update(_table(trials))


def _table(trials: Sequence[Trial]) -> Table:
    """What runs, and the best of what has ended."""
    from rich.table import Table

    shown = Table(*HEADER, box=None)
    ended = sorted((trial for trial in trials if trial.ended), key=by_score)
    for trial in [*(trial for trial in trials if trial.state == "running"), *ended[:_BEST_SHOWN]]:
        shown.add_row(*cells(trial))
    return shown


@contextmanager
def _lines_above(console: Console, stream: TextIO) -> Iterator[None]:
    """Whole lines of whoever writes to standard error appear above what `console` renews."""
    from rich.file_proxy import FileProxy

    class Lines(FileProxy):
        def isatty(self) -> bool:
            return False  # bars would be drawn over the table

    before, sys.stderr = sys.stderr, Lines(console, stream)
    all_of_them = logging.getLogger("lungseg").handlers
    streams = (one for one in all_of_them if isinstance(one, logging.StreamHandler))
    handlers = [one for one in streams if one.stream is before]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before
        for handler in handlers:
            handler.setStream(before)
