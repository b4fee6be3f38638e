"""Which recipe and data set can train together, and whose settings count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.balls import write_balls

from lungseg.config import DataConfig, load_recipe
from lungseg.dataset.manifest import Manifest
from lungseg.errors import ConfigError
from lungseg.runs.fit import on_data
from lungseg.runs.run import load_run, open_run
from lungseg.storage import open_store

FINE = DataConfig.model_validate({"spacing_mm": [0.7, 0.8, 0.8], "patch": {"shape_zyx": [16, 16, 16]}})


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of a data set that was prepared at 0.7 x 0.8 x 0.8 mm."""
    return replace(write_balls(open_store(tmp_path)), config=FINE.model_dump(mode="json"))


def test_a_recipe_that_is_silent_takes_the_settings_of_its_data(manifest: Manifest, tmp_path: Path) -> None:
    """Prediction resamples a scan to `data.spacing_mm` of the run's recipe."""
    recipe = load_recipe(None, ["model.depth=3"])
    assert recipe.data.spacing_mm == (1.0, 1.0, 1.0)
    assert on_data(recipe, manifest).data == FINE
    assert on_data(recipe, manifest).model == recipe.model
    open_run(open_store(tmp_path), "r", manifest, recipe, "fresh")
    assert load_run(open_store(tmp_path), "r").recipe["data"]["spacing_mm"] == [0.7, 0.8, 0.8]


def test_what_agrees_may_be_said_again(manifest: Manifest) -> None:
    recipe = load_recipe(None, ["data.spacing_mm=[0.7,0.8,0.8]", "data.patch.shape_zyx=[16,16,16]"])
    assert on_data(recipe, manifest).data == FINE
    assert on_data(on_data(recipe, manifest), manifest).data == FINE


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.spacing_mm=[1,1,1]", "data.spacing_mm"),  # the default, but said
        ("data.patch.shape_zyx=[32,32,32]", "data.patch.shape_zyx"),
        ("data.split.fold=1", "data.split.fold"),
    ],
)
def test_what_contradicts_the_data_is_refused_and_claims_no_name(
    manifest: Manifest, tmp_path: Path, override: str, field: str
) -> None:
    overrides = [override, "model.depth=3", *(["data.split.folds=3"] if "fold" in field else [])]
    with pytest.raises(ConfigError, match="data-differs") as caught:
        open_run(open_store(tmp_path), "r", manifest, load_recipe(None, overrides), "fresh")
    assert field in str(caught.value)
    assert "leave it out" in caught.value.remedy
    assert not open_store(tmp_path).exists("runs/r/run.json")


def test_a_file_of_splits_is_a_matter_of_preparing_alone(manifest: Manifest) -> None:
    """Its path is not kept in the manifest, so nothing can contradict it."""
    assert on_data(load_recipe(None, ["data.split.file=splits.csv"]), manifest).data == FINE
