"""The order of patches: one sequence of global batches, whatever the number of workers and the restarts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.dataset.plan import plan_shards
from lungseg.dataset.shuffle import permutation
from lungseg.errors import ConfigError, DataError
from lungseg.stream.order import RowSlice, evaluation_batches, pass_order, steps_per_pass, training_batches

Row = tuple[int, int]
row_counts = st.lists(st.integers(1, 7), min_size=1, max_size=20)
global_batches = st.sampled_from([1, 2, 3, 4, 6, 8, 12])


def flat(slices: list[RowSlice]) -> list[Row]:
    """(record batch, row) of every row; a slice must not be empty."""
    assert all(one.start < one.stop for one in slices)
    return [(one.record_batch, row) for one in slices for row in range(one.start, one.stop)]


def joined(lists: Iterable[list[Row]]) -> list[Row]:
    return list(chain.from_iterable(lists))


def every(rows: list[int]) -> list[Row]:
    return [(number, row) for number, count in enumerate(rows) for row in range(count)]


def taken(rows: list[int], count: int, **arguments: Any) -> list[list[Row]]:
    return [flat(batch) for batch in islice(training_batches(rows, **arguments), count)]


@dataclass(frozen=True)
class Split:
    """Row counts with at least one global batch of rows, how many of each are positive, and extents."""

    rows: list[int]
    global_batch: int
    positives: list[int]
    extents: list[int]

    @property
    def order(self) -> dict[str, Any]:
        return {"global_batch": self.global_batch, "positives": self.positives, "extents": self.extents}


@st.composite
def splits(draw: st.DrawFn) -> Split:
    global_batch = draw(global_batches)
    rows = draw(row_counts.filter(lambda counts: sum(counts) >= global_batch))
    positives = [draw(st.integers(0, count)) for count in rows]
    begins = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    return Split(rows, global_batch, positives, np.cumsum(begins).tolist())


def prepared(patches: int, share: float, per_batch: int, per_extent: int, global_batch: int) -> Split:
    """As `prepare` lays a share of positives out."""
    positive = [number < round(share * patches) for number in range(patches)]
    rows = [("c", number, is_positive) for number, is_positive in enumerate(positive)]
    batches = [batch for shard in plan_shards(rows, per_batch, 10**6, 0) for batch in shard]
    counts = [sum(positive[number] for _, number in batch) for batch in batches]
    extents = [number // per_extent for number in range(len(batches))]
    return Split([len(batch) for batch in batches], global_batch, counts, extents)


@given(splits(), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_the_ranks_shares_make_the_same_global_batches_at_every_world_size(split, seed):
    count = 3 * steps_per_pass(split.rows, split.global_batch) + 4
    alone = taken(split.rows, count, seed=seed, **split.order)
    for world_size in (w for w in range(1, split.global_batch + 1) if split.global_batch % w == 0):
        share = {"seed": seed, "world_size": world_size, **split.order}
        ranks = [taken(split.rows, count, rank=rank, **share) for rank in range(world_size)]
        assert {len(batch) for rank in ranks for batch in rank} == {split.global_batch // world_size}
        assert [joined(shares) for shares in zip(*ranks, strict=True)] == alone


@given(splits(), st.integers(0, 50))
@settings(deadline=None)
def test_a_resumed_run_sees_exactly_the_rest(split, first_step):
    whole = taken(split.rows, first_step + 5, seed=3, **split.order)
    assert taken(split.rows, 5, seed=3, first_step=first_step, **split.order) == whole[first_step:]


@given(splits(), st.integers(0, 1000))
@settings(deadline=None)
def test_every_pass_visits_every_record_batch_once_and_whole_across_incomplete_batches(split, seed):
    """Batches are cut from passes without a gap, so the one that a pass cannot fill is filled by the next."""
    rows, total = split.rows, sum(split.rows)
    batches = taken(rows, -(-3 * total // split.global_batch), seed=seed, **split.order)
    assert {len(batch) for batch in batches} == {split.global_batch}
    flow = joined(batches)
    for start in range(0, 3 * total, total):
        one_pass = flow[start : start + total]
        assert sorted(one_pass) == every(rows)
        visits = [number for number, row in one_pass if row == 0]
        assert len(visits) == len(rows)
        assert one_pass == [(number, row) for number in visits for row in range(rows[number])]


def test_passes_and_seeds_differ_and_a_row_is_in_a_batch_twice_only_where_two_passes_meet():
    rows = [2] * 10
    batches = taken(rows, 400, seed=1, global_batch=3)  # 60 passes of 20 rows
    flow = joined(batches)
    passes = [tuple(flow[start : start + 20]) for start in range(0, 1200, 20)]
    assert len(set(passes)) == 60
    assert passes[0] != tuple(joined(taken(rows, 7, seed=2, global_batch=3))[:20])
    repeated = [step for step, batch in enumerate(batches) if len(set(batch)) < 3]
    assert repeated
    assert all(step * 3 // 20 < (step * 3 + 2) // 20 for step in repeated)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_each_rank_fetches_an_extent_once_a_pass_and_all_ranks_together_no_more(world_size):
    """Of extents of 4 record batches of 2 patches: 12 windows of 8 lanes for a global batch of 16."""
    split = prepared(12 * 8 * 8, 0.3, 2, 4, 16)
    steps = steps_per_pass(split.rows, 16)
    fetched = []
    for rank in range(world_size):
        batches = training_batches(split.rows, seed=5, rank=rank, world_size=world_size, **split.order)
        visits = [split.extents[piece.record_batch] for batch in islice(batches, steps) for piece in batch]
        last = {extent: position for position, extent in enumerate(visits)}
        first = {extent: visits.index(extent) for extent in last}
        # All that is wanted of an extent is wanted within one window: 4 steps of this rank's lanes.
        assert all(last[extent] - first[extent] < 4 * 8 // world_size for extent in last)
        fetched += list(last)
    assert sorted(fetched) == sorted(set(split.extents))


def test_patches_that_share_an_extent_or_a_batch_meet_others_in_the_next_pass():
    split = prepared(64 * 8, 0.3, 2, 4, 8)
    steps = steps_per_pass(split.rows, 8)
    batches = [{number for number, _ in one} for one in taken(split.rows, 2 * steps, seed=1, **split.order)]
    together = [
        {frozenset(pair) for b in half for pair in combinations(b, 2)}
        for half in (batches[:steps], batches[steps:])
    ]
    assert all(len({split.extents[number] for number in batch}) == 4 for batch in batches)
    assert len(together[0] & together[1]) < 0.05 * len(together[0])


@given(
    st.integers(8, 300), st.floats(0, 1), st.integers(1, 4), st.integers(1, 6),
    st.sampled_from([4, 8, 16]), st.integers(0, 999),
)  # fmt: skip
@settings(deadline=None)
def test_each_global_batch_has_its_share_of_positives(
    patches, share, per_batch, per_extent, global_batch, seed
):
    """A record batch of `prepare` has the share of positives that all have, rounded down or up, and so has a
    global batch: it cannot be farther off than its record batches together, of which two may be cut."""
    split = prepared(patches, share, per_batch, per_extent, global_batch)
    if patches < global_batch:
        return
    fair = global_batch * sum(split.positives) / patches
    for batch in taken(split.rows, 60, seed=seed, **split.order):
        found = sum(row < split.positives[number] for number, row in batch)  # any rows will do for a count
        assert abs(found - fair) <= global_batch // per_batch + 2 * per_batch


@pytest.mark.parametrize(
    ("share", "per_batch", "per_extent", "global_batch", "allowed"),
    [(0.26, 2, 4, 4, 1), (0.26, 2, 4, 8, 1.1), (0.1, 2, 4, 16, 0.7), (0.26, 4, 4, 16, 1),
     (0.26, 2, 4, 64, 3.5), (0.33, 2, 1, 8, 0.7), (0.7, 2, 8, 16, 2)],
)  # fmt: skip
def test_positives_are_spread_far_more_evenly_than_by_chance(
    share, per_batch, per_extent, global_batch, allowed
):
    split = prepared(8000, share, per_batch, per_extent, global_batch)
    steps = steps_per_pass(split.rows, global_batch)
    counts = np.array(
        [
            sum(split.positives[piece.record_batch] for piece in batch)
            for batch in islice(training_batches(split.rows, seed=1, **split.order), 4 * steps)
        ]
    )
    fair = global_batch * share
    assert np.mean(np.abs(counts - fair) > allowed) < 0.03
    assert counts.std() < 0.5 * math.sqrt(fair * (1 - share))  # of independent draws, the binomial's


def test_within_a_class_the_shuffle_is_uniform():
    """Where record batch 0 of 6 alike comes: chi-square over 3,000 passes, 5 degrees of freedom, 0.1 %."""
    orders = (pass_order([1] * 6, [1] * 6, None, 2, 7, number) for number in range(3000))
    places = Counter(order.tolist().index(0) for order in orders)
    assert sum((places[place] - 500) ** 2 / 500 for place in range(6)) < 20.5


@given(splits() | st.just(Split([], 4, [], [])))
@settings(deadline=None)
def test_evaluation_gives_every_row_once_and_every_rank_as_many_batches(split):
    rows, global_batch = split.rows, split.global_batch
    for world_size in (w for w in range(1, global_batch + 1) if global_batch % w == 0):
        share = {"global_batch": global_batch, "world_size": world_size, "extents": split.extents}
        ranks = [list(evaluation_batches(rows, rank=rank, **share)) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {-(-sum(rows) // global_batch)}
        together = [flat(share) for batch in zip(*ranks, strict=True) for share in batch]
        assert sorted(joined(together)) == every(rows)
        assert all(len(share) <= global_batch // world_size for share in together)


def test_the_order_is_the_same_for_ever():
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 0, 1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    assert permutation(8, 7, 3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]
    positives = [1, 0, 1, 0, 1, 0, 0, 2]
    assert pass_order([2] * 8, positives, None, 4, 3, 1).tolist() == [6, 4, 5, 0, 3, 7, 1, 2]
    extents = [0, 0, 0, 1, 1, 1, 2, 2]
    assert pass_order([2] * 8, positives, extents, 4, 3, 1).tolist() == [3, 0, 4, 2, 5, 1, 6, 7]
    assert list(islice(training_batches([2, 2, 2, 1], seed=5, global_batch=3), 3)) == [
        [RowSlice(1, 0, 2), RowSlice(2, 0, 1)],
        [RowSlice(2, 1, 2), RowSlice(0, 0, 2)],
        [RowSlice(3, 0, 1), RowSlice(0, 0, 2)],
    ]


@given(st.integers(0, 300), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_a_permutation_holds_each_number_once(count, seed, pass_number):
    assert Counter(permutation(count, seed, pass_number).tolist()) == Counter(range(count))


@pytest.mark.parametrize("batches", [training_batches, evaluation_batches])
def test_workers_that_do_not_divide_the_batch_are_refused_at_once(batches):
    seed = {"seed": 0} if batches is training_batches else {}
    for world_size in (3, 8):
        with pytest.raises(ConfigError, match="world-size") as caught:
            batches([8, 8], global_batch=4, world_size=world_size, **seed)
        assert caught.value.where == {"global_batch": 4, "world_size": world_size}
        workers = {3: "2 or 4", 8: "2 or 4"}[world_size]
        fitting = {3: 6, 8: 8}[world_size]
        assert caught.value.remedy == f"train with {workers} workers, or set train.global_batch to {fitting}"


@pytest.mark.parametrize("rows", [[], [2, 1]])
def test_fewer_patches_than_one_batch_are_refused_at_once(rows):
    with pytest.raises(DataError, match="too-few-patches") as caught:
        training_batches(rows, seed=0, global_batch=4)
    assert caught.value.where == {"patches": sum(rows), "global_batch": 4}
