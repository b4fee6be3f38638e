"""Whether a recipe and a data set can train together, and what the recipe then is."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from lungseg.config import DataConfig, Recipe
from lungseg.dataset.manifest import Manifest
from lungseg.errors import ConfigError, DataError
from lungseg.stream.order import steps_per_pass

_NOT_OF_TRUTH = ("spacing_mm", "split", "patch", "shard")


def on_data(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with the settings that the data set was prepared with, which a network is bound to.

    Raises ConfigError("data-differs") where the recipe itself says otherwise: training would ignore it, and
    prediction would then work at a spacing that the network has never seen.
    """
    prepared = DataConfig.model_validate(manifest.config)
    for field, wanted, actual in _contradictions(recipe.data, prepared, "data"):
        remedy = "leave it out of the recipe, or prepare a data set with it under another name"
        message = f"{field} is {wanted} in the recipe, {actual} in the data set"
        raise ConfigError("data-differs", data=manifest.name, message=message, remedy=remedy)
    return recipe.model_copy(update={"data": prepared})


def _contradictions(
    wanted: BaseModel, actual: BaseModel, prefix: str
) -> Iterator[tuple[str, object, object]]:
    """Fields that were given to `wanted`, not its defaults, and have another value in `actual`."""
    for name in sorted(wanted.model_fields_set):
        field, one, other = f"{prefix}.{name}", getattr(wanted, name), getattr(actual, name)
        if isinstance(one, BaseModel):
            yield from _contradictions(one, other, field)
        elif one != other and not type(wanted).model_fields[name].exclude:
            yield field, one, other


def check_fit(manifest: Manifest, recipe: Recipe, kind: str) -> None:
    """Raises DataError("too-few-patches", "no-nodules", "no-validation") or ConfigError("patch-shape") where
    a data set and a recipe cannot train together."""
    steps_per_pass(manifest.rows("train"), recipe.train.global_batch)
    if not any(manifest.positives("train")):
        remedy = "prepare scans whose masks hold nodules (see data.pairs.label), or another split"
        raise DataError("no-nodules", data=manifest.name, split="train", remedy=remedy)
    # Without a nodule silence scores 1: the first epoch that finds nothing would be the best for ever.
    if not any(manifest.positives("val")) and (kind == "tune" or recipe.train.publish == "best"):
        found = "no nodule among its patches" if manifest.rows("val") else "no patches"
        remedy = "prepare data of more patients, with data.split.val above 0 or another data.split.seed"
        remedy += "" if kind == "tune" else ", or publish the last epoch with train.publish=last"
        raise DataError("no-validation", data=manifest.name, split="val", message=found, remedy=remedy)
    patch, stride = manifest.patch_shape_zyx, recipe.model.total_stride
    sides = recipe.augment.crop_zyx or patch
    if any(side % stride for side in (*sides, *patch)):
        message, remedy = f"no multiple of {stride} voxels", "lower model.depth, or prepare other patches"
    elif any(side > whole for side, whole in zip(sides, patch, strict=True)):
        message, remedy = f"patches have {patch}", "lower augment.crop_zyx"
    elif any(side < 3 * stride for side in (sides[0], patch[0])):
        # oneDNN 3.7 gives wrong gradients of bfloat16 convolutions over two slices, some of them NaN; and
        # one slice has no depth to convolve over.
        message, remedy = "fewer than 3 slices at the deepest level", "lower model.depth"
    elif recipe.augment.turns and sides[1] != sides[2]:
        message, remedy = "turns need square slices", "set augment.turns=false"
    else:
        return
    raise ConfigError("patch-shape", patch_shape_zyx=sides, message=message, remedy=remedy)


def require_same_splits(own: Manifest, other: Manifest) -> Manifest:
    """`other`, on which a network that was trained on `own` may be scored: nobody whom it has seen is tested.

    Raises DataError("splits-differ") unless both hold the same scans in the same splits, at one spacing.
    """
    if own.cases != other.cases or own.config.get("spacing_mm") != other.config.get("spacing_mm"):
        message = "other scans, other splits, or another data.spacing_mm"
        remedy = "prepare the same scans with the same settings of data, and a version that keeps their truth"
        raise DataError("splits-differ", a=own.name, b=other.name, message=message, remedy=remedy)
    return other


def require_same_scans(a: Manifest, b: Manifest) -> None:
    """Raises DataError("splits-differ") unless both data sets hold the same scans with the same truth,
    whatever the splits, the spacing and the patches: so do the folds of one cross-validation."""
    scans = [{case for cases in one.cases.values() for case in cases} for one in (a, b)]
    truths = [{k: v for k, v in one.config.items() if k not in _NOT_OF_TRUTH} for one in (a, b)]
    if scans[0] != scans[1] or truths[0] != truths[1]:
        remedy = "take runs on the same scans, prepared with the same settings but of splits and patches"
        raise DataError("splits-differ", a=a.name, b=b.name, message="other scans or labels", remedy=remedy)
