"""Settings chosen on val, recorded with the run, and used from then on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.scored import hold_out, labelled, network, said
from scipy import ndimage

from lungseg import cli
from lungseg.config import SegmentConfig
from lungseg.config.fields import CandidateScore
from lungseg.dataset.case import LabelledScan
from lungseg.dataset.cutting import to_grid
from lungseg.errors import LungsegError, RunError
from lungseg.evaluate.bootstrap import ratio, resample
from lungseg.evaluate.case import evaluate_case
from lungseg.evaluate.choosing import Choices, Option, pick
from lungseg.evaluate.fit_post import fit_post, masked
from lungseg.evaluate.marks import candidate_hits
from lungseg.evaluate.scans import Member
from lungseg.runs.ensemble import Ensemble, load_ensemble
from lungseg.runs.post import Post, recorded_post
from lungseg.runs.run import Published
from lungseg.segment.candidates import find_candidates
from lungseg.storage import Store, keys, open_store
from lungseg.telemetry import log

MM = (1.0, 1.0, 1.0)
SHAPE = (16, 24, 48)
OWN = SegmentConfig()


def cube(x: int, side: int = 6) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[5 : 5 + side, 8 : 8 + side, x : x + side] = True
    return mask


def scan(nodule: float, speck: float = 0.0, large: float = 0.0) -> LabelledScan:
    """A nodule of this probability; beside it a speck of 27 mm3 and a false positive as large as it."""
    probability = nodule * cube(6) + speck * cube(20, 3) + large * cube(36)
    return labelled(cube(6) * 1, MM, probability, [7.0])


def refuse(case_id: str, error: LungsegError) -> None:
    raise error


def fitted(
    store: Store, scans: Sequence[LabelledScan], predict: Any = network, fixed: Sequence[str] = ()
) -> Post:
    manifest, model = hold_out(store, scans, MM, splits=["val"] * len(scans))
    post, key = fit_post(store, Ensemble((model,)), [Member(model, manifest, predict)], "cpm", fixed, refuse)
    assert key == keys.post("runs/r", model.checkpoint)
    assert recorded_post(store, "runs/r", model.checkpoint, ["r"]) == post
    return post


def option(name: str, values: Sequence[float], complexity: float, allowed: bool = True) -> Option:
    return Option({"name": name}, (complexity,), ratio(values, np.ones(len(values))), allowed)


def test_the_simplest_within_one_standard_error_of_the_best_is_picked() -> None:
    """The best has a mean of 0.5 and a standard deviation of 0.5, so the error of 100 scans is 0.05."""
    weights = resample(list(range(100)))
    best = option("best", [1.0, 0.0] * 50, 3)
    near = option("near", [0.46] * 100, 2)
    simple = option("simple", [0.44] * 100, 1)
    assert pick([best, near, simple], weights).chosen.settings["name"] == "near"
    found = pick([simple, near, best], weights)
    assert (found.value, found.best) == (pytest.approx(0.46), 0.5)
    assert found.standard_error == pytest.approx(0.05, rel=0.1)
    assert [row["value"] for row in found.rows] == pytest.approx([0.44, 0.46, 0.5])
    equally_simple = option("better", [0.47] * 100, 2)
    assert pick([best, near, equally_simple], weights).chosen.settings["name"] == "better"
    forbidden = replace(best, allowed=False)
    assert pick([forbidden, near, simple], weights).best == pytest.approx(0.46)
    nothing = replace(simple, statistic=lambda draws: np.full(len(draws), np.nan))
    assert pick([nothing, near], weights).chosen.settings["name"] == "near"


def test_what_changes_nothing_is_left_as_it_is(tmp_path: Path) -> None:
    post = fitted(open_store(tmp_path), [scan(0.9), scan(0.9)])
    assert post.settings == {
        "mirror": False, "min_volume_mm3": 14.0, "candidate_score": OWN.candidate_score, "threshold": 0.5,
        "min_score": OWN.min_score,
    }  # fmt: skip
    assert (post.ranking["value"], post.masks["value"], post.patients) == (1, 1, 2)
    assert len(post.ranking["tried"]) == 2 * 4 * 4


def test_the_threshold_finds_the_nodules_with_one_false_positive_a_scan(tmp_path: Path) -> None:
    """Nodules of 0.35 are missed at 0.5. At 0.1 there are two false positives a scan."""
    post = fitted(open_store(tmp_path), [scan(0.35, large=0.25, speck=0.15)] * 3)
    assert post.settings["threshold"] == 0.3
    rows = {row["threshold"]: row for row in post.masks["tried"] if row["min_score"] == 0}
    assert [rows[at]["false_positives_per_scan"] for at in (0.1, 0.2, 0.3)] == [2, 1, 0]
    assert [rows[at]["allowed"] for at in (0.1, 0.2)] == [False, True]
    assert rows[0.2]["value"] == pytest.approx(5 / (5 + 1))
    assert rows[0.5]["value"] == 0


def test_the_lowest_score_leaves_out_what_is_bright_and_unsure_and_the_threshold_stays(
    tmp_path: Path,
) -> None:
    """Two false positives a scan, brighter than the nodule, each in the middle of a wide rim of 0.2."""
    probability = np.maximum(0.8 * cube(6), 0.9 * (cube(20, 3) | cube(36, 3)))
    rims = ndimage.binary_dilation(probability == 0.9, iterations=3)
    doubtful = labelled(cube(6) * 1, MM, np.maximum(probability, 0.2 * rims), [7.0])
    post = fitted(open_store(tmp_path), [doubtful] * 3, fixed=["mirror", "min_volume_mm3"])
    assert (post.settings["threshold"], post.settings["candidate_score"]) == (0.5, "mean")
    assert 0.2 < post.settings["min_score"] <= 0.8
    assert post.masks["value"] == 1
    rows = {row["min_score"]: row for row in post.masks["tried"] if row["threshold"] == 0.5}
    assert (rows[0.0]["false_positives_per_scan"], rows[0.0]["allowed"]) == (2, False)


def test_a_size_that_leaves_specks_out_is_chosen_where_they_outrank_nodules(tmp_path: Path) -> None:
    post = fitted(open_store(tmp_path), [scan(0.8, speck=0.9)] * 3, fixed=["mirror", "candidate_score"])
    assert post.settings["min_volume_mm3"] in (30.0, 60.0)
    assert {row["candidate_score"] for row in post.ranking["tried"]} == {OWN.candidate_score}
    assert post.ranking["value"] == 1


def test_the_score_is_chosen_that_ranks_nodules_first(tmp_path: Path) -> None:
    post = fitted(open_store(tmp_path), [scan(0.8, speck=0.9)] * 3, fixed=["mirror", "min_volume_mm3"])
    assert post.settings["candidate_score"] == "volume_weighted"
    assert post.ranking["value"] == 1


def test_mirror_images_are_asked_and_taken_only_where_they_help(tmp_path: Path) -> None:
    """A network that always marks one corner of what it sees: mirrored, that is an eighth of it each."""

    def marks_a_corner(windows: np.ndarray) -> np.ndarray:
        probability = network(windows)
        probability[:, 1:6, 1:6, 1:6] = 0.95
        return probability

    post = fitted(open_store(tmp_path), [scan(0.8)] * 3, marks_a_corner)
    assert post.settings["mirror"] is True
    assert post.ranking["value"] == 1


def test_the_figures_are_those_of_evaluate() -> None:
    random = np.random.default_rng(1)
    rough = ndimage.gaussian_filter(random.random((16, 36, 40)), 1.5)
    probability = np.clip((rough - rough.mean()) / rough.std() / 4 + 0.3, 0, 1)
    places, count = ndimage.label(ndimage.binary_dilation(probability > 0.8))
    numbers = np.where(places == 1, -1, np.maximum(places - 1, 0))  # the first is to be ignored
    found = labelled(numbers, MM, probability)
    stored = to_grid(found, MM)
    prediction = said(probability, stored)
    kinds: tuple[CandidateScore, ...] = "p95", "mean"
    for threshold, volume_mm3, kind, score in ((0.6, 30.0, "p95", 0.0), (0.7, 5.0, "mean", 0.4)):
        config = SegmentConfig(
            threshold=threshold, min_volume_mm3=volume_mm3, candidate_score=kind, min_score=score
        )
        result = evaluate_case(stored, prediction, config)
        candidates = find_candidates(prediction.float32, prediction.geometry, config, prediction.lungs)
        choices = Choices((False,), (volume_mm3,), kinds, (threshold,), (0.0, score))
        both = masked(stored, prediction, SegmentConfig(), threshold, {volume_mm3: candidates}, choices)
        assert both[volume_mm3, kind, score] == (result.detected, result.false_positives)
        assert (both[volume_mm3, kind, 0.0] != both[volume_mm3, kind, score]) == (score > 0)
        for kind, found in candidate_hits(stored, candidates[1]).items():
            wanted = result.detection.luna16[kind]
            np.testing.assert_array_equal(found.nodule_scores, wanted.nodule_scores)
            np.testing.assert_array_equal(found.false_positive_scores, wanted.false_positive_scores)
    assert count > 3
    assert result.false_positives > 0


def test_settings_that_are_given_are_not_tried() -> None:
    own = SegmentConfig(threshold=0.45, mirror=True)
    found = Choices.of(own, ["mirror", "candidate_score"])
    assert found.mirror == (True,)
    assert found.candidate_score == (own.candidate_score,)
    assert 0.45 in found.threshold
    assert 14.0 in found.min_volume_mm3


Ended = tuple[int, str, str]


@pytest.fixture
def verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--store", "store"])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def keep_all(store: Store, model: Published, splits: Sequence[str]) -> None:
    """What the network says, so that it need not be loaded."""
    from lungseg.evaluate.scans import held_out
    from lungseg.runs.run import load_run_data

    for split in splits:
        for one in held_out(store, [Member(model, load_run_data(store, model.run), network)], split):
            one.look()


def test_evaluate_uses_what_was_chosen_on_val_and_says_so(tmp_path: Path, verb: Callable[..., Ended]) -> None:
    store = open_store(tmp_path / "store")
    hold_out(store, [scan(0.35)] * 4, MM, splits=["val", "val", "test", "test"])
    (model,) = load_ensemble(store, ["r"]).members
    keep_all(store, model, ["val", "test"])
    test_scan = next(item.key for item in store.find(keys.held_out("d", "test", "")[: -len(".arrow")]))
    whole = store.get(test_scan)
    store.put(test_scan, b"no Arrow")  # nobody may look at it
    code, out, _ = verb("fit-post", "--run", "r", "--set", "segment.mirror=false")
    assert code == 0, out
    assert "segment.threshold=0.3" in out.splitlines()
    assert "r on val: 2 scans of 2 patients" in out
    assert "Of so few patients" in out
    store.put(test_scan, whole)
    evaluate = ("evaluate", "--run", "r", "--out", "out")
    code, out, _ = verb(*evaluate)
    assert code == 0
    assert "Settings that fit-post chose on val" in out
    (report,) = (tmp_path / "out").glob("*.json")
    tree = json.loads(report.read_text())
    assert (tree["settings"]["threshold"], tree["summary"]["dice"]) == (0.3, 1)
    assert "fit-post" in report.with_suffix(".html").read_text()
    report.unlink()
    assert "which they therefore flatter" in " ".join(verb(*evaluate, "--split", "val")[1].split())
    for flags, threshold in ((["--no-post"], 0.5), (["--set", "segment.threshold=0.4"], 0.4)):
        for old in (tmp_path / "out").glob("*.json"):
            old.unlink()
        code, out, _ = verb(*evaluate, *flags)
        (report,) = (tmp_path / "out").glob("*.json")
        assert json.loads(report.read_text())["settings"]["threshold"] == threshold
        assert ("fit-post chose" in out) == (threshold == 0.4)


def test_what_was_chosen_for_another_checkpoint_is_not_used_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log("post")
    monkeypatch.setattr(logging.getLogger("lungseg"), "propagate", True)
    store = open_store(tmp_path)
    post = fitted(store, [scan(0.35)] * 2)
    assert load_ensemble(store, ["r"]).segment.threshold == 0.3
    assert load_ensemble(store, ["r"], use_post=False).segment.threshold == 0.5
    key = keys.post("runs/r", post.checkpoint)
    store.put_json(key, {**store.get_json(key), "format": 99})
    with pytest.raises(RunError, match="post-format"):
        load_ensemble(store, ["r"])
    assert load_ensemble(store, ["r"], use_post=False).post is None
    assert recorded_post(store, "runs/r", "another", ["r"]) is None
    assert "another checkpoint's. run `lungseg fit-post --run r` again" in caplog.text


def test_val_without_nodules_and_wrong_calls_are_refused_and_nothing_is_written(
    tmp_path: Path, verb: Callable[..., Ended]
) -> None:
    store = open_store(tmp_path / "store")
    nothing = labelled(np.zeros(SHAPE, int), MM, 0.3 * cube(6))
    hold_out(store, [nothing, scan(0.5)], MM, splits=["val", "test"])
    (model,) = load_ensemble(store, ["r"]).members
    keep_all(store, model, ["val"])
    fixed = ("--set", "segment.mirror=false")
    for flags, told in (
        (["--run", "r", *fixed], "no-nodules"),
        (["--run", "none"], "run-missing"),
        (["--run", "r", "--set", "train.epochs=2"], "setting-fixed"),
        (["--run", "r", "--by", "auc"], "Invalid value"),
        ([], "runs-needed"),
    ):
        code, out, err = verb("fit-post", *flags)
        assert (code, out) == (2, ""), told
        assert told in err.splitlines()[-1]
    assert not [item for item in store.find() if "/post/" in item.key]


def test_folds_are_not_tested_with_settings_that_were_chosen_on_the_same_scans(
    tmp_path: Path, verb: Callable[..., Ended]
) -> None:
    """The val of one fold is the test of another."""
    store = open_store(tmp_path / "store")
    scans = [scan(0.35), scan(0.35)]
    for fold, splits in enumerate((("test", "val"), ("val", "test"))):
        _, model = hold_out(store, scans, MM, splits=splits, run=f"cv{fold}", data=f"d{fold}")
        keep_all(store, model, ["val", "test"])
    flags = ("--run", "cv0", "--run", "cv1")
    assert verb("fit-post", *flags, "--set", "segment.mirror=false")[0] == 0
    assert [item.key for item in store.find("ensembles/cv0+cv1/post/")]
    code, _, err = verb("evaluate", *flags, "--out", "out")
    assert code == 2
    assert "post-saw-test: fit-post chose its settings on 2 of the 2 scans" in err
    code, out, _ = verb("evaluate", *flags, "--out", "out", "--no-post")
    assert code == 0
    assert "2 scans, 2 patients" in out
    assert load_ensemble(store, ["cv1", "cv0"]).segment.threshold == 0.3
    assert load_ensemble(store, ["cv0"]).segment.threshold == 0.5
