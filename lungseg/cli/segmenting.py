"""The verbs that use networks: evaluate, predict."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lungseg.cli.app import app
from lungseg.cli.ends import Refused
from lungseg.cli.options import STORE, Out, Overrides, RunName, Series, StoreUri

if TYPE_CHECKING:
    from lungseg.scan.volume import Volume


@app.command()
def evaluate(
    run: RunName,
    out: Out,
    store: StoreUri = STORE,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    overrides: Overrides = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Score a mere threshold of HU beside the network.")
    ] = False,
) -> None:
    """Score the best checkpoint on whole held-out scans; --set takes settings of segment.

    Probabilities are kept in the store: other thresholds need no network. A scan that cannot be used is
    named, and the exit code is then 3.
    """
    from dataclasses import replace

    from lungseg.config import resegmented
    from lungseg.evaluate.protocol import Network, evaluate_split
    from lungseg.runs.run import load_published, load_run_data
    from lungseg.storage import open_store
    from lungseg.telemetry import progress

    opened, refused = open_store(store), Refused()
    manifest = load_run_data(opened, run)
    manifest.require_held_out(split)
    model = load_published(opened, run)
    model = replace(model, recipe=resegmented(model.recipe, overrides or []))
    network = Network(opened, model)
    with progress("scans") as report:
        result = evaluate_split(opened, manifest, model, network, split, out, report, refused, baseline)
    print(result.text.read_text(encoding="utf-8"), end="")
    print(f"{result.text}\n{result.json}\n{store.rstrip('/')}/{result.key}")
    refused.end(some_done=True)


@app.command()
def predict(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="DICOM folders, NIfTI, NRRD or MetaImage files.")
    ],
    run: RunName,
    out: Out,
    store: StoreUri = STORE,
    series: Series = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="segment.field=value.")] = None,
    probability: Annotated[bool, typer.Option("--probability", help="Write probability.nii.gz too.")] = False,
) -> None:
    """Segment scans: writes OUT/<case id>/nodules.nii.gz, mask.nii.gz and nodules.json of each.

    Scans that cannot be used are named, and the exit code is then 3, or 2 if there was no other.
    """
    from lungseg.config import Recipe, resegmented
    from lungseg.runs.run import load_run
    from lungseg.scan.identity import case_key, scan_id
    from lungseg.segment.inputs import Input, read_inputs, require_inputs
    from lungseg.segment.outputs.nifti import require_own, write
    from lungseg.segment.predict import segment
    from lungseg.storage import open_store
    from lungseg.telemetry import log, progress, quiet_tensorflow

    resegmented(Recipe(), overrides or [])  # what is wrong is told before TensorFlow takes its seconds
    require_inputs(inputs)
    opened = open_store(store)
    load_run(opened, run)
    key, refused = case_key(), Refused()

    def accept(one: Input, volume: Volume) -> None:
        require_own(out / one.case_id, scan_id(volume, key))

    scans = read_inputs(inputs, key, series, accept, refused)
    first = next(scans, None)
    if first:
        with quiet_tensorflow():
            from lungseg.runs.export import load_best

            best = load_best(opened, run)
        recipe = resegmented(best.recipe, overrides or [])
        for one, volume in chain([first], scans):
            with progress(one.case_id) as report:
                found = segment(best.predict, volume, recipe, report)
            for warning in found.warnings:
                log("predict").warning("%s: %s", one.title, warning)
            folder = out / one.case_id
            write(
                found,
                folder,
                scan=scan_id(volume, key),
                run=run,
                checkpoint=best.checkpoint,
                with_probability=probability,
            )
            print(f"{one.title}: {len(found.nodules)} nodules, {folder / 'nodules.nii.gz'}")
    refused.end(some_done=first is not None)
