"""Which patient is trained on, which chooses the best epoch, and which only the evaluation sees.

A split is a function of the patient, never of the scan, so that no patient can be in two. By default it is a
function of the patient alone: a seeded hash, a number from 0 to 1, falls below a bound or not. So scans that
are added later move nobody; shares hold on average. Where a split that was asked for would have no patient at
all, as happens with a handful, a patient of a split that has more stands in, a training one if there is.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lungseg.config import SplitConfig
from lungseg.errors import DataError

SPLITS = ("train", "val", "test")


def assign_splits(
    cases: Iterable[tuple[str, str]], config: SplitConfig, table: Mapping[str, str] | None = None
) -> dict[str, str]:
    """case id -> split, from (case id, patient id); by `table` (patient -> split) where there is one.

    Raises DataError("split-incomplete") for a patient that the table lacks.
    """
    cases = list(cases)
    patients = sorted({patient for _, patient in cases})
    chosen = _hashed(patients, config) if table is None else _looked_up(patients, table)
    return {case: chosen[patient] for case, patient in cases}


def own_split(patient: str, config: SplitConfig) -> str:
    """The split of a patient, whoever else there is."""
    number = _number(patient, config)
    if config.folds:
        if int(number * config.folds) == config.fold:
            return "test"
        # A number of its own, or the fold before would be the validation of all.
        return "val" if _number(patient, config, "val") < config.val else "train"
    return "test" if number < config.test else "val" if number < config.test + config.val else "train"


def read_table(file: Path) -> dict[str, str]:
    """patient -> split, from a CSV with the columns patient,split or a JSON object.

    Raises DataError("split-invalid").
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            rows = json.loads(text, object_pairs_hook=list)
        else:
            rows = [(row["patient"], row["split"]) for row in csv.DictReader(text.splitlines())]
        table = {str(patient).strip(): split.strip() for patient, split in rows}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise _invalid(file) from error
    if len(table) < len(rows) or not set(table.values()) <= set(SPLITS):
        raise _invalid(file)
    return table


def _invalid(file: Path) -> DataError:
    remedy = f"write each patient once with one of {', '.join(SPLITS)}: CSV (patient,split) or a JSON object"
    return DataError("split-invalid", file=file, remedy=remedy)


def _looked_up(patients: Sequence[str], table: Mapping[str, str]) -> dict[str, str]:
    missing = [patient for patient in patients if patient not in table]
    if missing:
        message = f"{len(missing)} of {len(patients)} patients are not in it"
        remedy = "add a row for each to data.split.file"
        raise DataError("split-incomplete", message=message, first=missing[0], remedy=remedy)
    return {patient: table[patient] for patient in patients}


def _hashed(patients: Sequence[str], config: SplitConfig) -> dict[str, str]:
    ranked = sorted(patients, key=lambda patient: _number(patient, config))
    split = {patient: own_split(patient, config) for patient in ranked}
    wanted = {"train": True, "test": config.test > 0 or bool(config.folds), "val": config.val > 0}
    for name in (name for name, asked in wanted.items() if asked and name not in split.values()):
        count = Counter(split.values())
        spare = [patient for patient in ranked if count[split[patient]] > 1]
        if name == "train" and not spare:
            spare = ranked  # of one or two patients, one is trained on
        stand_in = sorted(spare, key=lambda patient: split[patient] != "train")[:1]
        split |= dict.fromkeys(stand_in, name)
    return split


def _number(patient: str, config: SplitConfig, purpose: str = "") -> float:
    text = json.dumps([config.seed, purpose, patient]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
