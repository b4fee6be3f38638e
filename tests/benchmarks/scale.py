"""What a cluster asks of object storage, on paper: requests and bytes per second, and the limit met first.

    uv run python tests/benchmarks/scale.py [--nodes 1 2 4] [--batches-per-get 16] [--help]

Nothing is measured: every figure follows from the flags, the order in `lungseg.stream.order` and the limits
in two chapters of AWS's Amazon S3 User Guide: [B] "Best practices design patterns: optimizing Amazon S3
performance", [D] "Performance design patterns for Amazon S3". Not modelled: decoding on the CPU, second
reads, and what the all-reduce takes of a node's network. GB is 1e9 bytes. A worker, so a rank, is a node.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lungseg.config import PatchConfig, ShardConfig, StreamConfig
from lungseg.stream.order import steps_per_pass

THREADS_MOST = next(m.le for m in StreamConfig.model_fields["threads"].metadata if hasattr(m, "le"))
BYTES_PER_VOXEL = 3  # int16 HU and uint8 mask
PER_GET = ShardConfig().batches_of_get(BYTES_PER_VOXEL * math.prod(PatchConfig().shape_zyx))


def flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Cluster:
    """Who reads what, training at full speed in steady state, when only misses of the cache are read.

    `patches_per_s_per_gpu` is a guess for a U-Net on a data-centre GPU; only a run on yours can tell.
    Raises DataError("too-few-patches") as training would, where a pass does not fill one global batch.
    """

    nodes: int
    gpus_per_node: int = flag(8, "GPUs of a node")
    patches_per_s_per_gpu: float = flag(150.0, "patches a GPU trains on, ASSUMED, not measured")
    batch_per_gpu: int = flag(2, "patches of one step on one GPU")
    rows_per_record_batch: int = flag(ShardConfig().rows_per_batch, "patches of a record batch")
    batches_per_get: int = flag(PER_GET, "record batches of an extent, so of one GET, of patches of 64^3")
    patch_shape_zyx: Sequence[int] = flag(PatchConfig().shape_zyx, "voxels")
    compression_ratio: float = flag(2.2, "3 bytes a voxel to stored, ASSUMED; one CT by planes-lz4: 2.44")
    dataset_patches: int = flag(17_000, "read in a pass; LIDC-IDRI: 888 scans of about 19")
    cache_bytes_per_node: float = flag(0.0, "disk cache of stored bytes, once it is full")
    node_gbit_per_s: float = flag(25.0, "network interface of a node")

    def __post_init__(self) -> None:
        steps_per_pass([self.dataset_patches], self.nodes * self.share_rows)

    @property
    def share_rows(self) -> int:
        """Rows of each global batch that fall to one node."""
        return self.gpus_per_node * self.batch_per_gpu

    @property
    def rows_per_get(self) -> int:
        return self.rows_per_record_batch * self.batches_per_get

    @property
    def bytes_per_patch(self) -> float:
        return BYTES_PER_VOXEL * math.prod(self.patch_shape_zyx) / self.compression_ratio

    @property
    def dataset_bytes(self) -> float:
        return self.dataset_patches * self.bytes_per_patch

    @property
    def cached_share(self) -> float:
        """Of the data set, in a node's full cache, which never evicts: so the same share of its reads hit."""
        return min(1.0, self.cache_bytes_per_node / self.dataset_bytes)

    @property
    def gets_per_extent(self) -> float:
        """Nodes that fetch an extent in a pass, on average: 1 if an extent's rows divide s and D.

        n adjacent rows touch (n + s - g) / s shares of s rows, their offset in a share being uniform over
        the multiples of g = gcd(s, n, D): where n does not divide the D rows of a pass, the next pass begins
        that much sooner. Of an extent's B record batches of n = R rows each lies one turn of all lanes after
        the other: a global batch, if R divides that, so that all touch the same shares; else each turn moves
        them by some rows, and adds as many / s shares. In the last window, which is not full, an extent's
        n = R B rows are adjacent. Against the real order within 4 % for 17,000 patches, 20 % for small data.
        """
        share, rows, whole = self.share_rows, self.rows_per_record_batch, self.nodes * self.share_rows
        extents, lanes = math.ceil(self.dataset_patches / self.rows_per_get), max(1, whole // rows)

        def touched(adjacent: int) -> int:
            return adjacent + share - math.gcd(share, adjacent, self.dataset_patches)

        moved = (self.batches_per_get - 1) * min(whole - lanes * rows, touched(rows)) if rows <= whole else 0
        last = extents % lanes
        reach = (extents - last) * (touched(rows) + moved) + last * touched(self.rows_per_get)
        return min(self.nodes, reach / (extents * share))

    @property
    def patches_per_s(self) -> float:
        return self.nodes * self.gpus_per_node * self.patches_per_s_per_gpu

    @property
    def gets_per_s_per_node(self) -> float:
        extents_per_s = self.patches_per_s / self.rows_per_get
        return extents_per_s * self.gets_per_extent * (1 - self.cached_share) / self.nodes

    @property
    def bytes_per_s_per_node(self) -> float:
        return self.gets_per_s_per_node * self.rows_per_get * self.bytes_per_patch

    def seen_share(self, passes: int) -> float:
        """Of the data set, what a node has read by then: the most that its own misses can cache."""
        return 1 - (1 - self.gets_per_extent / self.nodes) ** passes


@dataclass(frozen=True)
class Store:
    """Limits of an object store; math.inf where it has none of its own."""

    name: str
    gets_per_s_per_prefix: float = math.inf
    bytes_per_s: float = math.inf
    bytes_per_s_per_node: float = math.inf
    bytes_per_s_per_connection: float = math.inf
    first_byte_s: float = 0.0


# 5,500 GETs a prefix, 100-200 ms to the first byte and 100 Gb/s to an instance: [B]. One connection for
# each 85-90 MB/s: [D]. All shards of a data set have one prefix, until S3 splits it or the layout changes.
S3 = Store("S3", 5_500, math.inf, 100e9 / 8, 85e6, first_byte_s=0.15)
SERVERS = tuple(Store(f"one {gbit} Gb/s server", bytes_per_s=gbit * 1e9 / 8) for gbit in (10, 25))


def busy_connections(cluster: Cluster, store: Store) -> float:
    """GETs that a node has under way on average, one to a connection, by Little's law."""
    waiting = cluster.gets_per_s_per_node * store.first_byte_s
    return waiting + cluster.bytes_per_s_per_node / store.bytes_per_s_per_connection


def binding_limits(cluster: Cluster, store: Store) -> list[tuple[float, str, float]]:
    """(load, limit, cache per node instead) of each limit asked for `load` > 1 times what it gives, the worst
    first: it stretches every step by `load`, and the cache that removes it removes the others.

    Each load falls with the misses 1 - c, so it is 1 at c' = 1 - (1 - c) / load: a share of the WHOLE data
    set on each node, not of the node's 1 / N of a pass. A first pass that nothing preloads has none.
    """
    gets, bytes_per_s = cluster.gets_per_s_per_node, cluster.bytes_per_s_per_node
    loads = {
        "GETs/s per prefix": cluster.nodes * gets / store.gets_per_s_per_prefix,
        "server's network": cluster.nodes * bytes_per_s / store.bytes_per_s,
        f"{store.name} to one node": bytes_per_s / store.bytes_per_s_per_node,
        "node's network": bytes_per_s / (cluster.node_gbit_per_s * 1e9 / 8),
        f"stream.threads <= {THREADS_MOST}": busy_connections(cluster, store) / THREADS_MOST,
    }
    misses, size = 1 - cluster.cached_share, cluster.dataset_bytes
    over = [(load, limit, (1 - misses / load) * size) for limit, load in loads.items() if load > 1]
    return sorted(over, reverse=True)


def line(cluster: Cluster, passes: int) -> dict[str, str]:
    """A line of the table, by column."""
    busy, threads = busy_connections(cluster, S3), StreamConfig().threads
    cells = {
        "nodes": f"{cluster.nodes}",
        "patches/s": f"{cluster.patches_per_s:,.0f}",
        "s per pass": f"{cluster.dataset_patches / cluster.patches_per_s:.2g}",
        "GETs per extent": f"{cluster.gets_per_extent:.2f}",
        "GETs/s per node": f"{cluster.gets_per_s_per_node:,.0f}",
        "GB/s per node": f"{cluster.bytes_per_s_per_node / 1e9:.2f}",
        "GETs/s bucket": f"{cluster.nodes * cluster.gets_per_s_per_node:,.0f}",
        "GB/s bucket": f"{cluster.nodes * cluster.bytes_per_s_per_node / 1e9:,.2f}",
        "S3 connections per node": f"{math.ceil(busy)}",
        f"fed by {threads} threads": f"{threads / max(threads, busy):.0%}",
    }
    for store in (S3, *SERVERS):
        load, limit, cache = next(iter(binding_limits(cluster, store)), (0.0, "", 0.0))
        cells[f"{store.name}: binds first"] = f"{limit} x{load:,.3g}" if limit else "none"
        cells[f"{store.name}: node cache, GB"] = f"{cache / 1e9:.2f}" if limit else "-"
    return cells | {f"seen by a node in {passes} passes": f"{cluster.seen_share(passes):.0%}"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2**k for k in range(11)], help="a line each")
    parser.add_argument("--passes", type=int, default=100, help="over the data, for what a node has seen")
    for setting in fields(Cluster)[1:]:
        name, default = "--" + setting.name.replace("_", "-"), setting.default
        kind = {"type": int, "nargs": 3} if isinstance(default, tuple) else {"type": type(default)}
        parser.add_argument(name, default=default, help=setting.metadata["help"], **kind)
    given = vars(parser.parse_args(arguments))
    passes, counts = given.pop("passes"), given.pop("nodes")
    lines = [line(Cluster(nodes, **given), passes) for nodes in counts]
    for cells in (list(lines[0]), ["--:"] * len(lines[0]), *(list(one.values()) for one in lines)):
        print("| " + " | ".join(cells) + " |")
    print(f"\nThe data set has {Cluster(counts[0], **given).dataset_bytes / 1e9:.2f} GB.")


if __name__ == "__main__":
    main()
