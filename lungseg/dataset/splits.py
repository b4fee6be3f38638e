"""Which patient is trained on, which chooses the best epoch, and which only the evaluation sees.

A split is a function of the patient, never of the scan, so that no patient can be in two. By default it is a
function of the patient alone: a seeded hash, a number from 0 to 1, falls below a bound or not. So scans that
are added later move nobody; shares hold on average. Where a split that was asked for would have no patient at
all, as happens with a handful, a patient of a split that has more stands in, a training one if there is.

Over all folds each patient is tested once. Where the hash leaves a fold empty, patients are dealt out to
folds in the order of their hashes instead. Only patients who are not tested stand in for others.
"""

from __future__ import annotations

import csv
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lungseg.config import SplitConfig
from lungseg.errors import DataError

SPLITS = ("train", "val", "test")


def assign_splits(
    cases: Iterable[tuple[str, str]], config: SplitConfig, table: Mapping[str, str] | None = None
) -> dict[str, str]:
    """case id -> split, from (case id, patient id); by the `table` of `read_table` where there is one.

    Raises DataError("split-incomplete") for a patient that the table lacks, DataError("folds-too-many").
    """
    cases = list(cases)
    patients = sorted({patient for _, patient in cases})
    chosen = _hashed(patients, config) if table is None else _looked_up(patients, table)
    return {case: chosen[patient] for case, patient in cases}


def describe_split(cases: Sequence[tuple[str, str]], split_of: Mapping[str, str], patients_by: str) -> str:
    """Who is held to be who, and where: for people, before a scan is read. A mistake costs the data set."""
    split_of_patient = {patient: split_of[case] for case, patient in cases}
    count = Counter(split_of_patient.values())
    where = ", ".join(f"{count[split]} {split}" for split in SPLITS)
    numbers = (("scan", len(cases)), ("patient", len(split_of_patient)))
    scans, patients = (f"{number} {word}{'s' * (number != 1)}" for word, number in numbers)
    return f"{scans} of {patients} ({where}), {patients_by}"


def own_split(patient: str, config: SplitConfig) -> str:
    """The split of a patient, whoever else there is."""
    number = _number(patient, config)
    if config.folds:
        return _in_fold(patient, int(number * config.folds), config)
    return "test" if number < config.test else "val" if number < config.test + config.val else "train"


def read_table(file: Path) -> dict[str, str]:
    """patient, as `spelled`, -> split, from a CSV with the columns patient,split or a JSON object.

    Raises DataError("split-invalid").
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            rows = json.loads(text, object_pairs_hook=list)
        else:
            rows = csv_rows(text, ("patient", "split"))
        table = {spelled(str(patient)): split.strip().lower() for patient, split in rows}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise _invalid(file) from error
    if len(table) < len(rows) or not set(table.values()) <= set(SPLITS):
        raise _invalid(file)
    return table


def csv_rows(text: str, columns: tuple[str, str]) -> list[tuple[str, str]]:
    """Two columns of a CSV with a header, without the spaces around cells; empty rows are left out.

    Spreadsheets of many countries write semicolons. Raises ValueError or LookupError if a column or a cell
    is missing.
    """
    lines = text.splitlines()
    semicolons = bool(lines) and ";" in lines[0] and "," not in lines[0]
    reader = csv.reader(lines, delimiter=";" if semicolons else ",", skipinitialspace=True)
    header, *rows = [[cell.strip() for cell in row] for row in reader if any(map(str.strip, row))] or [[]]
    first, second = (list(map(str.lower, header)).index(column) for column in columns)
    found = [(row[first], row[second]) for row in rows]
    if not all(one and other for one, other in found):
        raise LookupError("an empty cell")
    return found


def spelled(patient: str) -> str:
    """A patient as tables are compared: in any case, any spaces, and any way to write an accent."""
    return " ".join(unicodedata.normalize("NFC", patient).casefold().split())


def _invalid(file: Path) -> DataError:
    remedy = f"write each patient once with one of {', '.join(SPLITS)}: CSV (patient,split) or a JSON object"
    return DataError("split-invalid", file=file, remedy=remedy)


def _looked_up(patients: Sequence[str], table: Mapping[str, str]) -> dict[str, str]:
    missing = [patient for patient in patients if spelled(patient) not in table]
    if missing:
        message = f"{len(missing)} of {len(patients)} patients are not in it"
        remedy = "add a row for each to data.split.file"
        raise DataError("split-incomplete", message=message, first=missing[0], remedy=remedy)
    return {patient: table[spelled(patient)] for patient in patients}


def _in_fold(patient: str, own_fold: int, config: SplitConfig) -> str:
    if own_fold == config.fold:
        return "test"
    # A number of its own, or the fold before would be the validation of all.
    return "val" if _number(patient, config, "val") < config.val else "train"


def _folds(ranked: Sequence[str], config: SplitConfig, folds: int) -> dict[str, str]:
    if len(ranked) < folds:
        fewer = f", or set data.split.folds to at most {len(ranked)}" if len(ranked) > 1 else ""
        remedy = f"prepare scans of more patients{fewer}"
        raise DataError("folds-too-many", folds=folds, patients=len(ranked), remedy=remedy)
    fold_of = {patient: int(_number(patient, config) * folds) for patient in ranked}
    if len(set(fold_of.values())) < folds:
        fold_of = {patient: rank * folds // len(ranked) for rank, patient in enumerate(ranked)}
    return {patient: _in_fold(patient, fold, config) for patient, fold in fold_of.items()}


def _hashed(patients: Sequence[str], config: SplitConfig) -> dict[str, str]:
    ranked = sorted(patients, key=lambda patient: _number(patient, config))
    if config.folds:
        split = _folds(ranked, config, config.folds)
        ranked = [patient for patient in ranked if split[patient] != "test"]
    else:
        split = {patient: own_split(patient, config) for patient in ranked}
    wanted = {"train": True, "test": config.test > 0 and not config.folds, "val": config.val > 0}
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
