"""Runs that earlier versions wrote, kept as they were: every later version reads them.

`stored/format-N` are a run of two steps of a network of width 2 on `write_balls`, whose
manifest says 0.7 x 0.8 x 0.8 mm; `expected.json` has what the network gave when it was written. A new format
adds a folder, and takes none away.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lungseg.config.stored import stored_recipe
from lungseg.dataset.manifest import Manifest
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.run import Run, list_runs, load_run, pull_best
from lungseg.storage import open_store

STORED = Path(__file__).parent / "stored"
ROOT = "runs/tiny"
formats = pytest.mark.parametrize("folder", sorted(STORED.iterdir()), ids=lambda folder: folder.name)


def data_of(run: Run) -> Manifest:
    return Manifest(run.data, "", {}, (16, 16, 16), {}, {}, {}, {}, (), sha256=run.manifest_sha256)


@formats
def test_a_stored_run_is_listed_and_can_be_resumed(folder: Path) -> None:
    store = open_store(folder)
    ((run, best),) = list_runs(store)
    assert best is not None
    assert best.manifest_sha256 == run.manifest_sha256
    recipe = stored_recipe(run.recipe)
    assert run.fits(data_of(run), recipe, "train")
    assert not run.fits(replace(data_of(run), sha256="0" * 64), recipe, "train")
    newest = Checkpoints(store, ROOT).newest(run.attempt)
    assert newest is not None
    assert (newest.name, newest.state.step, newest.state.epoch) == (best.checkpoint, 2, 1)
    assert newest.state.ended(recipe.train)
    assert newest.state.val_dice == best.val_dice
    assert newest.optimizer


@formats
def test_a_stored_run_is_pulled(folder: Path, tmp_path: Path) -> None:
    best = pull_best(open_store(folder), "tiny", tmp_path)
    assert (tmp_path / "model.keras").stat().st_size > 10_000
    assert json.loads((tmp_path / "state.json").read_text())["step"] == best.step == 2


@formats
def test_a_stored_network_gives_what_it_gave_at_the_spacing_of_its_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe of format 1 says 1 mm, which its data set contradicts. All were stored in float32."""
    from lungseg.model import precision
    from lungseg.runs.export import load_best

    monkeypatch.setattr(precision, "described_cpus", lambda: "")
    best = load_best(open_store(folder), "tiny")
    assert best.recipe.data.spacing_mm == (0.7, 0.8, 0.8)
    assert load_run(open_store(folder), "tiny").name == best.run
    hu = np.linspace(-1000, 400, 16**3, dtype=np.float32).reshape(1, 16, 16, 16, 1)
    expected = json.loads((folder / "expected.json").read_text())
    np.testing.assert_allclose(best.predict(hu).ravel()[::512], expected, atol=1e-4)
