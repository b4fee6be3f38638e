"""Several runs as one model: on the same held-out scans, on other grids, and as folds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.scored import hold_out, labelled, network, publish

from lungseg import cli
from lungseg.config import Recipe
from lungseg.dataset.case import LabelledScan
from lungseg.errors import ConfigError, DataError
from lungseg.evaluate.kept import Prediction, mean_prediction
from lungseg.evaluate.protocol import evaluate_split
from lungseg.evaluate.scans import Member, held_out
from lungseg.runs.ensemble import Ensemble, ensemble_name, load_ensemble
from lungseg.segment.predict import segment, segment_by_mean
from lungseg.storage import Store, open_store

MM = (1.0, 1.0, 1.0)
SHAPE = (16, 24, 40)


def cube(x: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[5:11, 8:14, x : x + 6] = True
    return mask


def scan(probability: float = 0.8, x: int = 6) -> LabelledScan:
    return labelled(cube(x) * 1, MM, probability * cube(x), [7.0])


def times(share: float) -> Any:
    return lambda windows: share * network(windows)


def evaluated(store: Store, members: list[Member], out: Path) -> dict[str, Any]:
    def refuse(case_id: str, error: Exception) -> None:
        raise error

    found = evaluate_split(store, members, "test", out, lambda *_: None, refuse)
    tree: dict[str, Any] = json.loads(found.json.read_text())
    return tree


def test_the_mean_of_two_is_scored_and_each_networks_answers_are_kept_by_its_own_run(tmp_path: Path) -> None:
    """0.8 and 0.3 of it are 0.52 in the mean, still above the threshold; 0.8 and 0.1 of it are not."""
    store = open_store(tmp_path / "store")
    manifest, model = hold_out(store, [scan(), scan()], MM)
    low = publish(store, "low", manifest, model.recipe)
    both = [Member(low, manifest, times(0.3)), Member(model, manifest, network)]
    tree = evaluated(store, both, tmp_path / "out")
    assert tree["summary"]["dice"] == 1
    assert tree["nodules"][0]["luna16_score"] == pytest.approx(0.8 * 1.3 / 2, abs=0.001)
    assert (tree["run"], tree["networks_a_scan"]) == ("low+r", [2, 2])
    assert tree["members"] == [{"run": one.run, "checkpoint": one.checkpoint} for one in (low, model)]
    kept = [item.key for item in store.find() if "probabilities" in item.key]
    assert [key.split("/")[1] for key in sorted(kept)] == ["low", "low", "r", "r"]
    assert [item.key for item in store.find("ensembles/low+r/evaluations/") if item.key.endswith(".json")]
    text = next((tmp_path / "out").glob("*.txt")).read_text()
    assert "The mean of 2 networks: low" in text
    quiet = publish(store, "quiet", manifest, model.recipe)
    both[0] = Member(quiet, manifest, times(0.1))
    assert evaluated(store, both, tmp_path / "out")["summary"]["dice"] == 0


def test_of_folds_every_scan_is_scored_by_the_network_that_never_saw_it(tmp_path: Path) -> None:
    store, scans = open_store(tmp_path / "store"), [scan(), scan(), scan()]
    folds = [
        hold_out(store, scans, MM, splits=splits, run=f"cv{fold}", data=f"d{fold}")
        for fold, splits in enumerate((("test", "val", "train"), ("train", "test", "test")))
    ]
    members = [
        Member(model, manifest, predict)
        for (manifest, model), predict in zip(folds, (network, times(0.3)), strict=True)
    ]
    tree = evaluated(store, members, tmp_path / "out")
    assert [case["case_id"] for case in tree["cases"]] == ["c0", "c1", "c2"]
    assert [case["dice"] for case in tree["cases"]] == [1, 0, 0]
    assert tree["networks_a_scan"] == [1, 1]
    assert tree["data"] == "d0+d1"
    assert "by the 1 that never saw it" in " ".join(
        next((tmp_path / "out").glob("*.txt")).read_text().split()
    )
    other = replace(members[0].manifest, cases={"test": ("c0",)})
    with pytest.raises(DataError, match="splits-differ"):
        held_out(store, [members[0], replace(members[1], manifest=other)], "test")


def test_networks_of_other_grids_are_averaged_on_the_finest_as_predict_does(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    coarse_mm = (2.0, 1.5, 1.5)
    folds = [
        hold_out(store, [scan()], spacing_mm, run=run, data=f"d{run}")
        for run, spacing_mm in (("coarse", coarse_mm), ("fine", MM))
    ]
    members = [Member(model, manifest, network) for manifest, model in folds]
    (held,) = held_out(store, members, "test")
    stored, prediction = held.look()
    assert stored.volume.geometry.spacing_mm == MM
    found = segment_by_mean([(network, model.recipe) for _, model in folds], scan().volume)
    assert found.working == stored.volume.geometry
    box = prediction.box_in(found.working)
    np.testing.assert_allclose(prediction.probability, found.probability[box], atol=2e-3)
    assert found.probability.sum() == pytest.approx(found.probability[box].sum())
    alone = segment(network, scan().volume, folds[1][1].recipe).probability
    assert 0.01 < np.abs(found.probability - alone).max() < 0.5  # the coarse one blurs edges
    assert np.count_nonzero((found.labels > 0) & cube(6)) > 0.8 * cube(6).sum()


def test_parts_of_one_grid_are_averaged_where_they_lie() -> None:
    whole = scan().volume.geometry
    left, right = (slice(0, 8), slice(0, 24), slice(0, 20)), (slice(4, 16), slice(2, 24), slice(10, 40))
    ones = [np.ones([side.stop - side.start for side in box], np.float16) for box in (left, right)]
    parts = [Prediction(whole.part(box), array, None) for box, array in zip((left, right), ones, strict=True)]
    found = mean_prediction(parts, whole)
    wanted = np.zeros(SHAPE)
    wanted[left] += 0.5
    wanted[right] += 0.5
    np.testing.assert_array_equal(found.probability, wanted[found.box_in(whole)])
    assert mean_prediction(parts[:1], whole) is parts[0]


def test_members_must_agree_on_what_is_made_of_the_mean(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    manifest, model = hold_out(store, [scan()], MM)
    tree = model.recipe.model_dump(mode="json")
    tree["segment"] |= {"threshold": 0.3, "overlap": 0.5}
    publish(store, "other", manifest, Recipe.model_validate(tree))
    with pytest.raises(ConfigError, match="members-differ") as caught:
        load_ensemble(store, ["r", "other"])
    assert "--set segment.threshold=" in caught.value.remedy
    said = load_ensemble(store, ["r", "other"], ["segment.threshold=0.4"])
    assert [one.run for one in said.members] == ["other", "r"]
    assert [one.recipe.segment.overlap for one in said.members] == [0.5, 0.25]
    assert said.checkpoint == "+".join(one.checkpoint for one in said.members)
    assert (Ensemble((model,)).checkpoint, Ensemble((model,)).root) == (model.checkpoint, "runs/r")
    with pytest.raises(ConfigError, match="runs-repeated"):
        load_ensemble(store, ["r", "r"])
    assert len(ensemble_name([f"a-long-name-of-a-run-{number}" for number in range(20)])) < 200


def test_the_verbs_take_several_runs_or_a_file_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = open_store(tmp_path / "store")
    manifest, model = hold_out(store, [scan(), scan()], MM)
    members = [Member(model, manifest, network)]
    for name in ("a", "b"):
        members.append(Member(publish(store, name, manifest, model.recipe), manifest, network))
    for one in members:
        evaluated(store, [one], tmp_path / "out")  # so that no network need be loaded
    (tmp_path / "runs.txt").write_text("b\n\na\n")
    call = ["evaluate", "--store", store.uri, "--out", str(tmp_path / "verb")]
    said = []
    for flags in (["--run", "a", "--run", "b"], ["--runs", str(tmp_path / "runs.txt")]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*call, *flags])
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
        assert "Evaluation of run a+b" in said[-1]
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "--store", store.uri, "--run", "r", "--run", "b+a"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("r against a+b: 2 scans")
