"""What `lungseg fit-post` chose for a model on val: settings of how its probabilities become nodules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lungseg.errors import RunError
from lungseg.storage import Store, keys
from lungseg.telemetry import log

FORMAT = 1


@dataclass(frozen=True)
class Post:
    """`settings` are those of `segment` by name. `case_ids` are the scans of val: nobody may say that the
    model was tested on them. `ranking` and `masks` hold what was tried for candidates, by the rule `by`, and
    for the threshold, by F2: the chosen value, the best one, its standard error, and one row for each."""

    model: str
    checkpoint: str
    software: str
    created_utc: str
    by: str
    settings: dict[str, Any]
    patients: int
    case_ids: tuple[str, ...]
    ranking: dict[str, Any]
    masks: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The settings as `--set` takes them."""
        return [f"segment.{name}={json.dumps(value)}" for name, value in self.settings.items()]

    def describe(self) -> str:
        chosen = ", ".join(self.overrides)
        return f"Settings that fit-post chose on val, {self.created_utc}, by {self.by}: {chosen}"


def record_post(store: Store, root: str, post: Post) -> str:
    """The key. What was chosen before for this checkpoint is replaced."""
    key = keys.post(root, post.checkpoint)
    store.put_json(key, {"format": FORMAT, **asdict(post)})
    return key


def recorded_post(store: Store, root: str, checkpoint: str, runs: Sequence[str]) -> Post | None:
    """What was chosen for this checkpoint of these runs; of another one's the log tells.

    Raises RunError("post-format").
    """
    key = keys.post(root, checkpoint)
    there = [item.key for item in store.find(keys.posts(root))]
    again = f"run `{' '.join(['lungseg fit-post', *(f'--run {run}' for run in runs)])}`"
    if key not in there:
        if there:
            log("post").warning(
                "the settings of fit-post are not used: another checkpoint's. %s again", again
            )
        return None
    tree = store.get_json(key)
    if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
        raise RunError("post-format", key=key, remedy=f"{again} with this version, or give --no-post")
    return Post(**{**tree, "case_ids": tuple(tree["case_ids"])})
