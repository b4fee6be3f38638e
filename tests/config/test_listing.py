"""The tree of settings as people and editors read it."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from helpers.servers import ROOT

from lungseg.config import Recipe, field_names, load_recipe
from lungseg.config.listing import recipe_schema, sections
from lungseg.errors import ConfigError

RECIPES = ROOT / "jobs" / "recipes"


def test_every_setting_is_listed_once_and_its_default_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [one for section in sections() for one in section.settings]
    names = [one.name for one in listed] + [section.name for section in sections()]
    assert sorted(names) == sorted(field_names())
    for one in listed:
        assert load_recipe(None, [f"{one.name}={one.default}"]) == Recipe(), one
        assert one.values
        assert one.meaning


def test_a_section_comes_with_those_inside_it_and_a_setting_alone() -> None:
    assert [one.name for one in sections("data")] == [
        "data", "data.lidc", "data.pairs", "data.split", "data.patch", "data.shard"
    ]  # fmt: skip
    assert [one.name for one in sections("data.patch")] == ["data.patch"]
    [train] = sections("train.epochs")
    assert [(one.name, one.default, one.values) for one in train.settings] == [
        ("train.epochs", "100", "integer >= 1")
    ]


def test_an_unknown_section_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean data.patch\?"):
        sections("data.patches")
    with pytest.raises(ConfigError, match=r"did you mean train\?"):
        sections("Train")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("optimizer.learning_rate", "number > 0"),
        ("model.hu_window", "2 of: number"),
        ("data.patch.shape_zyx", "3 of: integer 1 to 1024"),
        ("data.split.file", "path or null"),
        ("loss.reduction", "sample | batch"),
        ("model.dropout", "number >= 0, < 1"),
        ("augment.flips", "true | false"),
        ("model.residual_blocks", "list of: integer 1 to 16"),
        ("telemetry.metrics_host", "text"),
    ],
)
def test_bounds_are_told_in_few_words(name: str, values: str) -> None:
    [section] = sections(name)
    assert section.settings[0].values == values


def test_the_schema_beside_the_recipes_is_that_of_the_tree() -> None:
    kept = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    remedy = "uv run lungseg settings --schema > jobs/recipes/recipe.schema.json"
    assert kept == recipe_schema(), f"settings have changed; renew it: {remedy}"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_editors_find_the_schema_and_it_admits_the_recipe(file: object) -> None:
    text = file.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    jsonschema.validate(yaml.safe_load(text), recipe_schema())


@pytest.mark.parametrize("tree", [{"train": {"epochz": 3}}, {"train": {"epochs": 0}}, {"los": {}}])
def test_the_schema_refuses_what_lungseg_refuses(tree: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, recipe_schema())
