"""The tree of settings: every field explained and bounded, every wrong one refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.servers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lungseg.config import Recipe, ShardConfig, field_names, load_recipe, parse_recipe, resegmented
from lungseg.config.tune import Dimension
from lungseg.errors import ConfigError

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, overrides)
    return caught.value


@pytest.mark.parametrize(("name", "field"), leaves(Recipe))
def test_every_field_has_help(name: str, field: FieldInfo) -> None:
    assert field.description


def numbers(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if schema.get("type") in ("integer", "number"):
        yield schema
    for part in (schema.get("items"), *schema.get("anyOf", ()), *schema.get("prefixItems", ())):
        if isinstance(part, dict):
            yield from numbers(part)


def test_every_number_but_those_of_any_kind_has_a_lower_bound() -> None:
    definitions = Recipe.model_json_schema()["$defs"]
    unbounded = [
        f"{section}.{name}"
        for section, tree in definitions.items()
        for name, field in tree["properties"].items()
        if any(not {"minimum", "exclusiveMinimum"} & number.keys() for number in numbers(field))
    ]
    assert unbounded == ["Dimension.range", "ModelConfig.hu_window"]


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().train.epochs = 3  # type: ignore[misc]


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_recipe(tmp_path / "empty.yaml") == load_recipe() == Recipe()


def test_a_recipe_survives_json() -> None:
    recipe = load_recipe(
        None, ["train.epochs=3", "tune.space.model.width={choice: [4, 8]}", "train.max_minutes=2.5"]
    )
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_recipes_load_and_say_how_they_are_used(file: Path) -> None:
    recipe = load_recipe(file)
    assert all(side % recipe.model.total_stride == 0 for side in recipe.data.patch.shape_zyx)
    head = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert all(word in head for word in ("--recipe jobs/recipes/" + file.name, "Runtime:", "Expected Dice:"))


def test_there_are_recipes_for_lidc_for_crops_and_for_a_quick_check() -> None:
    assert {"lidc.yaml", "lidc-crops.yaml", "smoke.yaml"} <= {file.name for file in RECIPES}


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("train.epochs=3", "train", "epochs", 3),
        ("optimizer.learning_rate=1e-3", "optimizer", "learning_rate", 0.001),
        ("optimizer.learning_rate=2.5E-4", "optimizer", "learning_rate", 0.00025),
        ("train.max_minutes=null", "train", "max_minutes", None),
        ("train.max_minutes=7", "train", "max_minutes", 7.0),
        ("loss.name=focal", "loss", "name", "focal"),
        ("augment.flips=false", "augment", "flips", False),
        ("segment.window_zyx=[32, 64, 64]", "segment", "window_zyx", (32, 64, 64)),
        ("tune.space.model.width={range: [4, 8]}", "tune", "space", {"model.width": Dimension(range=(4, 8))}),
        # YAML 1.1 would make 8, 90 and False of these
        ("train.epochs=010", "train", "epochs", 10),
        ("train.init_from=1:30", "train", "init_from", "1:30"),
        ("train.init_from=off", "train", "init_from", "off"),
        ("train.epochs=0x10", "train", "epochs", 16),
    ],
)
def test_an_override_is_a_yaml_value(override: str, section: str, field: str, value: object) -> None:
    changed = load_recipe(None, [override])
    assert getattr(getattr(changed, section), field) == value
    assert changed.model_copy(update={section: getattr(Recipe(), section)}) == Recipe()


def test_overrides_reach_into_nested_sections_and_the_last_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: {lidc: {min_readers: 2}, split: {val: 0.3}}\n")
    recipe = load_recipe(file, ["data.lidc.min_readers=4", "data.lidc.min_readers=1"])
    assert (recipe.data.lidc.min_readers, recipe.data.split.val) == (1, 0.3)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.epochz=3", "did you mean train.epochs?"),
        ("learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("model.epochs=3", "did you mean train.epochs?"),
        ("data.lidc.min_reader=3", "did you mean data.lidc.min_readers?"),
        ("optimiser=1", "did you mean optimizer?"),
        ("TRAIN.epochs=3", "did you mean train.epochs?"),
        ("data.LIDC.Min_Readers=3", "did you mean data.lidc.min_readers?"),
        ("optimiser.momentum=0.9", "did you mean optimizer.momentum?"),
        ("1=3", "see `lungseg settings`"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(override: str, remedy: str) -> None:
    error = refused(override)
    assert (error.code, error.remedy) == ("field-unknown", remedy)
    assert error.where["field"] == override.partition("=")[0]


@settings(deadline=None, max_examples=30)
@given(st.from_regex(r"[a-z_.]{1,30}", fullmatch=True))
def test_whatever_name_is_given_the_answer_is_a_name_that_exists(name: str) -> None:
    if name not in field_names():
        error = refused(f"{name}=[[]]")
        assert error.code == "field-unknown"
        named = error.remedy.removeprefix("did you mean ").removesuffix("?").split(" or ")
        assert set(named) <= {*field_names(), "see `lungseg settings`"}


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=2.5", "train.epochs"),
        ("train.epochs=yes", "train.epochs"),
        ("train.epochs=true", "train.epochs"),
        ("train.max_minutes=off", "train.max_minutes"),
        ("tune.space.model.width={range: [true, 8]}", "tune.space.model.width.range"),
        ("train.init_from=010", "train.init_from"),
        ("train.seed=-1", "train.seed"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("model.hu_window=[.nan, 400]", "model.hu_window.0"),
        ("data.spacing_mm=[0.001, 0.001, 0.001]", "data.spacing_mm.0"),
        ("data.spacing_mm=[1, 700, 1]", "data.spacing_mm.1"),
        ("data.patch.shape_zyx=[0, 16, 16]", "data.patch.shape_zyx.0"),
        ("data.patch.shape_zyx=[16, 16]", "data.patch.shape_zyx.2"),
        ("loss.name=dicee", "loss.name"),
        ("tune.space={}", "tune.space"),
        ("tune.space.model.width={log: [0, 8]}", "tune.space.model.width.log.0"),
        ("train=5", "train"),
        # what no field alone can tell
        ("data.split.val=0.9", "data.split"),
        ("model.hu_window=[400, -1000]", "model"),
        ("tune.space.model.width={range: [8, 4]}", "tune.space.model.width"),
        ("train.workers=3", "train"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(override: str, field: str) -> None:
    error = refused(override)
    assert (error.code, error.where["field"]) == ("field-invalid", field)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.epochs=0", "see `lungseg settings train.epochs`"),
        ("data.spacing_mm=[1, 1, x]", "see `lungseg settings data.spacing_mm`"),
        ("data.pairs.label=-1", "see `lungseg settings data.pairs.label`"),
        ("train.init_from=010", "put it in quotes, or see `lungseg settings train.init_from`"),
    ],
)
def test_a_refused_value_is_answered_with_the_command_that_explains_it(override: str, remedy: str) -> None:
    assert refused(override).remedy == remedy


def test_the_global_batch_is_a_multiple_of_all_replicas() -> None:
    load_recipe(None, ["train.workers=2", "train.gpus_per_worker=4", "train.global_batch=8"])
    error = refused("train.workers=2", "train.gpus_per_worker=4", "train.global_batch=12")
    assert error.message == "global_batch 12 must be a multiple of 8 replicas"


@pytest.mark.parametrize("other", ["train.workers=2", "train.gpus_per_worker=1"])
def test_a_divided_cpu_is_for_one_worker_without_gpus(other: str) -> None:
    """Between workers, and beside GPUs, TensorFlow would leave the other parts of it idle."""
    assert "logical_cpu_devices" in refused("train.logical_cpu_devices=2", other).message


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train.epochs={", "train.epochs.x=3 : :"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    assert refused(override).code == "override-syntax"


def test_a_value_is_no_section(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("train: {epochs: 3}\n")
    with pytest.raises(ConfigError, match=r"epochs is a value, not a section"):
        load_recipe(file, ["train.epochs.x=3"])


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"train: {epochs: 3", "recipe-syntax"),
        (b"- train\n", "recipe-syntax"),
        (b"\xff\xfe\x00", "recipe-missing"),
        (b"train: {epochs: 3}\ntrain: {workers: 2}", "recipe-syntax"),
        (b"train: {epochs: !!python/object/apply:os.getcwd []}", "recipe-syntax"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, code: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    assert caught.value.code == code
    assert caught.value.where["recipe"] == file
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe-missing"):
        load_recipe(tmp_path / "none.yaml")


def test_of_a_trained_network_only_segment_can_be_set_anew() -> None:
    recipe = load_recipe(None, ["model.depth=3", "segment.overlap=0.5"])
    changed = resegmented(recipe, ["segment.threshold=0.3", "segment.mirror=true"])
    assert (changed.segment.threshold, changed.segment.mirror, changed.segment.overlap) == (0.3, True, 0.5)
    assert changed.model == recipe.model
    for other in ("model.depth=4", "segment", "segments.threshold=0.3", "data.spacing_mm=[1, 1, 1]"):
        with pytest.raises(ConfigError, match="setting-fixed"):
            resegmented(recipe, [other])
    with pytest.raises(ConfigError, match=r"field-invalid.*segment\.threshold"):
        resegmented(recipe, ["segment.threshold=2"])
    with pytest.raises(ConfigError, match="field-unknown"):
        resegmented(recipe, ["segment.treshold=0.3"])


@pytest.mark.parametrize(("side", "batches"), [(32, 8), (64, 8), (96, 2), (128, 1), (256, 1)])
def test_one_get_fetches_12_mib_and_at_most_eight_record_batches(side: int, batches: int) -> None:
    assert ShardConfig().batches_of_get(3 * side**3) == batches
    assert ShardConfig(batches_per_get=5).batches_of_get(3 * side**3) == 5
