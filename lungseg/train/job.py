"""What a training worker is told: its job, and who its peers are. Needs neither TensorFlow nor Ray."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lungseg.config import Recipe
from lungseg.dataset.manifest import Manifest
from lungseg.storage import Store

LEFT = "worker-asked-to-leave"
"""The code of the error by which a worker leaves once its state is committed."""
DRAINS = "drains"
"""Its `node`, where that was to be taken away from it."""


@dataclass(frozen=True)
class Session:
    """This worker among its peers.

    `share` gives every rank what rank 0 passed in; `report` tells the driver of an epoch; both are
    barriers. `asked` says whether this process was asked to leave, and `leave`, which does not return, is
    called by all ranks with the step that a checkpoint is committed of. `settled`: an epoch is committed
    before it is reported, since whoever hears of it may end the run.
    """

    rank: int
    world_size: int
    threads: int | None
    share: Callable[[Any], Any]
    report: Callable[[dict[str, float]], None]
    asked: Callable[[], bool] = lambda: False
    leave: Callable[[int], NoReturn] = sys.exit
    settled: bool = False


@dataclass(frozen=True)
class Job:
    """What to train: `root` is the run's prefix in the store, `init` the checkpoint ("run/checkpoint") of
    another run whose weights it begins with, `driver` the name of the command that started the workers."""

    store: Store
    root: str
    attempt: str
    manifest: Manifest
    recipe: Recipe
    init: str = ""
    driver: str = field(default_factory=lambda: secrets.token_hex(8))
