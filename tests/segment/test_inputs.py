"""Who is who: every scan has the id of its own name, whatever way it is given."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.ct_slices import OTHER, SECRETS, SERIES, write

from lungseg import cli
from lungseg.config import PairsConfig
from lungseg.errors import DataError, LungsegError
from lungseg.scan.dicom import read_series
from lungseg.scan.identity import case_id, case_key, scan_id
from lungseg.segment.inputs import Input, case_name, case_names, find_inputs, read_inputs, require_inputs
from lungseg.segment.outputs.nifti import require_own
from lungseg.sources.pairs import find_cases

KEY = b"k" * 16


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    return path


def test_a_name_is_the_inputs_own_without_its_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("a/p01.v2.nii.gz", "p01.NII.GZ", "p01.nrrd", "p01.mha", "dicom/1.2.840/", "x/../p01.nii")
    assert [case_name(Path(name)) for name in names] == ["p01.v2", "p01", "p01", "p01", "1.2.840", "p01"]
    assert case_name(Path(".")) == tmp_path.name
    assert case_name(Path("/")) == "scan"


def test_a_link_has_its_own_name_here_and_in_pairs(tmp_path: Path) -> None:
    target = save(tmp_path / "archive" / "4711.nii.gz", np.zeros((3, 4, 5), np.int16))
    mask = save(tmp_path / "archive" / "mask.nii.gz", np.zeros((3, 4, 5), np.uint8))
    for kind, file in (("images", target), ("masks", mask)):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
        (tmp_path / "pairs" / kind / "anna.nii.gz").symlink_to(file)
    (case,) = find_cases(tmp_path / "pairs", PairsConfig())
    (given,) = find_inputs(tmp_path / "pairs/images/anna.nii.gz", case_key())
    assert given.case_id == case.case_id == case_id("anna", case_key())
    write(tmp_path / "series")
    (tmp_path / "otto").symlink_to(tmp_path / "series")
    assert find_inputs(tmp_path / "otto", KEY)[0].case_id == case_id("otto", KEY)


def test_every_series_of_a_folder_is_a_scan_with_an_id_and_a_number_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "b")
    assert [one.case_id for one in find_inputs(tmp_path, KEY)] == [case_id(tmp_path.name, KEY)]
    write(tmp_path / "a", lambda number, one: setattr(one, "SeriesInstanceUID", OTHER), step=5)
    first, second = find_inputs(tmp_path, KEY)
    assert (first.case_id, second.case_id) == (case_id(OTHER, KEY), case_id(SERIES, KEY))
    assert first.title == f"{tmp_path}, series 1 of 2 (6 slices, first a/0.dcm)"
    assert second.title == f"{tmp_path}, series 2 of 2 (6 slices, first b/0.dcm)"
    assert [one.read().geometry.spacing_mm[0] for one in (first, second)] == [5, 2.5]
    for chosen, expected in (("1", first), (OTHER, first), ("2", second), (SERIES, second)):
        assert find_inputs(tmp_path, KEY, chosen) == [expected]
    shown = capsys.readouterr
    with pytest.raises(SystemExit):
        cli.main(["ids", str(tmp_path)])
    keyed = [f"{case_id(uid, case_key())}  {one.title}" for uid, one in ((OTHER, first), (SERIES, second))]
    assert shown().out.splitlines() == keyed
    with pytest.raises(SystemExit) as ended:
        cli.main(["ids", str(tmp_path / "none"), str(tmp_path), "--series", "2"])
    out, err = shown()
    assert (ended.value.code, out.splitlines()) == (3, keyed[1:])
    assert "none: input-missing" in err
    for none in ("0", "3", "1.2.3"):
        with pytest.raises(DataError, match=r"series-missing: 1: 6 slices, first a/0\.dcm; 2: ") as caught:
            find_inputs(tmp_path, KEY, none)
        assert not any(secret in str(caught.value) for secret in SECRETS)


def test_a_series_is_asked_for_in_folders_alone(tmp_path: Path) -> None:
    image = save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.int16))
    with pytest.raises(DataError, match="series-missing"):
        find_inputs(image, KEY, "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="series-none"):
        find_inputs(tmp_path / "empty", KEY)


def test_what_cannot_be_read_goes_to_refuse_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = [save(tmp_path / name, np.zeros((3, 4, 5), np.int16)) for name in ("a.nii", "c.mha", "d.NRRD")]
    (tmp_path / "b.nii").write_bytes(b"none")
    (tmp_path / "e").mkdir()
    told: list[tuple[str, str]] = []

    def accept(one: Input, volume: object) -> None:
        if one.path == good[1]:
            raise DataError("taken", remedy="-")

    def refuse(title: str, error: LungsegError) -> None:
        told.append((Path(title).name, error.code))

    paths = [good[0], tmp_path / "b.nii", good[1], tmp_path / "e", good[2]]
    found = [one.path for one, _ in read_inputs(paths, KEY, None, accept, refuse)]
    assert found == [good[0], good[2]]
    assert [name for name, _ in told] == ["b.nii", "c.mha", "e"]
    assert [code for _, code in told][1:] == ["taken", "series-none"]
    for lone in (tmp_path / "b.nii", good[1], tmp_path / "e"):
        with pytest.raises(DataError):
            list(read_inputs([lone], KEY, None, accept, refuse))
    assert len(told) == 3


def test_inputs_that_are_not_there_or_share_a_name_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input-missing"):
        require_inputs([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(DataError, match="input-ambiguous"):
        require_inputs([tmp_path, tmp_path / "." / ""])


def test_inputs_that_share_a_name_take_their_parents(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("P1/CT", "P2/CT", "a/P1/CT", "b.nii", "c/scan.nii", "c/scan.mha")]
    names = case_names(paths)
    assert names[1:4] == ["P2/CT", "a/P1/CT", "b"]
    assert names[0] == f"{tmp_path.name}/P1/CT"
    assert names[4] == names[5]
    assert case_names(paths[:2]) == ["P1/CT", "P2/CT"]
    for path in paths[:2]:
        write(path)
    require_inputs(paths[:2])
    found = [one.case_id for one, _ in read_inputs(paths[:2], KEY, None, lambda *_: None, lambda *_: None)]
    assert found == [case_id("P1/CT", KEY), case_id("P2/CT", KEY)]


def test_a_scan_is_known_by_its_voxels_and_its_place_alone(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "other name", lambda number, one: setattr(one, "SeriesInstanceUID", OTHER))
    volume = read_series(tmp_path / "one")
    known = scan_id(volume, KEY)
    assert known == scan_id(read_series(tmp_path / "other name"), KEY)
    changed = volume.volume_hu.copy()
    changed[0, 0, 0] += 1
    x, y, z = volume.geometry.origin_lps_mm
    moved = replace(volume, geometry=replace(volume.geometry, origin_lps_mm=(x, y, z + 1000)))
    others = [replace(volume, volume_hu=changed), moved]
    assert len({known, scan_id(volume, b"l" * 16), *(scan_id(one, KEY) for one in others)}) == 4


def test_a_name_that_is_no_text_has_an_id_and_is_read_or_refused(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller"))
    nifti, nrrd = (
        save(tmp_path / f"plain{suffix}", np.zeros((3, 4, 5), np.int16)) for suffix in (".nii", ".nrrd")
    )
    folder.mkdir()
    (one,) = find_inputs(nifti.rename(folder.with_suffix(".nii")), KEY)
    assert one.case_id != case_id("M\u00fcller", KEY)
    assert one.read().volume_hu.shape == (3, 4, 5)
    (other,) = find_inputs(nrrd.rename(folder / "plain.nrrd"), KEY)
    with pytest.raises(DataError, match="path-not-text"):  # SimpleITK would end the process
        other.read()
    with pytest.raises(DataError, match="path-not-text"):
        require_own(folder / other.case_id, "s")
