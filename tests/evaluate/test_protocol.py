"""A split evaluated from end to end, with models of known quality: no network, no TensorFlow."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluated import MM, SHAPE, Evaluated, again, evaluate, must_not_be_asked, scans
from helpers.scored import hold_out, network

from lungseg import cli
from lungseg.errors import DataError, LungsegError
from lungseg.storage import keys, open_store


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return evaluate(tmp_path_factory.mktemp("known"), scans())


def test_a_model_of_known_quality_gets_the_figures_computed_by_hand(known: Evaluated) -> None:
    summary = known.tree["summary"]
    assert (summary["cases"], summary["nodules"], known.tree["patients"]) == (4, 4, 3)
    off = 4 / 6  # two of six rows are beside the truth, on either side
    # One component on two nodules is one's alone: it is twice as large, so its IoU is a half.
    assert summary["dice"] == pytest.approx((1 + off + 0 + 1) / 4)
    assert summary["dice_without_empty_scans"] == pytest.approx((1 + off + 0) / 3)
    assert summary["dice_misses_as_0"] == pytest.approx((2 / 3 + 0 + off + 0) / 4)
    assert summary["dice_errors_as_0"] == pytest.approx((2 / 3 + off) / 5)
    assert summary["per_nodule_dice"] == pytest.approx((2 / 3 + 2 / 3 + off + 0) / 4)
    assert (summary["sensitivity"], summary["false_positives_per_scan"]) == (0.75, 0.25)
    # Two pairs of IoU a half; two nodules missed and one false positive.
    assert summary["f1"] == pytest.approx(2 / (2 + 3 / 2))
    assert summary["sq"] == pytest.approx(0.5)
    assert summary["pq"] == pytest.approx(summary["f1"] / 2)
    assert summary["f1_at_iou_half"] == 0  # a half is not above a half
    assert summary["volume_error_share"] == pytest.approx((1.0 + 0.0) / 2)
    assert summary["reader_with_reader"] == summary["reader_with_others"] == 1
    assert summary["model_with_others"] == pytest.approx(2 / 3)
    assert summary["model_minus_reader"] == pytest.approx(-1 / 3)
    empty = known.tree["empty_against_empty"]
    assert (empty["scans"], empty["dice_as_1"]) == (1, summary["dice"])
    assert empty["dice_as_nan"] == summary["dice_without_empty_scans"]


def test_detection_is_counted_by_both_rules(known: Evaluated) -> None:
    """The mark on two nodules lies between them, 3 mm from both centres and so within 3.5 mm; the second is
    2 mm off; the third is on nothing; that on the ignored place does not count."""
    luna16, overlap = known.tree["detection"]["luna16"], known.tree["detection"]["overlap"]
    assert known.tree["detection"]["score"] == "p95"
    assert luna16["sensitivity"]["0.125"] == 0.75
    assert luna16["sensitivity_bounds"]["0.125"] == [0, 1]  # draws of one patient have none found, or all
    assert luna16["cpm"]["value"] == pytest.approx(0.75)
    assert overlap["sensitivity"]["8"] == 0.5  # one mark finds one nodule only
    assert luna16["threshold_at_1_false_positive"] == pytest.approx(0.7, abs=0.001)
    rows = {row["case_id"]: row for row in known.tree["nodules"] if row["nodule_id"] == "n1"}
    assert rows["c0"]["luna16_score"] == pytest.approx(0.9, abs=0.001)
    assert rows["c2"]["luna16_score"] is None


def test_strata_count_each_nodule_once_a_group(known: Evaluated) -> None:
    strata = known.tree["strata"]
    assert {title: one["nodules"] for title, one in strata["diameter"].items()} == {
        "< 3 mm": 0, "3-6 mm": 0, "6-8 mm": 4, "8-15 mm": 0, ">= 15 mm": 0,
    }  # fmt: skip
    assert strata["readers"]["4 readers"]["nodules"] == 4
    assert strata["diameter"]["6-8 mm"]["sensitivity"]["value"] == 0.75
    assert sum(one["nodules"] for one in strata["texture"].values()) == 0  # nobody rated it


def test_intervals_are_over_patients_and_say_that_there_are_few(known: Evaluated) -> None:
    intervals = known.tree["intervals"]
    assert (intervals["patients"], intervals["means_little"], intervals["replicates"]) == (3, True, 2000)
    dice = intervals["figures"]["dice"]
    assert dice["low"] == pytest.approx(0.0)  # the second patient thrice
    assert dice["high"] == pytest.approx(1.0)  # the third thrice


def test_every_form_of_the_report_lies_in_the_store_and_in_the_folder(known: Evaluated) -> None:
    stem = known.result.text.stem
    assert re.fullmatch(r"evaluation-\d{8}T\d{6}Z", stem)
    names = [f"{stem}.{ending}" for ending in ("html", "json", "txt")]
    names += [f"{stem}/{name}" for name in ("candidates.csv", "luna16.csv", "nodules.csv", "summary.json")]
    assert sorted(str(path.relative_to(known.out)) for path in known.out.rglob("*.*")) == sorted(names)
    prefix = keys.evaluation(keys.run_root("r"), f"{known.model.checkpoint}-test")
    assert known.result.key == prefix
    for name in names:
        assert known.store.get(f"{prefix}{name}") == (known.out / name).read_bytes()

    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO((known.out / stem / name).read_text())))

    assert [row["case_id"] for row in rows("nodules.csv")] == ["c0", "c0", "c1", "c2"]
    assert float(rows("nodules.csv")[2]["dice"]) == pytest.approx(4 / 6)
    kinds = sorted((row["case_id"], row["luna16"]) for row in rows("candidates.csv"))
    assert kinds == [("c0", "nodule"), ("c1", "excluded"), ("c1", "nodule"), ("c2", "false positive")]
    first = rows("luna16.csv")[0]
    assert list(first) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    place = [float(first[f"coord{axis}"]) for axis in "XYZ"]
    assert place == pytest.approx([-30 + 15.5, 12.5 + 12.5, -400 + 10.5])


def test_nnunets_summary_leaves_empty_scans_out(known: Evaluated) -> None:
    found = json.loads(next(known.out.rglob("summary.json")).read_text())
    assert set(found) == {"foreground_mean", "mean", "metric_per_case"}
    assert math.isnan(found["metric_per_case"][3]["metrics"]["1"]["Dice"])
    assert found["foreground_mean"]["Dice"] == pytest.approx((1 + 4 / 6 + 0) / 3)
    assert found["mean"]["1"]["TP"] == pytest.approx((2 * 216 + 144) / 4)
    counted = sum(found["metric_per_case"][1]["metrics"]["1"][name] for name in ("TP", "FP", "FN", "TN"))
    assert counted == np.prod(SHAPE) - 64  # what is ignored does not count


def test_people_read_the_same_figures_and_how_the_seed_took_its_four(known: Evaluated) -> None:
    text = known.result.text.read_text()
    for line in (
        r"Dice \(full scan, per case\) +0.6667 \[0.0000, 1.0000\]",
        r"accuracy \(full scan\) +0.99",
        r"LUNA16 \(within the radius\) +0.7500",
        r"6-8 mm +4 +0.7500",
        r"Of so few patients the intervals mean little",
        r"The seed project",
    ):
        assert re.search(line, text), line


def test_other_thresholds_and_a_killed_evaluation_need_no_network(known: Evaluated) -> None:
    high = again(known, must_not_be_asked, threshold=0.75, candidate_score="mean")
    assert high.tree["summary"]["false_positives_per_scan"] == 0  # it had 0.7
    assert high.tree["settings"]["threshold"] == 0.75
    assert high.tree["detection"]["score"] == "mean"
    for asked_otherwise in ({"overlap": 0.5}, {"second_looks": 1}):
        with pytest.raises(AssertionError, match="was asked"):
            again(known, must_not_be_asked, **asked_otherwise)


def test_what_is_kept_and_damaged_is_asked_again(tmp_path: Path) -> None:
    first = evaluate(tmp_path, scans())
    kept = keys.probabilities(keys.run_root("r"), f"{first.model.checkpoint}-test", "")[:-1]
    (one, *others) = [item.key for item in first.store.find(kept)]
    assert len(others) == 3
    first.store.put(one, first.store.get(one)[:-9])
    with pytest.raises(AssertionError, match="was asked"):
        again(first, must_not_be_asked)
    assert again(first, network).tree["summary"] == first.tree["summary"]


def test_a_broken_scan_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    whole = evaluate(tmp_path, scans())
    broken = whole.manifest.held_out["test"][2]
    whole.store.put(broken.key, b"no Arrow")
    found = again(whole, network)
    assert found.refused == [("c2", "scan-corrupt")]
    assert found.tree["left_out"] == [{"case_id": "c2", "code": "scan-corrupt"}]
    assert found.tree["summary"]["cases"] == 3
    assert "left out, could not be used: c2 (scan-corrupt)" in found.result.text.read_text()
    for entry in whole.manifest.held_out["test"]:
        whole.store.put(entry.key, b"no Arrow")
    with pytest.raises(LungsegError, match="scan-corrupt"):
        again(whole, network)


def test_a_report_that_cannot_be_written_is_named(known: Evaluated, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="output-unwritable"):
        again(replace(known, out=tmp_path / "file"), must_not_be_asked)


def test_the_verb_scores_again_without_tensorflow_and_ends_with_3_after_a_broken_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run has no weights that could be loaded."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    whole = evaluate(tmp_path, scans())
    whole.store.put(whole.manifest.held_out["test"][0].key, b"no Arrow")
    call = ["evaluate", "--run", "r", "--store", whole.store.uri, "--out", str(tmp_path / "again")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*call, "--set", "segment.threshold=0.75"])
    out, err = capfd.readouterr()
    assert ended.value.code == 3
    assert "2 patients" not in out
    assert "3 scans" in out
    assert "c0 (scan-corrupt)" in err
    assert str(tmp_path / "again" / "evaluation-") in out


def test_a_run_on_data_of_before_is_scored_on_the_same_scans_prepared_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    whole = evaluate(tmp_path, scans())
    for name, cases in (("anew", {}), ("others", {"test": ("x",)})):
        other = replace(whole.manifest, name=name, cases=cases)
        whole.store.put(keys.data_manifest(name), other.to_bytes())
    call = ["evaluate", "--run", "r", "--store", whole.store.uri, "--out", str(tmp_path / "o"), "--data"]
    cli_codes = []
    for name in ("anew", "others"):
        with pytest.raises(SystemExit) as ended:
            cli.main([*call, name])
        cli_codes.append(ended.value.code)
    assert cli_codes == [0, 2]
    assert "splits-differ" in capfd.readouterr().err
    (report,) = (tmp_path / "o").glob("*.json")
    assert json.loads(report.read_text())["data"] == "anew"


def test_on_a_cluster_each_scan_is_a_task_and_the_figures_are_the_same(
    ray_cluster: object, known: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # as in every job; the session's Ray stands for the cluster
    store = open_store(tmp_path / "store")
    manifest, model = hold_out(store, scans(), MM, patients=[0, 0, 1, 2])
    store.put(manifest.held_out["test"][3].key, b"no Arrow")
    one = Evaluated(store, manifest, model, tmp_path / "out", known.result, [])
    found = again(one, lambda windows: (windows + 1000) / 1000)
    assert found.refused == [("c3", "scan-corrupt")]
    assert found.tree["nodules"] == known.tree["nodules"]


def test_what_a_network_raises_ends_the_evaluation_and_what_is_kept_stays(tmp_path: Path) -> None:
    """Ctrl-C comes the same way."""
    asked = []

    def failing(windows: np.ndarray) -> np.ndarray:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return network(windows)

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, scans(), failing)
    store = open_store(tmp_path / "store")
    assert len(asked) == 3
    assert len([item for item in store.find(keys.run_root("r")) if "probabilities" in item.key]) == 2
