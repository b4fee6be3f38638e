"""The verbs that use networks: evaluate, predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lungseg.cli.app import app
from lungseg.cli.options import (
    STORE,
    Out,
    RunName,
    StoreUri,
)

if TYPE_CHECKING:
    pass


@app.command()
def evaluate(
    run: RunName,
    out: Out,
    store: StoreUri = STORE,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
) -> None:
    """Score the best checkpoint on whole held-out scans."""
    from lungseg.runs.run import load_run_data
    from lungseg.storage import open_store
    from lungseg.telemetry import progress, quiet_tensorflow

    opened = open_store(store)
    manifest = load_run_data(opened, run)
    manifest.held_out(split)  # a wrong split is told before TensorFlow takes its seconds
    with quiet_tensorflow():
        from lungseg.evaluate.protocol import evaluate_split
        from lungseg.runs.export import load_best

        best = load_best(opened, run)
    with progress("scans") as report:
        result = evaluate_split(opened, manifest, best, split, out, report)
    print(result.text.read_text(encoding="utf-8"), end="")
    print(f"{result.text}\n{result.json}")


@app.command()
def predict(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="DICOM folders, NIfTI or NRRD files.")
    ],
    run: RunName,
    out: Out,
    store: StoreUri = STORE,
) -> None:
    """Segment scans: writes OUT/<case id>/mask.nii.gz and nodules.json."""
    from lungseg.runs.run import load_run
    from lungseg.segment.inputs import case_ids, read_input
    from lungseg.segment.outputs.nifti import write
    from lungseg.segment.predict import segment
    from lungseg.storage import open_store
    from lungseg.telemetry import progress, quiet_tensorflow

    names = case_ids(inputs)
    opened = open_store(store)
    load_run(opened, run)
    first = read_input(inputs[0])  # a wrong input is told before TensorFlow takes its seconds
    with quiet_tensorflow():
        from lungseg.runs.export import load_best

        best = load_best(opened, run)
    for number, (path, name) in enumerate(zip(inputs, names, strict=True)):
        volume = read_input(path) if number else first
        with progress(name) as report:
            found = segment(best.predict, volume, best.recipe, report)
        write(found, out / name, run=run, checkpoint=best.checkpoint)
        print(f"{path}: {len(found.nodules)} nodules, {out / name / 'mask.nii.gz'}")
