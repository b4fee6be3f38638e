"""The verbs that use networks, and what is made of their answers: fit-post, evaluate, compare, predict."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lungseg.cli.app import app
from lungseg.cli.ends import Refused
from lungseg.cli.options import (
    STORE,
    NoPost,
    Out,
    Overrides,
    RunNames,
    RunsFile,
    Series,
    StoreUri,
    checked_name,
    model_names,
    read_runs,
)
from lungseg.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pydicom import Dataset

    from lungseg.runs.ensemble import Ensemble
    from lungseg.scan.volume import Volume
    from lungseg.segment.inputs import Input
    from lungseg.segment.predict import Asked, Segmentation
    from lungseg.storage import Store


OtherData = Annotated[
    str, typer.Option("--data", help="Another data set of the same scans and splits. Default: the run's.")
]


@app.command("fit-post")
def fit_post(
    runs: RunNames = None,
    runs_file: RunsFile = None,
    store: StoreUri = STORE,
    by: Annotated[
        Literal["cpm", "f2"],
        typer.Option("--by", help="CPM, or F2 at one false positive a scan: what ranks candidates."),
    ] = "cpm",
    data: OtherData = "",
    overrides: Overrides = None,
) -> None:
    """Choose on val how probabilities become nodules, for `evaluate` and `predict` to use.

    Mirror images, the smallest volume, the candidates' score and the threshold: the simplest settings
    within one standard error of the best. Those given by --set are not tried, and recorded as they are.
    """
    from lungseg.cluster import await_store
    from lungseg.config import TrainConfig
    from lungseg.evaluate import fit_post as fitting
    from lungseg.evaluate.scans import load_members
    from lungseg.storage import open_store

    names, given = read_runs(runs or [], runs_file), overrides or []
    opened, refused = open_store(store), Refused()
    await_store(opened.check, TrainConfig().wait_minutes)
    model, members = load_members(opened, names, "val", given, data and checked_name(data), use_post=False)
    fixed = [one.partition("=")[0].strip().removeprefix("segment.") for one in given]
    post, key = fitting.fit_post(opened, model, members, by, fixed, refused)
    print(f"{fitting.as_text(post)}\n{store.rstrip('/')}/{key}")
    refused.end(some_done=True)


@app.command()
def evaluate(
    out: Out,
    runs: RunNames = None,
    runs_file: RunsFile = None,
    store: StoreUri = STORE,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    data: OtherData = "",
    overrides: Overrides = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Score a mere threshold of HU beside the network.")
    ] = False,
    no_post: NoPost = False,
) -> None:
    """Score the best checkpoint on whole held-out scans; --set takes settings of segment.

    Probabilities are kept in the store: other thresholds need no network. A scan that cannot be used is
    named, and the exit code is then 3. Several runs are scored as one model; of the folds of a
    cross-validation every scan is, each by the networks that never saw it.
    """
    from lungseg.cluster import await_store
    from lungseg.config import TrainConfig
    from lungseg.evaluate.protocol import evaluate_split
    from lungseg.evaluate.scans import load_members, load_networks
    from lungseg.storage import open_store
    from lungseg.telemetry import progress

    names = read_runs(runs or [], runs_file)
    opened, refused = open_store(store), Refused()
    await_store(opened.check, TrainConfig().wait_minutes)
    model, members = load_members(
        opened, names, split, overrides or [], data and checked_name(data), use_post=not no_post
    )
    load_networks(opened, members, split)
    with progress("scans") as report:
        result = evaluate_split(opened, members, split, out, report, refused, baseline, model.post)
    print(result.text.read_text(encoding="utf-8"), end="")
    print(f"{result.text}\n{result.json}\n{store.rstrip('/')}/{result.key}")
    refused.end(some_done=True)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Option("--run", callback=model_names, help="Name of a run, or A+B; give two or more."),
    ],
    store: StoreUri = STORE,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the same as text and JSON.")] = None,
) -> None:
    """Compare what `evaluate` last said of runs, patient by patient.

    They must be evaluated on the same scans. No network is asked.
    """
    from lungseg.evaluate.comparison import as_text, compare_evaluations, to_tree
    from lungseg.evaluate.report import to_strict_json, write_files
    from lungseg.evaluate.stored import newest_evaluation
    from lungseg.runs.ensemble import ensemble_name
    from lungseg.runs.run import load_run
    from lungseg.storage import open_store

    if len(runs) < 2 or len(set(runs)) < len(runs):
        named = ", ".join(runs)
        raise ConfigError("runs-to-compare", runs=named, remedy="name two or more: --run FIRST --run SECOND")
    opened = open_store(store)
    for run in "+".join(runs).split("+"):
        load_run(opened, run)
    evaluations = [newest_evaluation(opened, ensemble_name(run.split("+")), split) for run in runs]
    found = compare_evaluations(evaluations)
    text = as_text(evaluations, found)
    if out:
        tree = to_tree(evaluations, found)
        write_files(out, {"comparison.txt": text.encode(), "comparison.json": to_strict_json(tree).encode()})
    print(text, end="")


@app.command()
def predict(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="DICOM folders, NIfTI, NRRD or MetaImage files.")
    ],
    out: Out,
    runs: RunNames = None,
    runs_file: RunsFile = None,
    store: StoreUri = STORE,
    series: Series = None,
    overrides: Overrides = None,
    probability: Annotated[bool, typer.Option("--probability", help="Write probability.nii.gz too.")] = False,
    dicom: Annotated[
        Path | None, typer.Option("--dicom", help="Folder for DICOM SEG and SR, which name the patient.")
    ] = None,
    no_post: NoPost = False,
) -> None:
    """Segment scans: OUT/<case id>/ gets report.html, nodules.nii.gz, mask.nii.gz and nodules.json.

    Several runs are one model, the mean of their probabilities, such as the folds of a cross-validation.
    With --dicom FOLDER, FOLDER/<case id>/ gets a Segmentation and a Structured Report, for archives.
    Scans that cannot be used are named, and the exit code is then 3, or 2 if there was no other.
    """
    from lungseg.config import Recipe, resegmented
    from lungseg.runs.ensemble import load_ensemble
    from lungseg.runs.run import load_run
    from lungseg.scan.identity import case_key
    from lungseg.segment.inputs import read_inputs, require_inputs
    from lungseg.segment.predict import segment_by_mean, working_grids
    from lungseg.storage import open_store
    from lungseg.telemetry import log, progress

    names, given = read_runs(runs or [], runs_file), overrides or []
    resegmented(Recipe(), given)  # what is wrong is told before the store is asked
    require_inputs(inputs)
    opened = open_store(store)
    for run in names:
        load_run(opened, run)
    key, refused, some_done = case_key(), Refused(), False
    results = _Results(out, dicom, key, probability)
    scans = read_inputs(inputs, key, series, results.accept, refused)
    first = next(scans, None)
    if first:
        ensemble = load_ensemble(opened, names, given, use_post=not no_post)
        networks: list[Asked] = []
        for one, volume in chain([first], scans):
            with ThreadPoolExecutor(1) as beside:  # the import of TensorFlow
                grids = beside.submit(working_grids, volume, [member.recipe for member in ensemble.members])
                networks = networks or _networks(opened, ensemble)
            with progress(one.case_id) as report:
                found = segment_by_mean(networks, volume, report, grids.result())
            for warning in found.warnings:
                log("predict").warning("%s: %s", one.title, warning)
            try:
                places = results.write(one, volume, found, ensemble)
            except DataError as error:
                refused(one.title, error)
            else:
                some_done = True
                print(f"{one.title}: {len(found.nodules)} nodules, {', '.join(map(str, places))}")
    refused.end(some_done)


def _networks(store: Store, ensemble: Ensemble) -> list[Asked]:
    from lungseg.telemetry import log, quiet_tensorflow

    if ensemble.post:
        log("predict").info(ensemble.post.describe())
    with quiet_tensorflow():
        from lungseg.runs.export import load_network

        return [(load_network(store, one).predict, one.recipe) for one in ensemble.members]


@app.command()
def follow(
    earlier: Annotated[Path, typer.Argument(help="What predict wrote of the earlier scan: OUT/<case id>.")],
    later: Annotated[Path, typer.Argument(help="The same of the later scan of this patient.")],
    days: Annotated[float, typer.Option("--days", help="Between both scans.")],
    pair: Annotated[
        list[str] | None, typer.Option("--pair", help="Labels of one nodule, EARLIER:LATER; else by place.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for follow.json.")] = None,
) -> None:
    """Show how nodules have changed between two scans: volume, and the days in which it doubles."""
    from lungseg.segment import follow as following
    from lungseg.segment.outputs.follow import as_table, write

    if days <= 0:
        raise ConfigError(
            "days-invalid", days=days, remedy="give the days from the earlier scan to the later"
        )
    pairs = [following.labels_of(text) for text in pair or []]
    both = following.read_result(earlier), following.read_result(later)
    rows, dice = following.follow(*both, days, pairs)
    print(as_table(rows, days, dice))
    if out:
        print(write(rows, days, dice, *both, out))


@dataclass
class _Results:
    """Where the results of each scan go; DICOM only if `dicom` names a folder for it."""

    out: Path
    dicom: Path | None
    key: bytes
    probability: bool
    sources: dict[str, list[Dataset]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dicom and self.dicom.resolve() == self.out.resolve():
            remedy = "give --dicom a folder of its own: what it holds names the patient"
            raise ConfigError("flags-contradict", folder=self.out, remedy=remedy)

    def accept(self, one: Input, volume: Volume) -> None:
        """Raises DataError for a scan whose results could not be written."""
        from lungseg.scan.identity import scan_id
        from lungseg.segment.outputs import nifti

        nifti.require_own(self.out / one.case_id, scan_id(volume, self.key))
        if self.dicom:
            from lungseg.segment.outputs import dicom

            self.sources[one.case_id] = dicom.read_source(one)
            dicom.require_own(self.dicom / one.case_id, self.sources[one.case_id])

    def write(self, one: Input, volume: Volume, found: Segmentation, model: Ensemble) -> list[Path]:
        """What was written, for the user to open."""
        from lungseg.scan.identity import scan_id
        from lungseg.segment.outputs import nifti

        folder, scan = self.out / one.case_id, scan_id(volume, self.key)
        named = {"run": model.name, "checkpoint": model.checkpoint}
        post = model.post.describe() if model.post else ""
        with_probability = self.probability
        nifti.write(
            found, folder, scan=scan, **named, post=post, volume=volume, with_probability=with_probability
        )
        if not self.dicom:
            return [folder / "nodules.nii.gz"]
        from lungseg.segment.outputs import dicom

        source = self.sources.pop(one.case_id)
        dicom.write(found, source, self.dicom / one.case_id, **named)
        return [folder / "nodules.nii.gz", self.dicom / one.case_id]
