"""Where the verbs are tried: an empty folder, or a store with a data set and a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.balls import write_balls

from lungseg.config import load_recipe
from lungseg.runs.run import open_run
from lungseg.storage import open_store


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; no store, credentials or cluster come from the environment."""
    for name in ("LUNGSEG_STORE", "RAY_ADDRESS", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(here: Path) -> Path:
    """A store with the data set "balls", which keeps no whole scans, and the run "taken" on it."""
    opened = open_store(here / "store")
    open_run(opened, "taken", write_balls(opened), load_recipe(None, ["model.depth=3"]), "fresh")
    return here / "store"
