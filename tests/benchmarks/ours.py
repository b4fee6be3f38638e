"""lungseg's side of the streaming benchmark: write its shards, read them back, and the raw GETs below them.

    python ours.py write CODEC --source DIR --store URI
    python ours.py read CODEC --store URI --patches N --batch 8 [--cache DIR] [--threads T]
    python ours.py raw-gets CODEC --store URI [--threads T]

`raw-gets` is the ceiling: the ranges of one pass in any order, into buffers made beforehand and never
looked at.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import threading
import time
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from meter import Meter

from lungseg.config import ShardConfig, StreamConfig
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.dataset.shards import Patch, write_shard
from lungseg.storage import Store, open_store
from lungseg.storage.keys import data_manifest
from lungseg.stream.patch_stream import PatchStream


def write(codec: Any, source: Path, uri: str) -> None:
    """The patches in the order of the source, which is shuffled, as `prepare` leaves them."""
    image, mask = (np.load(source / f"{name}.npy", mmap_mode="r") for name in ("image", "mask"))
    shape, rows = image.shape[1:], ShardConfig().rows_per_batch
    per_shard = 80  # 60 MiB, as the peers have it

    def patch(number: int) -> Patch:
        stratum = "nodule" if mask[number].any() else "lung"
        place = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return Patch(np.array(image[number]), np.array(mask[number]), f"c{number}", "", stratum, *place)

    store = open_store(uri)
    written = []
    for first in range(0, len(image), per_shard):
        numbers = range(first, min(first + per_shard, len(image)))
        groups = ([patch(n) for n in numbers[at : at + rows]] for at in range(0, len(numbers), rows))
        key = f"data/{codec}/shards/train-{first // per_shard:05d}.arrow"
        written.append(write_shard(store, key, groups, shape, codec))
    splits = {"train": tuple(written), "val": ()}
    per_get = ShardConfig().batches_of_get(3 * math.prod(shape))
    manifest = Manifest(codec, "", {}, shape, splits, {}, {}, {}, (), batches_per_get=per_get)
    store.put(data_manifest(codec), manifest.to_bytes())


def read(store: Store, manifest: Manifest, patches: int, batch: int, config: StreamConfig) -> Meter:
    with (
        Meter() as meter,
        PatchStream(store, manifest, "train", config, global_batch=batch, seed=os.getpid()) as stream,
    ):
        for one in islice(stream, patches // batch):
            meter.batch(one.image_hu, one.mask)
    return meter


def raw_gets(manifest: Manifest, uri: str, threads: int) -> Meter:
    """No client can be much faster in Python: http.client on kept connections, presigned addresses."""
    import boto3
    from botocore.config import Config

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    keys = {shard.key for shard in manifest.shards["train"]}
    paths = {
        key: client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": f"{prefix}/{key}"})
        for key in keys
    }
    address = urlsplit(client.meta.endpoint_url).netloc
    extents = manifest.extents("train")
    ranges: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in np.random.default_rng().permutation(len(extents)).tolist():
        ranges.put(extents[number])

    def work() -> None:
        connection = HTTPConnection(address)
        buffer = bytearray(max(extent.length for extent in extents))
        while not ranges.empty():
            try:
                extent = ranges.get_nowait()
            except queue.Empty:
                break
            url = urlsplit(paths[extent.shard.key])
            span = f"bytes={extent.offset}-{extent.offset + extent.length - 1}"
            connection.request("GET", f"{url.path}?{url.query}", headers={"Range": span})
            answer, at = connection.getresponse(), 0
            view = memoryview(buffer)[: extent.length]
            while at < extent.length:
                at += answer.readinto(view[at:])
            answer.read()

    with Meter() as meter:
        began = time.perf_counter()
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        meter.patches = sum(manifest.rows("train"))
        meter.seconds = time.perf_counter() - began
    return meter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("write", "read", "raw-gets"))
    parser.add_argument("codec")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--patches", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=StreamConfig().threads)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    if options.verb == "write":
        write(options.codec, options.source, options.store)
        return
    store = open_store(options.store)
    manifest = load_manifest(store, options.codec)
    if options.verb == "raw-gets":
        meter = raw_gets(manifest, options.store, options.threads)
    else:
        config = StreamConfig(threads=options.threads, cache_dir=options.cache)
        meter = read(store, manifest, options.patches, options.batch, config)
    stored = sum(shard.bytes for shard in manifest.shards["train"])
    rows = sum(manifest.rows("train"))
    print(json.dumps({**meter.report(), "stored_bytes_per_patch": stored // rows}))


if __name__ == "__main__":
    main()
