"""Nodules of two scans: laid upon one another, matched, and their change in volume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.grids import geometry_of, turned

from lungseg import cli
from lungseg.errors import ConfigError, DataError
from lungseg.scan.volume import write_mask
from lungseg.segment.follow import Result, follow, labels_of, read_result, rigid

MOTION, SHIFT_MM = turned((4, -3, 6)), np.array([12.0, -7.0, 15.0])
MIDDLE_MM = np.array([20.0, -35.0, 300.0])
CENTRES_MM = np.add(MIDDLE_MM, [[40, 10, 30], [-42, 5, -20], [38, -12, 38], [-30, 20, 0]])


def moved(points_mm: np.ndarray) -> np.ndarray:
    return (points_mm - MIDDLE_MM) @ MOTION.T + MIDDLE_MM + SHIFT_MM


def write_result(
    folder: Path, scan: str, centres_mm: np.ndarray, volumes_mm3: list[float], motion: bool
) -> Path:
    """Two lungs of unlike size, and nodules at these places of the patient."""
    grid = geometry_of((90, 100, 110), (2.5, 2.0, 2.0), tuple(MIDDLE_MM - [110, 100, 112]))
    place = grid.to_lps_mm(np.stack(np.indices(grid.shape_zyx), axis=-1))
    if motion:
        place = (place - MIDDLE_MM - SHIFT_MM) @ MOTION + MIDDLE_MM  # where it was before
    off = place - MIDDLE_MM
    left = (((off - [42, 0, 0]) / [30, 48, 78]) ** 2).sum(axis=-1) < 1
    right = (((off - [-44, 5, 8]) / [34, 52, 88]) ** 2).sum(axis=-1) < 1
    folder.mkdir(parents=True)
    write_mask(folder / "lungs.nii.gz", left | right, grid)
    nodules = [
        {
            "label": label,
            "centre_lps_mm": centre.tolist(),
            "volume_mm3": mm3,
            "mean_axial_diameter_mm": (6 * mm3 / math.pi) ** (1 / 3),
        }
        for label, (centre, mm3) in enumerate(zip(centres_mm, volumes_mm3, strict=True), 1)
    ]
    (folder / "nodules.json").write_text(json.dumps({"scan": scan, "nodules": nodules}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The last nodule has gone, the first has doubled, another is new, and all have other labels."""
    here = tmp_path_factory.mktemp("results")
    new = moved(MIDDLE_MM + np.array([[-50.0, -10, 50]]))
    later = np.concatenate([new, np.add(moved(CENTRES_MM[:3])[::-1], [1.0, -1, 2])])
    return (
        write_result(here / "a", "a", CENTRES_MM, [100, 200, 300, 400], motion=False),
        write_result(here / "b", "b", later, [90, 330, 150, 200], motion=True),
    )


@pytest.fixture(scope="module")
def both(folders: tuple[Path, Path]) -> tuple[Result, Result]:
    return read_result(folders[0]), read_result(folders[1])


def test_the_motion_of_the_lungs_is_found_within_a_mm(both: tuple[Result, Result]) -> None:
    transform = rigid(both[0].lungs, both[1].lungs)
    found = np.array([transform.TransformPoint(place) for place in CENTRES_MM.tolist()])
    assert np.linalg.norm(found - moved(CENTRES_MM), axis=1).max() < 1


def test_nodules_are_matched_by_place_with_their_change_and_doubling_time(
    both: tuple[Result, Result],
) -> None:
    rows, dice = follow(*both, days=90)
    assert dice == pytest.approx(1, abs=0.03)
    assert [(row.earlier, row.later) for row in rows] == [(None, 1), (3, 2), (2, 3), (1, 4), (4, None)]
    new, slow, shrunk, doubled, gone = rows
    assert (new.later_mm3, new.volume_change, gone.earlier_mm3) == (90, None, 400)
    assert doubled.volume_change == pytest.approx(1)
    assert doubled.doubling_days == pytest.approx(90)
    assert slow.volume_change == pytest.approx(0.1)
    assert slow.doubling_days == pytest.approx(90 * math.log(2) / math.log(1.1))
    assert [row.beyond_noise for row in (slow, shrunk, doubled)] == [False, True, True]
    assert shrunk.doubling_days is None
    assert all(row.apart_mm == pytest.approx(math.sqrt(6), abs=1) for row in (slow, shrunk, doubled))


def test_pairs_that_are_given_are_taken_and_need_no_lungs(both: tuple[Result, Result]) -> None:
    bare = [replace(one, lungs=None) for one in both]
    rows, dice = follow(*bare, days=90, pairs=[(1, 1), (2, 2), (3, 3), (4, 4)])
    assert dice is None
    assert [(row.earlier, row.later, row.apart_mm) for row in rows] == [(n, n, None) for n in (1, 2, 3, 4)]
    with pytest.raises(DataError, match="lungs-missing"):
        follow(*bare, days=90, pairs=[(1, 1)])
    for wrong in ([(1, 9)], [(1, 1), (1, 2)], [(1, 2), (3, 2)]):
        with pytest.raises(DataError, match="pair-unknown"):
            follow(*bare, days=90, pairs=wrong)
    with pytest.raises(DataError, match="scans-equal"):
        follow(both[0], both[0], days=90)
    rows, _ = follow(replace(both[0], nodules=()), both[1], days=90)
    assert [row.earlier for row in rows] == [None] * 4


def test_a_near_pair_is_not_given_up_for_the_sum_of_distances() -> None:
    """Two nodules 14 mm apart along one line, of which one has gone: the other stays where it is."""
    lungs = sitk.GetImageFromArray(np.pad(np.ones((20, 20, 30), np.uint8), 8))

    def result(scan: str, *x_mm: float) -> Result:
        nodules = [
            {"label": n, "centre_lps_mm": [x, 18.0, 18.0], "volume_mm3": 50.0, "mean_axial_diameter_mm": 4.6}
            for n, x in enumerate(x_mm, 1)
        ]
        return Result(Path(scan), scan, tuple(nodules), lungs)

    rows, _ = follow(result("a", 10, 24), result("b", 24.5, 60), days=10)
    assert [(row.earlier, row.later) for row in rows] == [(2, 1), (None, 2), (1, None)]


def test_the_verb_prints_a_table_and_writes_json(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["follow", *map(str, folders), *words])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    code, out, _ = run("--days", "90", "--out", str(tmp_path))
    assert code == 0
    assert "100 -> 200" in out
    assert "+100%" in out
    assert "within noise" in out
    said = json.loads((tmp_path / "follow.json").read_text())
    assert (said["earlier_scan"], said["later_scan"], said["noise_share"]) == ("a", "b", 0.25)
    assert len(said["nodules"]) == 5
    for words, told in ((["--days", "0"], "days-invalid"), (["--days", "9", "--pair", "1-2"], "pair-syntax")):
        code, _, err = run(*words)
        assert code == 2
        assert told in err


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    for content in (None, "{}", '{"scan": "s", "nodules": [{"label": 1}]}'):
        if content is not None:
            (tmp_path / "nodules.json").write_text(content)
        with pytest.raises(DataError, match="result-unreadable"):
            read_result(tmp_path)
    assert labels_of("12:3") == (12, 3)
    with pytest.raises(ConfigError, match="pair-syntax"):
        labels_of("0:1")
