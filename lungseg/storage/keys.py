"""Every key of the store. Nobody else writes one down, so that this page is the store's layout.

Below the root URI lie data sets under `data/NAME/`, what `prepare` keeps of each scan under `scans/`, and
runs under `runs/NAME/`. A trial of a sweep is a run of its own, below its sweep: both have a `root`, which
the functions on runs take. What is said of several runs as one model lies under `ensembles/A+B/`.
"""

from __future__ import annotations

DATA, RUNS = "data/", "runs/"
SCANS = "scans/"
_ENSEMBLES = "ensembles/"
_TRIALS = "/trials/"


def data_root(data: str) -> str:
    return f"{DATA}{data}"


def data_manifest(data: str) -> str:
    """Written last: what it does not name is no part of the data set."""
    return f"{data_root(data)}/manifest.json"


def data_stamps(data: str) -> str:
    """What the scans' files looked like when they were last found to be those of the data set."""
    return f"{data_root(data)}/stamps.json"


def card(data: str, kind: str) -> str:
    return f"{data_root(data)}/card.{kind}"


def shard(data: str, stem: str) -> str:
    return f"{data_root(data)}/shards/{stem}.arrow"


def held_out(data: str, split: str, stem: str) -> str:
    """A whole scan of val or test."""
    return f"{data_root(data)}/volumes/{split}/{stem}.arrow"


def data_work(data: str, stem: str) -> str:
    """What an unfinished `prepare` has committed; swept away once the manifest is there."""
    return f"{data_root(data)}/work/{stem}.json"


def data_shard_work(data: str, stem: str) -> str:
    return data_work(data, f"shards/{stem}")


def data_swept(data: str) -> list[str]:
    """Prefixes below which everything goes that the manifest does not name."""
    return [f"{data_root(data)}/{folder}/" for folder in ("work", "shards", "volumes")]


def kept_patches(stem: str) -> str:
    """A scan's patches, kept so that other data sets of the same scan need not read it."""
    return f"{SCANS}{stem}.arrow"


def kept(stem: str) -> str:
    return f"{SCANS}{stem}.json"


def kept_held_out(stem: str) -> str:
    return f"{SCANS}{stem}-volume.json"


def run_root(run: str) -> str:
    return f"{RUNS}{run}"


def model_root(name: str) -> str:
    """Of one run, or of several whose names are joined by +, which no name of a run has."""
    return f"{_ENSEMBLES}{name}" if "+" in name else run_root(name)


def trial_root(root: str, trial: str) -> str:
    return f"{root}{_TRIALS}{trial}"


def scan_seconds(root: str) -> str:
    """How long the network of a trial takes for a scan."""
    return f"{root}/scan-seconds.json"


def run_and_trial(root: str) -> tuple[str, str]:
    """The names in a root; the trial's is empty for a run."""
    run, _, trial = root.removeprefix(RUNS).partition(_TRIALS)
    return run, trial


def run(root: str) -> str:
    return f"{root}/run.json"


def metrics(root: str) -> str:
    return f"{root}/metrics.jsonl"


def submitted(root: str, digest: str) -> str:
    """A recipe with which `lungseg submit` started a job for this run or data set."""
    return f"{root}/submitted-{digest}.json"


def progress(root: str) -> str:
    return f"{root}/progress.json"


def log(root: str) -> str:
    return f"{root}/log.txt"


def events(root: str, attempt: str, file: str) -> str:
    return f"{root}/tensorboard/{attempt}/{file}"


def sweep_journal(root: str) -> str:
    """Optuna's, which `optuna-dashboard` reads."""
    return f"{root}/optuna-journal.jsonl"


def trials(root: str) -> str:
    return f"{root}/trials.jsonl"


def sweep_page(root: str) -> str:
    return f"{root}/sweep.html"


def best_recipe(root: str) -> str:
    """Of the best trial of a sweep, as `train --recipe` takes it."""
    return f"{root}/best.yaml"


def best(root: str) -> str:
    return f"{root}/best.json"


def best_model(root: str) -> str:
    """Stable, so that a plain S3 client can pull it."""
    return f"{root}/best/model.keras"


def posts(root: str) -> str:
    return f"{root}/post/"


def post(root: str, checkpoint: str) -> str:
    """The settings that `lungseg fit-post` chose for a checkpoint, or for those of an ensemble."""
    return f"{posts(root)}{checkpoint}.json"


def evaluations(root: str) -> str:
    return f"{root}/evaluations/"


def evaluation(root: str, subject: str, file: str = "") -> str:
    """A file of a report on `subject`, a checkpoint and a split; without one the prefix of them all."""
    return f"{evaluations(root)}{subject}/{file}"


def report_of_split(root: str, key: str, split: str) -> str | None:
    """The name of the JSON report under `key`, which holds its time, if it is one on that split."""
    subject, _, file = key.removeprefix(evaluations(root)).partition("/")
    is_report = file.startswith("evaluation-") and file.endswith(".json") and "/" not in file
    return file if is_report and subject.endswith(f"-{split}") else None


def probabilities(root: str, subject: str, stem: str) -> str:
    """What the network said of a held-out scan, kept so that other thresholds need no network. The key is a
    prefix: the digest of the content follows."""
    return evaluation(root, subject, f"probabilities/{stem}-")


def claims(root: str) -> str:
    return f"{root}/claims/"


def claim(root: str, number: int) -> str:
    return f"{claims(root)}{number:06d}.json"


def checkpoints(root: str) -> str:
    return f"{root}/checkpoints/"


def checkpoint(root: str, name: str, file: str = "") -> str:
    """A file of a checkpoint; without one the prefix of them all."""
    return f"{checkpoints(root)}{name}/{file}"


def checkpoint_manifest(root: str, name: str) -> str:
    """Written last, if absent: it commits the checkpoint."""
    return checkpoint(root, name, "manifest.json")


def checkpoint_of(root: str, key: str) -> str | None:
    """The checkpoint whose manifest lies under `key`, if one does."""
    name, _, file = key.removeprefix(checkpoints(root)).partition("/")
    return name if file == "manifest.json" else None


def doctor(token: str) -> str:
    """An object that `lungseg doctor` writes and deletes."""
    return f"doctor-{token}"
