"""The simulator of `benchmarks.scale` against closed forms, AWS's own examples, and the real order."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
from benchmarks.scale import S3, SERVERS, Cluster, Store, binding_limits, busy_connections, main
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.errors import DataError
from lungseg.stream.order import training_batches

small = st.integers(1, 8)
clusters = st.builds(
    Cluster,
    nodes=st.integers(1, 1024),
    gpus_per_node=st.integers(1, 16),
    patches_per_s_per_gpu=st.floats(1, 1000),
    batch_per_gpu=st.integers(1, 16),
    rows_per_record_batch=st.integers(1, 64),
    batches_per_get=st.integers(1, 16),
    dataset_patches=st.integers(2**18, 10**7),
)


def laid_out(nodes: int, share_rows: int, rows: int, batches: int, patches: int) -> Cluster:
    return Cluster(nodes, 1, 1.0, share_rows, rows, batches, dataset_patches=patches)


def gets(cluster: Cluster, steps: int, rank: int, seed: int = 0) -> list[int]:
    """Extents that a rank fetches, in turn: those that are open not again, as in PatchStream and Fetcher."""
    rows, total = cluster.rows_per_record_batch, cluster.dataset_patches
    counts = [min(rows, total - first) for first in range(0, total, rows)]
    extents = [number // cluster.batches_per_get for number in range(len(counts))]
    share = {"global_batch": cluster.nodes * cluster.share_rows, "rank": rank, "world_size": cluster.nodes}
    is_open: OrderedDict[int, None] = OrderedDict()
    fetched = []
    for slices in islice(training_batches(counts, seed=seed, extents=extents, **share), steps):
        for extent in (extents[piece.record_batch] for piece in slices):
            if extent not in is_open:
                is_open[extent] = None
                fetched.append(extent)
            if len(is_open) > 2 * (1 + math.ceil(cluster.share_rows / rows)):
                is_open.popitem(last=False)
    return fetched


def counted_per_extent(cluster: Cluster, passes: int, ranks: Sequence[int], seed: int = 0) -> float:
    """What `gets_per_extent` says, from GETs of the real order."""
    steps = passes * cluster.dataset_patches // (cluster.nodes * cluster.share_rows)
    counted = sum(len(gets(cluster, steps, rank, seed)) for rank in ranks)
    return counted / (steps * len(ranks)) * cluster.rows_per_get / cluster.share_rows


@given(small, small, small, st.integers(1, 3), st.integers(1, 3), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_in_full_windows_a_node_fetches_what_lies_in_its_share_or_is_cut_by_it_and_only_once(
    share_rows, rows, batches, nodes, windows, seed
):
    cut_anywhere_at = math.gcd(share_rows, rows)
    nodes *= rows // cut_anywhere_at
    cluster = laid_out(nodes, share_rows, rows, batches, share_rows * nodes * batches * windows)
    assert cluster.gets_per_extent == (share_rows + rows - cut_anywhere_at) / share_rows
    assert counted_per_extent(cluster, 1, range(nodes), seed) == pytest.approx(cluster.gets_per_extent)


@pytest.mark.parametrize("patches", [17_000, 17_001])
@pytest.mark.parametrize("nodes", [4, 64, 512])
def test_gets_of_a_real_data_set_are_those_of_the_real_order(nodes, patches):
    cluster = Cluster(nodes, dataset_patches=patches)
    counted = counted_per_extent(cluster, 2 + nodes // 16, range(0, nodes, math.ceil(nodes / 5)))
    assert counted == pytest.approx(cluster.gets_per_extent, rel=0.04)


@pytest.mark.parametrize(
    ("nodes", "share_rows", "rows", "batches", "patches"),
    [(1, 7, 3, 4, 2000), (7, 11, 2, 6, 3648), (5, 10, 7, 4, 7000), (6, 15, 8, 6, 9001), (8, 3, 16, 2, 4000)],
)
def test_gets_where_record_batches_divide_neither_share_nor_global_batch(
    nodes, share_rows, rows, batches, patches
):
    cluster = laid_out(nodes, share_rows, rows, batches, patches)
    counted = counted_per_extent(cluster, 2 * share_rows, range(nodes))
    assert counted == pytest.approx(cluster.gets_per_extent, rel=0.02)


def test_of_fewer_extents_than_lanes_neighbours_fetch_half_twice_and_data_below_a_batch_is_refused():
    assert [Cluster(nodes).gets_per_extent for nodes in (1, 512, 1024)] == [1, 1.5, 1.5]
    aligned = [Cluster(nodes, dataset_patches=17_008).gets_per_extent for nodes in (1, 512, 1024)]
    assert aligned == [1, 1, 1]
    with pytest.raises(DataError, match="too-few-patches"):
        Cluster(2048)


@pytest.mark.parametrize("nodes", [2, 5])
def test_a_node_sees_its_part_of_each_pass_and_a_cache_that_never_evicts_hits_its_share(nodes):
    cluster = laid_out(nodes, 4, 2, 2, 4 * 400)
    passes, cached_share = 40, 0.4
    fetched = gets(cluster, passes * 400 // nodes, 0)
    for some in (1, 3):
        seen = set(fetched[: some * 400 // nodes])
        assert len(seen) / 400 == pytest.approx(cluster.seen_share(some), abs=0.03)
    cache = list(dict.fromkeys(fetched))[: int(cached_share * 400)]
    later = fetched[fetched.index(cache[-1]) + 1 :]
    assert sum(extent in cache for extent in later) / len(later) == pytest.approx(cached_share, abs=0.03)
    half = replace(cluster, cache_bytes_per_node=cached_share * cluster.dataset_bytes)
    assert half.gets_per_s_per_node == pytest.approx(0.6 * cluster.gets_per_s_per_node)


def test_a_node_of_8_gpus_at_150_patches_per_second_needs_75_gets_and_0_31_gb_per_second():
    cluster = Cluster(4, compression_ratio=3, dataset_patches=2**14)
    assert cluster.patches_per_s == 4 * 8 * 150
    assert cluster.gets_per_s_per_node == 8 * 150 / (2 * 8)
    assert cluster.bytes_per_s_per_node == pytest.approx(8 * 150 * 64**3)  # one byte is left of three


def test_aws_advises_15_connections_for_10_gigabit_per_second():
    cluster = Cluster(1)
    cluster = replace(cluster, patches_per_s_per_gpu=10e9 / 8 / 8 / cluster.bytes_per_patch)
    assert cluster.bytes_per_s_per_node == pytest.approx(1.25e9)
    assert math.ceil(busy_connections(cluster, replace(S3, first_byte_s=0.0))) == 15
    at_once = busy_connections(cluster, replace(S3, bytes_per_s_per_connection=math.inf))
    assert at_once == pytest.approx(0.15 * cluster.gets_per_s_per_node)


def test_a_prefix_of_s3_serves_73_such_nodes_and_not_74():
    windows_are_full = 128 * 73 * 74
    assert binding_limits(Cluster(73, dataset_patches=windows_are_full), S3) == []
    ((load, limit, _),) = binding_limits(Cluster(74, dataset_patches=windows_are_full), S3)
    assert (load, limit) == (pytest.approx(74 * 75 / 5500), "GETs/s per prefix")


def test_the_worst_limit_comes_first():
    fast = Cluster(8, 8, 150 * 32, rows_per_record_batch=16, batches_per_get=2)  # 14 GB/s to each node
    found = [limit for _, limit, _ in binding_limits(fast, S3)]
    assert found == ["node's network", "stream.threads <= 128", "GETs/s per prefix", "S3 to one node"]
    assert [limit for _, limit, _ in binding_limits(Cluster(8), SERVERS[1])] == ["server's network"]
    assert [limit for _, limit, _ in binding_limits(fast, Store("without limits"))] == ["node's network"]


@given(clusters, st.floats(0, 0.9), st.sampled_from([S3, *SERVERS]))
def test_the_cache_that_is_named_brings_each_limit_to_exactly_what_it_gives(cluster, cached_share, store):
    before = replace(cluster, cache_bytes_per_node=cached_share * cluster.dataset_bytes)
    for load, limit, cache in binding_limits(before, store):
        assert load > 1
        assert before.cache_bytes_per_node < cache < cluster.dataset_bytes
        for factor, binds in ((0.999, True), (1.001, False)):
            misses = (1 - cache / cluster.dataset_bytes) / factor
            after = replace(cluster, cache_bytes_per_node=(1 - misses) * cluster.dataset_bytes)
            assert (limit in [one for _, one, _ in binding_limits(after, store)]) is binds


def test_the_table_has_a_line_for_each_number_of_nodes(capsys):
    main(["--batches-per-get", "8", "--nodes", "1", "64", "--dataset-patches", "16384"])
    head, _, *lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("|")]
    table = [dict(zip(head.split(" | "), text.split(" | "), strict=True)) for text in lines]
    assert [one["GETs/s bucket"] for one in table] == ["75", "4,800"]
    assert [one["S3: binds first"] for one in table] == ["none", "none"]
    assert table[1]["one 25 Gb/s server: binds first"] == "server's network x8.79"
    main([])
    numbers = [text.split()[1] for text in capsys.readouterr().out.splitlines()[2:13]]
    assert numbers == [str(2**power) for power in range(11)]
