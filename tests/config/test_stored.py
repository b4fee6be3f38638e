"""Settings that a run keeps: they mean the same to every later version."""

from __future__ import annotations

import pytest

from lungseg.config import load_recipe
from lungseg.config.stored import FORMAT, store_recipe, stored_recipe
from lungseg.errors import ConfigError

RECIPE = load_recipe(None, ["train.epochs=7", "model.width=8", "loss.name=focal"])


def test_a_recipe_comes_back_as_it_was_and_tells_its_format() -> None:
    tree = store_recipe(RECIPE)
    assert tree["format"] == FORMAT
    assert stored_recipe(tree) == RECIPE


def test_a_setting_that_is_newer_than_the_run_has_its_default() -> None:
    tree = store_recipe(RECIPE)
    del tree["optimizer"]["ema"], tree["model"]["members"]
    assert stored_recipe(tree) == RECIPE


def test_settings_of_format_1_have_their_names_of_today() -> None:
    tree = store_recipe(RECIPE)
    del tree["format"], tree["train"]["val_dice_mode"]
    tree["train"]["val_dice"] = "patches"
    assert stored_recipe(tree).train.val_dice_mode == "patches"
    assert tree["train"]["val_dice"] == "patches"  # what was read is not changed


def test_trees_before_format_4_that_say_no_score_rank_by_the_highest_probability() -> None:
    tree = {**store_recipe(RECIPE), "format": 3}
    assert stored_recipe(tree) == RECIPE
    del tree["segment"]["candidate_score"]
    assert stored_recipe(tree).segment.candidate_score == "max"
    assert stored_recipe({**tree, "format": FORMAT}).segment.candidate_score == "p95"


def test_what_a_later_version_wrote_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="recipe-newer") as caught:
        stored_recipe({**store_recipe(RECIPE), "format": FORMAT + 1})
    assert "version" in caught.value.remedy
