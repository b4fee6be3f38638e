"""Which patches lie in which record batch of which shard: pure, and the same for ever."""

from __future__ import annotations

from collections.abc import Sequence

from lungseg.dataset.shuffle import permutation

Place = tuple[str, int]
"""A patch by its case id and its number there."""


def plan_shards(
    rows: Sequence[tuple[str, int, bool]],
    rows_per_batch: int,
    batches_per_shard: int,
    seed: int,
    positive_share: float | None = None,
) -> list[list[list[Place]]]:
    """Shards of record batches of (case id, row), from all (case id, row, is positive).

    Both strata are shuffled over all scans and dealt out evenly, so that every run of n rows holds its
    share of positives to within one. With a `positive_share` the stratum of which there is too little is
    repeated, in whole rounds but for the last one, until positives are that share of all; where there is none
    of either, nothing is.
    """
    chosen: dict[bool, list[Place]] = {True: [], False: []}
    for case, row, positive in sorted(rows):
        chosen[positive].append((case, row))
    counts = {positive: len(items) for positive, items in chosen.items()}
    if positive_share and all(counts.values()):
        counts = _repeated(counts[True], counts[False], positive_share)
    for positive, items in chosen.items():
        chosen[positive] = _shuffled(items, counts[positive], seed, positive)
    total, positives = sum(counts.values()), counts[True]
    mixed = []
    for k in range(total):
        # Bresenham's line: the running count of positives is floor(k * share) throughout.
        mixed.append(chosen[(k + 1) * positives // total > k * positives // total].pop())
    batches = [mixed[i : i + rows_per_batch] for i in range(0, total, rows_per_batch)]
    return [batches[i : i + batches_per_shard] for i in range(0, len(batches), batches_per_shard)]


def _repeated(positives: int, negatives: int, share: float) -> dict[bool, int]:
    """How many rows there are of either stratum, of which one is as it was."""
    return {
        True: max(positives, round(negatives * share / (1 - share))),
        False: max(negatives, round(positives * (1 - share) / share)),
    }


def _shuffled(items: list[Place], count: int, seed: int, positive: bool) -> list[Place]:
    """`count` of them, each round of all in an order of its own."""
    rounds = range(-(-count // len(items)) if items else 0)
    return [items[i] for one in rounds for i in permutation(len(items), seed, 2 * one + positive)][:count]
