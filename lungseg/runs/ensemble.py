"""Several runs as one model: the mean of what their published networks say. One run is the simplest case."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lungseg.config import SegmentConfig, resegmented
from lungseg.errors import ConfigError
from lungseg.runs.post import Post, recorded_post
from lungseg.runs.run import Published, load_published
from lungseg.storage import Store, keys

OF_EACH = ("window_zyx", "overlap", "batch", "mirror", "second_looks")
"""Settings of how a network is asked, which members may have different ones of."""
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Ensemble:
    """`members` are in the order of their runs' names, so that the order of a call means nothing. `post` is
    what `fit-post` recorded for them, if that is used."""

    members: tuple[Published, ...]
    post: Post | None = None

    @property
    def name(self) -> str:
        return ensemble_name([one.run for one in self.members])

    @property
    def root(self) -> str:
        return keys.model_root(self.name)

    @property
    def checkpoint(self) -> str:
        """As the name, of the members' checkpoints in the same order."""
        return _joined([one.checkpoint for one in self.members])

    @property
    def segment(self) -> SegmentConfig:
        """All but OF_EACH hold for every member."""
        return self.members[0].recipe.segment

    def resegmented(self, overrides: Sequence[str]) -> Ensemble:
        """With other settings of `segment`. Raises as `config.resegmented`; ConfigError("members-differ")."""
        members = tuple(replace(one, recipe=resegmented(one.recipe, overrides)) for one in self.members)
        _require_common(members)
        return replace(self, members=members)


def ensemble_name(runs: Sequence[str]) -> str:
    """A run's own, or those of all in order, joined by +."""
    return _joined(sorted(runs))


def _joined(names: Sequence[str]) -> str:
    """Too long for a file's name, a digest stands for them."""
    joined = "+".join(names)
    if len(joined) <= _LONGEST_NAME:
        return joined
    return f"{len(names)}+{hashlib.sha256(joined.encode()).hexdigest()[:16]}"


def load_ensemble(
    store: Store, runs: Sequence[str], overrides: Sequence[str] = (), use_post: bool = True
) -> Ensemble:
    """The published networks of `runs` with the settings of `segment` that `fit-post` recorded, if
    `use_post`, and then the `overrides`.

    Raises as `load_published`, `recorded_post` and `resegmented`; ConfigError("runs-repeated").
    """
    if len(set(runs)) < len(runs):
        raise ConfigError("runs-repeated", runs=", ".join(runs), remedy="name each run once")
    plain = Ensemble(tuple(load_published(store, run) for run in sorted(runs)))
    post = recorded_post(store, plain.root, plain.checkpoint, runs) if use_post else None
    return replace(plain, post=post).resegmented([*(post.overrides if post else ()), *overrides])


def _require_common(members: Sequence[Published]) -> None:
    first, *others = members
    for one in others:
        for name, value in first.recipe.segment:
            other = getattr(one.recipe.segment, name)
            if name not in OF_EACH and other != value:
                message = f"segment.{name} is {value} in {first.run}, {other} in {one.run}"
                remedy = f"say which: --set segment.{name}=…"
                raise ConfigError("members-differ", message=message, remedy=remedy)
