"""Which settings a sweep may vary, and what a trial draws."""

from __future__ import annotations

import sys

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config import load_recipe, parse_recipe
from lungseg.errors import ConfigError
from lungseg.tune.space import check_space, draw, in_order, with_values

SPACE = (
    "tune.space.loss.focal_gamma={range: [1, 4], when: {loss.name: [dice_focal, focal]}}",
    "tune.space.loss.name={choice: [dice, dice_focal]}",
    "tune.space.optimizer.learning_rate={log: [1.0e-4, 1.0e-2]}",
    "tune.space.model.depth={range: [2, 4]}",
    "tune.space.augment.flips={choice: [true, false]}",
    "tune.space.augment.crop_zyx={choice: [null, [16, 16, 16]]}",
    "tune.space.optimizer.power={range: [0.5, 2.0], when: {optimizer.schedule: polynomial}}",
)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 20))
def test_a_draw_is_within_the_space_and_makes_a_recipe(seed: int) -> None:
    recipe = load_recipe(None, SPACE)
    check_space(recipe)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    values = draw(study.ask(), recipe)
    assert ("loss.focal_gamma" in values) == (values["loss.name"] == "dice_focal")
    assert "optimizer.power" not in values  # the recipe's schedule is another
    made = with_values(recipe, values)
    assert made.loss.name in ("dice", "dice_focal")
    assert 1 <= made.loss.focal_gamma <= 4
    assert 1e-4 <= made.optimizer.learning_rate <= 1e-2
    assert made.model.depth in (2, 3, 4)
    assert made.augment.flips is values["augment.flips"]
    assert made.augment.crop_zyx in (None, (16, 16, 16))


def test_a_space_is_the_same_by_sections_and_by_dotted_names() -> None:
    dimension = {"choice": [2, 3], "when": {"loss.name": "dice"}}
    by_name = parse_recipe({"tune": {"space": {"model.width": dimension}}})
    assert parse_recipe({"tune": {"space": {"model": {"width": dimension}}}}) == by_name
    assert parse_recipe(by_name.model_dump(mode="json")) == by_name
    assert in_order(load_recipe(None, SPACE).tune.space)[-1] == "loss.focal_gamma"


@pytest.mark.parametrize(
    ("dimension", "code", "told"),
    [
        ("model.widht={choice: [2]}", "field-unknown", "did you mean model.width?"),
        ("model.width={choice: [1]}", "field-invalid", "model.width"),
        ("model.width={range: [8, 8.5]}", "field-invalid", "model.width"),
        ("model.width={choice: [8], when: {los.name: dice}}", "field-unknown", "did you mean loss.name or"),
        ("model.width={choice: [8], log: [8, 16]}", "field-invalid", "exactly one"),
        ("model.width={when: {loss.name: dice}}", "field-invalid", "exactly one"),
        ("optimizer.learning_rate={log: [1.0e-2, 1.0e-4]}", "field-invalid", "lowest"),
        ("optimizer.learning_rate={range: [true, 2]}", "field-invalid", "no numbers"),
        ("model={choice: [8]}", "space-field", "for the whole sweep"),
        ("data.spacing_mm={choice: [[1, 1, 1]]}", "space-field", "for the whole sweep"),
        ("train.workers={choice: [1, 2]}", "space-field", "for the whole sweep"),
        (
            "loss.focal_gamma={range: [1, 2], when: {loss.focal_gamma: 1}}",
            "space-order",
            "wait for each other",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(dimension: str, code: str, told: str) -> None:
    with pytest.raises(ConfigError, match=code) as caught:
        check_space(load_recipe(None, [f"tune.space.{dimension}"]))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("sampler", "space", "code"),
    [
        ("cmaes", {"model.width": {"range": [8, 16]}, "optimizer.power": {"log": [0.1, 2]}}, None),
        ("cmaes", {"model.width": {"range": [8, 16]}}, "sampler-space"),
        ("cmaes", {"model.width": {"range": [8, 16]}, "model.depth": {"choice": [2, 3]}}, "sampler-space"),
        ("gp", {"loss.focal_gamma": {"range": [1, 4], "when": {"loss.name": "focal"}}}, "sampler-space"),
    ],
)
def test_a_sampler_is_given_only_what_it_can_search(
    sampler: str, space: dict[str, object], code: str | None
) -> None:
    recipe = parse_recipe({"tune": {"sampler": sampler, "space": space}})
    if code is None:
        return check_space(recipe)
    with pytest.raises(ConfigError, match=f"{code}.*tpe searches any space"):
        check_space(recipe)


def test_a_gaussian_process_is_refused_where_its_library_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = parse_recipe({"tune": {"sampler": "gp", "space": {"model.width": {"range": [8, 16]}}}})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"sampler-missing.*pip install torch"):
        check_space(recipe)
