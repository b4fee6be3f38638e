"""The order of patches: one sequence of global batches, whatever the number of workers and the restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.data.order import (
    RowSlice,
    evaluation_batches,
    permutation,
    spread,
    steps_per_pass,
    training_batches,
)
from lungseg.data.prepare import plan_shards
from lungseg.errors import ConfigError, DataError

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


def taken(rows: list[int], count: int, **arguments: int) -> list[list[Row]]:
    return [flat(batch) for batch in islice(training_batches(rows, **arguments), count)]


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], int, list[int]]:
    """Row counts with at least one global batch of rows, and how many of each are positive."""
    global_batch = draw(global_batches)
    rows = draw(row_counts.filter(lambda counts: sum(counts) >= global_batch))
    return rows, global_batch, [draw(st.integers(0, count)) for count in rows]


@given(splits(), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_the_ranks_shares_make_the_same_global_batches_at_every_world_size(split, seed):
    rows, global_batch, positives = split
    count = 3 * steps_per_pass(rows, global_batch) + 4
    common = {"seed": seed, "global_batch": global_batch, "positives": positives}
    alone = taken(rows, count, **common)
    for world_size in (w for w in range(1, global_batch + 1) if global_batch % w == 0):
        ranks = [taken(rows, count, rank=r, world_size=world_size, **common) for r in range(world_size)]
        assert {len(batch) for rank in ranks for batch in rank} == {global_batch // world_size}
        assert [joined(shares) for shares in zip(*ranks, strict=True)] == alone


@given(splits(), st.integers(0, 50))
@settings(deadline=None)
def test_a_resumed_run_sees_exactly_the_rest(split, first_step):
    rows, global_batch, positives = split
    common = {"seed": 3, "global_batch": global_batch, "positives": positives}
    whole = taken(rows, first_step + 5, **common)
    assert taken(rows, 5, first_step=first_step, **common) == whole[first_step:]


@given(splits(), st.integers(0, 1000))
@settings(deadline=None)
def test_every_pass_visits_every_record_batch_once_and_whole_across_incomplete_batches(split, seed):
    """Batches are cut from passes without a gap, so the one that a pass cannot fill is filled by the next."""
    rows, global_batch, positives = split
    total = sum(rows)
    count = -(-3 * total // global_batch)
    batches = taken(rows, count, seed=seed, global_batch=global_batch, positives=positives)
    assert {len(batch) for batch in batches} == {global_batch}
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


@given(
    st.integers(1, 150), st.floats(0, 1), st.integers(1, 8), st.sampled_from([4, 8, 16]), st.integers(0, 999)
)
@settings(deadline=None)
def test_each_global_batch_has_its_share_of_positives(patches, share, per_batch, global_batch, seed):
    """As `prepare` lays them out: within two record batches' surplus, two more where two passes meet, and
    whatever record batches that a batch cuts have on the other side of the cut."""
    positive = [number < round(share * patches) for number in range(patches)]
    rows = [("c", number, is_positive) for number, is_positive in enumerate(positive)]
    batches = [batch for shard in plan_shards(rows, per_batch, 1000, seed) for batch in shard]
    counts, positives = zip(*((len(b), sum(positive[n] for _, n in b)) for b in batches), strict=True)
    if patches < global_batch:
        return
    fair = global_batch * sum(positive) / patches
    allowed = 4 + 2 * max(positives) + 1
    for batch in taken(list(counts), 60, seed=seed, global_batch=global_batch, positives=positives):
        found = sum(positive[batches[number][row][1]] for number, row in batch)
        assert abs(found - fair) <= allowed


def test_a_batch_without_positives_is_rare_where_chance_would_make_it_frequent():
    """One patch in four is positive: of batches of four, chance alone leaves 0.75^4 = 32 % without one."""
    positives = [number % 2 for number in range(400)]  # record batches of two patches
    rows = [("c", row, row % 4 == 3) for row in range(800)]
    assert [sum(r % 4 == 3 for _, r in b) for b in plan_shards(rows, 2, 999, 0)[0]] != []
    order = np.concatenate([spread(positives, 0, number) for number in range(20)])
    found = np.asarray(positives)[order].reshape(-1, 2).sum(axis=1)
    assert (found == 0).mean() < 0.06
    assert (found == 2).mean() < 0.06


@given(st.lists(st.integers(0, 1), min_size=1, max_size=200), st.integers(0, 999), st.data())
@settings(deadline=None)
def test_any_run_of_record_batches_holds_its_share_of_two_classes_to_within_two(positives, seed, data):
    order = spread(positives, seed, 0)
    assert sorted(order.tolist()) == list(range(len(positives)))
    running = np.concatenate([[0], np.cumsum(np.asarray(positives)[order])])
    start = data.draw(st.integers(0, len(positives)))
    stop = data.draw(st.integers(start, len(positives)))
    fair = (stop - start) * sum(positives) / len(positives)
    assert abs(running[stop] - running[start] - fair) <= 2


def test_within_a_class_the_shuffle_is_uniform():
    """Where record batch 0 of 6 alike comes: chi-square over 3,000 passes, 5 degrees of freedom, 0.1 %."""
    places = [int(np.flatnonzero(spread([1] * 6, 7, number) == 0)[0]) for number in range(3000)]
    expected = 500
    assert sum((places.count(place) - expected) ** 2 / expected for place in range(6)) < 20.5


@given(row_counts | st.just([]), global_batches)
@settings(deadline=None)
def test_evaluation_gives_every_row_once_and_every_rank_as_many_batches(rows, global_batch):
    for world_size in (w for w in range(1, global_batch + 1) if global_batch % w == 0):
        ranks = [
            list(evaluation_batches(rows, global_batch=global_batch, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {-(-sum(rows) // global_batch)}
        together = [flat(share) for batch in zip(*ranks, strict=True) for share in batch]
        assert joined(together) == every(rows)
        assert all(len(share) <= global_batch // world_size for share in together)


def test_the_order_is_the_same_for_ever():
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 0, 1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    assert permutation(8, 7, 3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]
    assert list(islice(training_batches([2, 2, 2, 1], seed=5, global_batch=3), 3)) == [
        [RowSlice(2, 0, 2), RowSlice(3, 0, 1)],
        [RowSlice(1, 0, 2), RowSlice(0, 0, 1)],
        [RowSlice(0, 1, 2), RowSlice(1, 0, 2)],
    ]
    assert spread([1, 0, 1, 0, 1, 0, 0, 2], 3, 1).tolist() == [4, 3, 5, 0, 6, 2, 1, 7]


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
