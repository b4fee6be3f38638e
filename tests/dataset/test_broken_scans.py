"""What prepare does with scans that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.painted import CONFIG, quiet, write_pairs

from lungseg import cli
from lungseg.dataset.card import describe
from lungseg.dataset.case import Exclusion
from lungseg.dataset.manifest import load_manifest
from lungseg.dataset.prepare import prepare
from lungseg.errors import DataError
from lungseg.storage import open_store


def test_a_scan_that_cannot_be_read_ends_in_its_own_error_and_no_manifest(
    ray_cluster: object, tmp_path: Path
) -> None:
    broken = write_pairs(tmp_path / "pairs", 3)
    image = broken[1].image
    image.write_bytes(image.read_bytes()[:-200])
    store = open_store(tmp_path / "store")
    with pytest.raises(DataError) as caught:
        prepare(store, "d", broken, CONFIG, quiet)
    assert caught.value.code == "image-unreadable"
    assert type(caught.value) is DataError
    assert str(image) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not store.exists("data/d/manifest.json")


def test_broken_scans_are_listed_and_left_out_on_demand_only(
    ray_cluster: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = write_pairs(tmp_path / "pairs", 8)
    train = prepare(open_store(tmp_path / "whole"), "d", cases, CONFIG, quiet).cases["train"]
    broken = [case for case in cases if case.case_id in train][:2]
    broken[0].image.write_bytes(broken[0].image.read_bytes()[:-200])
    image = sitk.ReadImage(str(broken[1].mask))
    sitk.WriteImage(image[:-1], str(broken[1].mask))
    store = open_store(tmp_path / "store")
    thick = Exclusion("t", "slices-thick", "slices of 5 mm, thicker than 2.5 mm")

    with pytest.raises(DataError, match=r"scans-broken.*2 of 8.*--skip-broken") as caught:
        prepare(store, "d", cases, CONFIG, quiet, [thick])
    assert "1 grid-mismatch" in str(caught.value)
    assert "8 scans of 4 patients (2 train, 1 val, 1 test), by patients.csv" in caplog.messages
    assert all(any(case.case_id in line for line in caplog.messages) for case in broken)
    assert not store.exists("data/d/manifest.json")

    manifest = prepare(store, "d", cases, CONFIG, quiet, [thick], skip_broken=True)
    found = {one.case_id: one.code for one in manifest.excluded}
    codes = {broken[0].case_id: "image-unreadable", broken[1].case_id: "grid-mismatch"}
    assert found == codes | {"t": "slices-thick"}
    assert set(manifest.cases["train"]) == set(train) - set(codes)
    assert b"MUSTER" not in store.get("data/d/manifest.json")
    # The data set stays what it is; whoever did not allow it is told so.
    assert prepare(store, "d", cases, CONFIG, quiet, [thick], skip_broken=True) == manifest
    with pytest.raises(DataError, match=r"scans-broken.*2 broken scans were left out"):
        prepare(store, "d", cases, CONFIG, quiet, [thick])


def test_scans_that_no_node_can_see_are_refused_also_on_demand(ray_cluster: object, tmp_path: Path) -> None:
    cases = write_pairs(tmp_path / "pairs", 4)
    (tmp_path / "pairs").rename(tmp_path / "elsewhere")
    store = open_store(tmp_path / "store")
    for skip_broken in (False, True):
        with pytest.raises(DataError, match=r"scans-broken: 4 scan-unreachable \(scans=4 of 4\)"):
            prepare(store, "d", cases, CONFIG, quiet, skip_broken=skip_broken)
    assert not store.exists("data/d/manifest.json")


def test_the_exit_code_and_the_last_line_say_that_scans_were_left_out(
    ray_cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = write_pairs(tmp_path / "pairs", 8)
    cases[0].mask.write_bytes(b"")
    store = tmp_path / "store"
    words = ["prepare", "pairs", str(tmp_path / "pairs"), "--store", str(store), "--data", "d"]
    words += ["--set", "data.patch.shape_zyx=[16, 16, 16]", "--set", "data.split.seed=2"]
    for flags, code in (([], 2), (["--skip-broken"], 3), (["--skip-broken"], 3), ([], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *flags])
        said = capsys.readouterr()
        assert ended.value.code == code
        assert said.err.splitlines()[-1].startswith("lungseg: ")
        assert (f"{cases[0].case_id} (image-unreadable)" in said.err.splitlines()[-1]) == (code == 3)
    assert len(load_manifest(open_store(str(store)), "d").excluded) == 1


def test_scans_that_are_no_hu_are_all_named_and_taken_by_a_setting_only(
    ray_cluster: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = write_pairs(tmp_path / "pairs", 8)
    shifted = {case.case_id for case in cases[:2]}
    for case in cases[:2]:
        sitk.WriteImage(sitk.ReadImage(str(case.image)) + 1024, str(case.image))
    store = open_store(tmp_path / "store")
    with pytest.raises(DataError, match=r"scans-broken: 2 not-hu \(scans=2 of 8\)"):
        prepare(store, "d", cases, CONFIG, quiet)
    said = [line for line in caplog.messages if "not-hu" in line and "data.allow_not_hu=true" in line]
    assert {case.case_id for case in cases if any(case.case_id in line for line in said)} == shifted

    taken = prepare(store, "d", cases, CONFIG.model_copy(update={"allow_not_hu": True}), quiet)
    assert {case_id for case_id, facts in taken.scans.items() if facts.not_hu} == shifted
    assert load_manifest(store, "d") == taken
    (doubt,) = json.loads(store.get("data/d/card.json"))["doubts"]
    assert doubt.startswith(f"2 scans are probably not in HU, such as {min(shifted)}: hardly a voxel")
    assert doubt in store.get("data/d/card.html").decode()
    assert f"warning: {doubt}" in describe(taken)
