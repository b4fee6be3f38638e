"""Whether a data set that is there is the one that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lungseg.dataset.case import Case
from lungseg.dataset.cutting import digest
from lungseg.dataset.manifest import Manifest
from lungseg.errors import DataError
from lungseg.storage import Store, keys


def stamps_now(cases: Sequence[Case]) -> str:
    """What the files of all scans look like; "" where one cannot be reached, which its task will tell."""
    try:
        return digest({case.case_id: case.stamp() for case in cases})
    except DataError:
        return ""


def keep_stamps(store: Store, name: str, manifest_sha256: str, stamps: str) -> None:
    store.put_json(keys.data_stamps(name), {"manifest_sha256": manifest_sha256, "stamps": stamps})


def kept_stamps(store: Store, manifest: Manifest) -> str:
    """What they looked like when they were last found to be the data set's; "" if that is not known.

    It is no part of the manifest: the same scans copied elsewhere are the same data set.
    """
    key = keys.data_stamps(manifest.name)
    tree = store.get_json(key) if store.exists(key) else {}
    return str(tree["stamps"]) if tree.get("manifest_sha256") == manifest.sha256 else ""


def require_same_settings(manifest: Manifest, wanted: str, store: Store) -> None:
    """Raises DataError("data-exists")."""
    if manifest.fingerprint != wanted:
        raise _taken(manifest, "made from other scans or settings", store)


def require_same_scans(manifest: Manifest, now: Mapping[str, str], store: Store) -> None:
    """`now` are the digests of the scans by case id, without those that cannot be read. Raises
    DataError("data-exists")."""
    then = {case_id: facts.sha256 for case_id, facts in manifest.scans.items()}
    changed = sorted(case_id for case_id in now.keys() | then.keys() if now.get(case_id) != then.get(case_id))
    if changed:
        shown = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
        message = f"{len(changed)} of its scans or masks have changed since, or cannot be read: {shown}"
        raise _taken(manifest, message, store)


def _taken(manifest: Manifest, message: str, store: Store) -> DataError:
    remedy = "choose another --data name, or delete the old data set"
    return DataError("data-exists", data=manifest.name, store=store.uri, message=message, remedy=remedy)
