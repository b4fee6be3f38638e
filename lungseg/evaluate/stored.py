"""Evaluations that lie in the store, for those who compare runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lungseg.errors import DataError
from lungseg.evaluate.bootstrap import Statistic
from lungseg.evaluate.records import from_record
from lungseg.evaluate.report import SCHEMA_VERSION
from lungseg.storage import Store, keys

READABLE = (2, SCHEMA_VERSION)
"""Versions that hold what is compared."""


@dataclass(frozen=True)
class StoredEvaluation:
    """`case_ids` and `patients` are those of the scans that were scored, in the order of all that `record`
    holds of them."""

    run: str
    checkpoint: str
    created_utc: str
    data: str
    manifest_sha256: str
    split: str
    case_ids: tuple[str, ...]
    patients: tuple[str, ...]
    record: Mapping[str, Any]

    def figures(self) -> dict[str, Statistic]:
        return from_record(self.record)


def newest_evaluation(store: Store, run: str, split: str) -> StoredEvaluation:
    """Of whichever checkpoint; `run` may name an ensemble.

    Raises DataError("evaluation-missing" or "evaluation-format").
    """
    root = keys.model_root(run)
    found = [
        (name, item.key)
        for item in store.find(keys.evaluations(root))
        if (name := keys.report_of_split(root, item.key, split))
    ]
    flags = " ".join(f"--run {name}" for name in run.split("+"))
    again = f"run `lungseg evaluate {flags} --split {split}`"
    if not found:
        raise DataError("evaluation-missing", run=run, split=split, remedy=again)
    _, key = max(found)
    tree = store.get_json(key)
    if not isinstance(tree, dict) or tree.get("schema_version") not in READABLE:
        raise DataError("evaluation-format", key=key, remedy=f"{again} with this version")
    names = ("run", "checkpoint", "created_utc", "data", "manifest_sha256", "split")
    return StoredEvaluation(
        **{name: tree[name] for name in names},
        case_ids=tuple(case["case_id"] for case in tree["cases"]),
        patients=tuple(str(case["patient"]) for case in tree["cases"]),
        record=tree["record"],
    )


def require_same_scans(evaluations: Sequence[StoredEvaluation]) -> None:
    """Raises DataError("evaluations-differ"), with the run and what differs from the first."""
    first, *others = evaluations
    for one in others:
        for name in ("manifest_sha256", "case_ids"):
            if getattr(one, name) != getattr(first, name):
                what = "data set" if name == "manifest_sha256" else "scans that could be used"
                remedy = "evaluate both on the same data set, with all of its scans"
                raise DataError("evaluations-differ", message=what, a=first.run, b=one.run, remedy=remedy)
