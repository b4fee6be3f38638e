"""Runs compared from what their evaluations left in the store, up to what the verb prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.scored import hold_out, labelled, network

from lungseg import cli
from lungseg.errors import DataError
from lungseg.evaluate.bootstrap import resample
from lungseg.evaluate.comparison import COMPARED, compare_evaluations
from lungseg.evaluate.protocol import evaluate_split
from lungseg.evaluate.scans import Member
from lungseg.evaluate.stored import newest_evaluation, require_same_scans
from lungseg.runs.run import load_run
from lungseg.storage import Store, keys, open_store

MM = (1.0, 1.0, 1.0)
SHAPE = (16, 16, 40)
NODULES, FALSE_POSITIVE_X = 12, 30


def cube(x: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[5:11, 5:11, x : x + 6] = True
    return mask


def misses_every_third(windows: np.ndarray) -> np.ndarray:
    """Scans tell their number by how sure they are: 0.70, 0.71 and so on."""
    probability = network(windows)
    number = round((float(probability.max()) - 0.7) * 100)
    return probability * (number % 3 > 0)


def marks_too_much(windows: np.ndarray) -> np.ndarray:
    probability = network(windows)
    here = cube(FALSE_POSITIVE_X)[None, ..., None]
    return np.maximum(probability, 0.99 * here) if probability.shape == here.shape else probability


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Runs on 12 scans of 6 patients: "good" is right, "r" misses a third, "loud" marks something else."""
    folder = tmp_path_factory.mktemp("compared")
    opened = open_store(folder / "store")
    scans = [labelled(cube(5) * 1, MM, (0.7 + number / 100) * cube(5), [7.0]) for number in range(NODULES)]
    manifest, model = hold_out(opened, scans, MM, patients=[number // 2 for number in range(NODULES)])
    for run, predict in (("good", network), ("r", misses_every_third), ("loud", marks_too_much)):
        opened.put(keys.run(keys.run_root(run)), opened.get(keys.run(keys.run_root("r"))))
        members = [Member(replace(model, run=run), manifest, predict)]
        evaluate_split(opened, members, "test", folder / run, lambda *_: None, refuse)
    return opened


def refuse(case_id: str, error: Exception) -> None:
    raise error


def test_what_differs_is_told_with_its_size(store: Store) -> None:
    found = compare_evaluations([newest_evaluation(store, run, "test") for run in ("r", "good", "loud")])
    pairs = {(one.figure, one.a, one.b): one for one in found.differences}
    assert len(pairs) == 3 * len(COMPARED)
    sensitivity = pairs["sensitivity", "r", "good"]
    assert sensitivity.difference.value == pytest.approx(1 / 3)
    assert sensitivity.difference.patients == 6
    assert pairs["cpm_luna16", "r", "good"].difference.value == pytest.approx(1 / 3)
    assert pairs["sensitivity", "good", "loud"].difference.value == 0
    assert pairs["sensitivity", "good", "loud"].p == 1
    false_positives = pairs["false_positives_per_scan", "good", "loud"].difference
    assert (false_positives.value, false_positives.low, false_positives.high) == (1, 1, 1)
    assert found.ranks["false_positives_per_scan"]["loud"] == [0, 0, 1]
    assert found.ranks["pq"]["good"][0] == 1


def test_the_figures_of_the_store_are_those_of_the_report(store: Store, tmp_path: Path) -> None:
    one = newest_evaluation(store, "r", "test")
    [key] = [
        item.key for item in store.find(keys.evaluations(keys.run_root("r"))) if item.key.endswith("Z.json")
    ]
    report = store.get_json(key)
    figures, weights = one.figures(), resample(one.patients)
    for name, value in report["intervals"]["figures"].items():
        again = figures[name](np.ones((1, NODULES), int))[0]
        assert (None if np.isnan(again) else again) == value["value"]
    assert np.quantile(figures["dice"](weights), 0.025) == report["intervals"]["figures"]["dice"]["low"]
    luna16 = report["detection"]["luna16"]["cpm"]["value"]
    assert figures["cpm_luna16"](np.ones((1, NODULES), int)) == pytest.approx(luna16)


def test_other_scans_are_refused_and_missing_evaluations_named(store: Store) -> None:
    one = newest_evaluation(store, "r", "test")
    for change in ({"manifest_sha256": "other"}, {"case_ids": one.case_ids[1:]}):
        with pytest.raises(DataError, match="evaluations-differ") as caught:
            require_same_scans([one, replace(one, run="b", **change)])
        assert "b=b" in str(caught.value)
    with pytest.raises(DataError, match="evaluation-missing"):
        newest_evaluation(store, "r", "val")
    load_run(store, "r")


def test_reports_of_the_version_before_are_read_and_others_refused(store: Store, tmp_path: Path) -> None:
    [key] = [
        item.key for item in store.find(keys.evaluations(keys.run_root("r"))) if item.key.endswith("Z.json")
    ]
    report, other = store.get_json(key), open_store(tmp_path)
    names = {"mask_axial_diameter_mm", "longest_axial_diameter_mm"}  # the latter is of `predict`'s surface
    assert names & report["nodules"][0].keys() == {"mask_axial_diameter_mm"}
    for name in ("members", "post", "networks_a_scan"):
        del report[name]
    other.put_json(key, {**report, "schema_version": 2})
    assert newest_evaluation(other, "r", "test").figures().keys() >= set(COMPARED)
    for version in (1, 99, None):
        other.put_json(key, {**report, "schema_version": version})
        with pytest.raises(DataError, match="evaluation-format") as caught:
            newest_evaluation(other, "r", "test")
        assert "lungseg evaluate --run r --split test" in caught.value.remedy


def test_the_verb_prints_and_writes_all_of_it(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--store", store.uri, "--run", "r", "--run", "good"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--run", "loud", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "r against good against loud: 12 scans of 6 patients, split test of data set d" in said
    assert "Of so few patients the intervals mean little." in said
    assert f"by Holm for all {3 * len(COMPARED)} tests" in said
    assert "In which share of the draws a run has each rank" in said
    assert (tmp_path / "out" / "comparison.txt").read_text() == said
    tree: dict[str, Any] = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [one["run"] for one in tree["evaluations"]] == ["r", "good", "loud"]
    assert tree["values"]["sensitivity"]["good"]["value"] == 1
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "share of the draws" not in capsys.readouterr().out
