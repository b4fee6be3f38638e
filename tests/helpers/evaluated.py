"""Four scans of known truth and known answers, and what `evaluate` says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.scored import hold_out, labelled, network

from lungseg.config import resegmented
from lungseg.dataset.case import LabelledScan, Outlines
from lungseg.dataset.manifest import Manifest
from lungseg.evaluate.protocol import Evaluation, evaluate_split
from lungseg.evaluate.scans import Member
from lungseg.runs.run import Published
from lungseg.storage import Store, open_store

MM = (1.0, 1.0, 1.0)
SHAPE = (24, 40, 80)
SIDE = 6


def cube(x: int, side: int = SIDE, shift: int = 0) -> np.ndarray:
    """bool, a cube at column `x`, moved along y."""
    mask = np.zeros(SHAPE, bool)
    mask[8 : 8 + side, 10 + shift : 10 + shift + side, x : x + side] = True
    return mask


def scans() -> list[LabelledScan]:
    """Three patients; the first has two scans. Diameters of readers are 7 mm for cubes of 6 mm.

    c0: two nodules that touch, both found as they are, as one component of probability 0.9.
    c1: one nodule, found two voxels off; beside it something ignored, which is marked too.
    c2: one nodule, missed; and a false positive of probability 0.7.
    c3: neither nodule nor mark.
    """
    touching = cube(10) * 1 + cube(16) * 2
    outlines = {1: Outlines((8, 10, 10), np.ones((2, SIDE, SIDE, SIDE), bool))}
    ignored = cube(50, 4)
    return [
        labelled(touching, MM, 0.9 * (touching > 0), [7.0, 7.0], outlines),
        labelled(cube(10) * 1 - ignored * 1, MM, np.maximum(0.8 * cube(10, shift=2), 0.6 * ignored), [7.0]),
        labelled(cube(10) * 1, MM, 0.7 * cube(50), [7.0]),
        labelled(np.zeros(SHAPE, int), MM),
    ]


@dataclass
class Evaluated:
    store: Store
    manifest: Manifest
    model: Published
    out: Path
    result: Evaluation
    refused: list[tuple[str, str]]

    @property
    def tree(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.result.json.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
        )
        return found


def evaluate(folder: Path, found: Sequence[LabelledScan], predict: Any = network) -> Evaluated:
    store = open_store(folder / "store")
    manifest, model = hold_out(store, found, MM, patients=[0, 0, 1, 2])
    return again(Evaluated(store, manifest, model, folder / "out", None, []), predict)  # type: ignore[arg-type]


def again(one: Evaluated, predict: Any, **settings: Any) -> Evaluated:
    overrides = [f"segment.{name}={value}" for name, value in settings.items()]
    model = replace(one.model, recipe=resegmented(one.model.recipe, overrides))
    refused: list[tuple[str, str]] = []
    result = evaluate_split(
        one.store, [Member(model, one.manifest, predict)], "test", one.out, lambda done, total: None,
        lambda case_id, error: refused.append((case_id, error.code)),
    )  # fmt: skip
    return replace(one, result=result, refused=refused)


def must_not_be_asked(windows: np.ndarray) -> np.ndarray:
    raise AssertionError("the network was asked")
