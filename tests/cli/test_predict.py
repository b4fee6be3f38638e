"""`predict` over several scans: none is taken for another, and a broken one stops no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.balls import write_balls
from helpers.ct_slices import OTHER, SECRETS, SERIES, write
from helpers.networks import publish_untrained

from lungseg import cli
from lungseg.runs.post import Post, record_post
from lungseg.runs.run import load_published
from lungseg.scan.identity import case_id, case_key
from lungseg.scan.volume import Geometry
from lungseg.sources.phantom.write import write_series
from lungseg.storage import keys, open_store

Ended = tuple[int, list[str], list[str]]
"""Exit code, lines of standard output, lines of lungseg's own on standard error."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    opened = open_store(folder)
    manifest = write_balls(opened)
    for name in "rq":
        publish_untrained(opened, name, manifest)
    return folder


@pytest.fixture
def predict(store: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*words: str, run: str = "r") -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main(["predict", *words, "--run", run, "--store", str(store), "--out", "out"])
        out, err = capfd.readouterr()
        return ended.value.code, out.splitlines(), [line for line in err.splitlines() if "lungseg: " in line]

    return run


def scan(path: Path, value: int = -700) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(np.full((12, 14, 16), value, np.int16)), str(path))
    return path


def id_of(name: str) -> str:
    return case_id(name, case_key())


def test_a_broken_scan_is_named_and_the_others_go_on(predict: Callable[..., Ended], here: Path) -> None:
    names = [scan(here / f"{letter}.nii.gz").name for letter in "abc"]
    (here / names[1]).write_bytes((here / names[1]).read_bytes()[:60])
    code, out, err = predict(*names)
    assert code == 3
    assert [line.partition(":")[0] for line in out] == ["a.nii.gz", "c.nii.gz"]
    assert err[0].startswith("lungseg: b.nii.gz: image-unreadable")
    assert err[1:] == ["lungseg: left out, since they could not be used: b.nii.gz (image-unreadable)"]
    assert sorted(path.name for path in (here / "out").iterdir()) == sorted(map(id_of, "ac"))


def test_settings_of_segment_can_be_set_and_are_written_down_and_no_others(
    predict: Callable[..., Ended], here: Path
) -> None:
    for letter, folder in (("a", "P1"), ("a", "P2")):
        scan(here / folder / f"{letter}.nii.gz")
    chosen = ["--set", "segment.threshold=0.01", "--set", "segment.lungs_only=false", "--probability"]
    code, out, err = predict("P1/a.nii.gz", "P2/a.nii.gz", *chosen)
    assert (code, len(out)) == (0, 2)
    for name in ("P1/a", "P2/a"):
        said = json.loads((here / "out" / id_of(name) / "nodules.json").read_text())
        assert said["settings"]["threshold"] == 0.01
        assert said["warnings"]
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(here / "out" / id_of(name) / "nodules.nii.gz")))
        assert sorted(set(labels.ravel().tolist()) - {0}) == [one["label"] for one in said["nodules"]] == [1]
        assert (here / "out" / id_of(name) / "probability.nii.gz").exists()
    for wrong, told in (("train.epochs=3", "setting-fixed"), ("segment.threshold=7", "field-invalid")):
        code, out, err = predict("P1/a.nii.gz", "--set", wrong)
        assert (code, out) == (2, [])
        assert told in err[0]


def test_of_several_runs_the_mean_probability_is_taken(predict: Callable[..., Ended], here: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 200, (12, 14, 16)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(here / "a.nii.gz"))
    (here / "runs.txt").write_text("q\n")
    found = []
    for flags in ([], ["--runs", "runs.txt"]):
        assert predict("a.nii.gz", "--probability", *flags)[0] == 0
        folder = here / "out" / id_of("a")
        said = json.loads((folder / "nodules.json").read_text())
        found.append((said, sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "probability.nii.gz")))))
    assert predict("a.nii.gz", "--probability", run="q")[0] == 0
    other = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "probability.nii.gz")))
    (_, one), (said, mean) = found
    assert np.abs(one - other).max() > 1e-4
    np.testing.assert_allclose(mean, (one + other) / 2, atol=1e-6)
    assert said["run"] == "q+r"
    assert said["checkpoint"].count("+") == 1
    for flags, code in ((["--run", "r"], "runs-repeated"), (["--runs", "none.txt"], "runs-file")):
        assert predict("a.nii.gz", *flags)[2][0].startswith(f"lungseg: {code}")
    assert predict("a.nii.gz", "--run", "nosuch")[2][0].startswith("lungseg: run-missing")


def test_what_fit_post_recorded_is_used_and_written_down_unless_it_is_to_be_ignored(
    predict: Callable[..., Ended], here: Path, store: Path
) -> None:
    scan(here / "a.nii.gz")
    opened = open_store(store)
    model = load_published(opened, "q")
    chosen = {"threshold": 0.01, "min_volume_mm3": 0.0, "lungs_only": False}
    post = Post("q", model.checkpoint, "", "2026-01-01", "cpm", chosen, 9, ("c",), {}, {})
    record_post(opened, keys.run_root("q"), post)
    for flags, threshold in (([], 0.01), (["--no-post"], 0.5), (["--set", "segment.threshold=0.9"], 0.9)):
        assert predict("a.nii.gz", *flags, run="q")[0] == 0
        said = json.loads((here / "out" / id_of("a") / "nodules.json").read_text())
        assert said["settings"]["threshold"] == threshold
        assert said["settings"]["lungs_only"] == (flags == ["--no-post"])
        assert (said["post"] is None) == (flags == ["--no-post"])
    assert "fit-post chose on val, 2026-01-01" in said["post"]


def test_dicom_is_written_on_request_to_a_folder_of_its_own(
    predict: Callable[..., Ended], here: Path
) -> None:
    geometry = Geometry((12, 14, 16), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    write_series(here / "ct", np.full((12, 14, 16), -700, np.int16), geometry, SERIES, "2.25.2", SECRETS[1])
    scan(here / "b.nii")
    code, out, err = predict("ct", "b.nii", "--dicom", "dicom", "--set", "segment.threshold=0.01")
    assert code == 3
    assert out == [f"ct: 1 nodules, out/{id_of('ct')}/nodules.nii.gz, dicom/{id_of('ct')}"]
    assert err[-1].endswith("b.nii (dicom-needed)")
    written = [path for path in (here / "dicom").rglob("*") if path.is_file()]
    assert sorted(path.name for path in written) == ["report.dcm", "segmentation.dcm"]
    assert all(SECRETS[1].encode() in path.read_bytes() for path in written)
    assert not any(
        secret.encode() in path.read_bytes() for path in (here / "out").rglob("*.*") for secret in SECRETS
    )
    code, out, err = predict("ct", "--dicom", "out")
    assert (code, out) == (2, [])
    assert "flags-contradict" in err[0]


def test_where_no_scan_can_be_used_the_code_is_2_and_no_network_is_loaded(
    predict: Callable[..., Ended], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.nrrd", "b.nii"):
        (here / name).write_bytes(b"no image")
    monkeypatch.setattr("lungseg.telemetry.quiet_tensorflow", lambda: pytest.fail("TensorFlow is imported"))
    code, out, err = predict("a.nrrd", "b.nii")
    assert (code, out, len(err)) == (2, [], 3)
    assert err[-1].startswith("lungseg: nothing could be used: a.nrrd (")
    code, out, err = predict("b.nii")
    assert (code, out, len(err)) == (2, [], 1)


def test_all_series_of_a_folder_are_segmented_each_by_itself(
    predict: Callable[..., Ended], here: Path
) -> None:
    write(here / "study" / "a")

    def second(number: int, dataset: object) -> None:
        dataset.SeriesInstanceUID = OTHER

    write(here / "study" / "b", second)
    write(here / "study" / "c", lambda number, dataset: setattr(dataset, "SeriesInstanceUID", "1.2.3.4.5.6"))
    (here / "study" / "c" / "3.dcm").unlink()  # a slice is missing
    code, out, err = predict("study")
    assert code == 3
    numbered = "study, series {} of 3 (6 slices, first {}/0.dcm): 0 nodules"
    assert [line.partition(", out/")[0] for line in out] == [numbered.format(1, "a"), numbered.format(2, "b")]
    assert err[-1].startswith("lungseg: left out, since they could not be used: study, series 3 of 3")
    assert "(slices-missing)" in err[-1]
    results = sorted(path for path in (here / "out").iterdir())
    assert len(results) == 2
    written = "".join([str(results), *out, *err, *(p.read_text() for p in here.glob("out/*/nodules.json"))])
    assert not any(secret in written for secret in SECRETS)
    code, out, _ = predict("study", "--series", "2")
    assert code == 0
    assert len(out) == 1
    assert str(Path("out", id_of(OTHER))) in out[0]
    assert predict("study", "--series", OTHER)[:2] == (0, out)


def test_another_scan_of_the_same_name_is_refused_and_the_same_scan_replaced(
    predict: Callable[..., Ended], here: Path
) -> None:
    write(here / "P1" / "CT")
    write(here / "P2" / "CT", lambda number, dataset: dataset.ImagePositionPatient.__setitem__(0, 40.0))
    assert predict("P1/CT")[0] == 0
    (result,) = (here / "out").iterdir()
    first = {path.name: path.read_bytes() for path in result.iterdir()}
    code, out, err = predict("P2/CT")
    assert (code, out) == (2, [])
    assert err[0].startswith(f"lungseg: output-of-another-scan (folder=out/{id_of('CT')})")
    assert {path.name: path.read_bytes() for path in result.iterdir()} == first
    assert predict("P1/CT")[0] == 0
    (here / "P1").rename(here / "moved")
    assert predict("moved/CT")[0] == 0
    assert len(json.loads(first["nodules.json"])["scan"]) == 16
