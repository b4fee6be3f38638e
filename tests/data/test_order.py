"""The order of patches: one sequence of global batches, whatever the number of workers and the restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.data.order import RowSlice, evaluation_batches, permutation, steps_per_pass, training_batches
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
def splits(draw: st.DrawFn) -> tuple[list[int], int]:
    """Row counts with at least one global batch of rows."""
    global_batch = draw(global_batches)
    rows = draw(row_counts.filter(lambda counts: sum(counts) >= global_batch))
    return rows, global_batch


@given(splits(), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_the_ranks_shares_make_the_same_global_batches_at_every_world_size(split, seed):
    rows, global_batch = split
    count = 3 * steps_per_pass(rows, global_batch) + 1
    alone = taken(rows, count, seed=seed, global_batch=global_batch)
    for world_size in (w for w in range(1, global_batch + 1) if global_batch % w == 0):
        place = {"seed": seed, "global_batch": global_batch, "world_size": world_size}
        ranks = [taken(rows, count, rank=rank, **place) for rank in range(world_size)]
        assert {len(batch) for rank in ranks for batch in rank} == {global_batch // world_size}
        assert [joined(shares) for shares in zip(*ranks, strict=True)] == alone


@given(splits(), st.integers(0, 50))
@settings(deadline=None)
def test_a_resumed_run_sees_exactly_the_rest(split, first_step):
    rows, global_batch = split
    whole = taken(rows, first_step + 5, seed=3, global_batch=global_batch)
    assert taken(rows, 5, seed=3, global_batch=global_batch, first_step=first_step) == whole[first_step:]


@given(splits(), st.integers(0, 1000))
@settings(deadline=None)
def test_a_pass_visits_no_row_twice_and_leaves_out_less_than_a_batch(split, seed):
    rows, global_batch = split
    steps = steps_per_pass(rows, global_batch)
    batches = taken(rows, 3 * steps, seed=seed, global_batch=global_batch)
    for start in range(0, 3 * steps, steps):
        seen = [row for batch in batches[start : start + steps] for row in batch]
        assert set(seen) <= set(every(rows))
        assert len(seen) == len(set(seen))
        assert 0 <= sum(rows) - len(seen) < global_batch


def test_passes_and_seeds_differ_and_every_row_is_left_out_at_times():
    rows = [2] * 10
    batches = taken(rows, 60 * 6, seed=1, global_batch=3)  # 6 batches a pass leave 2 of 20 rows out
    passes = [joined(batches[start : start + 6]) for start in range(0, 360, 6)]
    assert len({tuple(one) for one in passes}) == 60
    assert len({row for one in passes for row in set(every(rows)) - set(one)}) == 20
    assert passes[0] != joined(taken(rows, 6, seed=2, global_batch=3))


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
        [RowSlice(1, 0, 2), RowSlice(0, 0, 1)],
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
        assert "train.global_batch" in caught.value.remedy


@pytest.mark.parametrize("rows", [[], [2, 1]])
def test_fewer_patches_than_one_batch_are_refused_at_once(rows):
    with pytest.raises(DataError, match="too-few-patches") as caught:
        training_batches(rows, seed=0, global_batch=4)
    assert caught.value.where == {"patches": sum(rows), "global_batch": 4}
