"""The field's data loaders on our patches: write their formats, read them back, meter the reading.

    python peers.py write PEER --source DIR --out TARGET
    python peers.py read  PEER --source TARGET --patches N --batch 8 [--workers W] [--cache DIR]

PEER is mosaic, mosaic-zstd or webdataset (an environment with torch), tfrecord or raydata (ours). The
source of `write` holds image.npy int16 and mask.npy uint8, both [n, 64, 64, 64] and globally shuffled;
TARGET is a folder or s3://bucket/prefix (not for tfrecord: TensorFlow's wheels cannot read S3). `read`
prints one line of JSON.

All have one duty: shards of 60 MiB in an order that is new each epoch, patches shuffled within 64, batches
of int16 and uint8 arrays in this process. Settings are the best of those tried on 2 cores, as commented.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from meter import Meter

FIELDS = {"image": np.int16, "mask": np.uint8}
SHAPE_ZYX = (64, 64, 64)
SHARD_PATCHES = 80
"""A multiple of the batch: where a worker reads whole shards, another number would cut its last batch."""
SHUFFLE_PATCHES = 64

Epoch = Callable[[], Iterator[tuple[Any, Any]]]
Start = Callable[[], Epoch]
"""Constructs the loader, which is metered, and returns what begins an epoch; imports are done by then."""


def s3_client() -> Any:
    import boto3
    from botocore.config import Config

    # Not every S3-compatible server takes the checksums that boto3 sends unasked since 2025.
    return boto3.client("s3", config=Config(request_checksum_calculation="when_required"))


@contextlib.contextmanager
def folder_for(target: str) -> Iterator[Path]:
    """A folder to write into; what it holds in the end is the target's."""
    if not target.startswith("s3://"):
        Path(target).mkdir(parents=True)
        yield Path(target)
        return
    bucket, _, prefix = target.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            s3_client().upload_file(str(file), bucket, f"{prefix}/{file.name}")


def shard_urls(target: str, suffix: str) -> list[str]:
    """Paths, or for S3 presigned addresses, of the target's shards."""
    if not target.startswith("s3://"):
        return sorted(map(str, Path(target).glob(f"*{suffix}")))
    bucket, _, prefix = target.removeprefix("s3://").partition("/")
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = sorted(item["Key"] for page in pages for item in page.get("Contents", []))
    sign = partial(s3_client().generate_presigned_url, "get_object", ExpiresIn=24 * 3600)
    return [sign(Params={"Bucket": bucket, "Key": key}) for key in keys if key.endswith(suffix)]


def shards(image: np.ndarray, mask: np.ndarray) -> Iterator[tuple[str, list[bytes], list[bytes]]]:
    """A name and the patches' raw bytes: .npy or pickles would cost a parse and a copy each."""
    for first in range(0, len(image), SHARD_PATCHES):
        rows = slice(first, first + SHARD_PATCHES)
        images, masks = ([patch.tobytes() for patch in patches[rows]] for patches in (image, mask))
        yield f"{first // SHARD_PATCHES:06d}", images, masks


def joined(chunks: Iterable[bytes], field: str) -> np.ndarray:
    """A batch [n, z, y, x] from the bytes of its patches, with one copy."""
    return np.frombuffer(bytearray().join(chunks), FIELDS[field]).reshape(-1, *SHAPE_ZYX)


def import_streaming() -> None:
    """Make MosaicML's `streaming.base` importable without `streaming`, which imports torchvision for its
    vision data sets: PyPI's torchvision does not load beside a CPU build of torch."""
    found = importlib.util.find_spec("streaming")
    if found is None:
        raise ModuleNotFoundError("no mosaicml-streaming in this environment")
    package = types.ModuleType("streaming")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["streaming"] = package


def write_mosaic(folder: Path, image: np.ndarray, mask: np.ndarray, compression: str | None = None) -> None:
    import_streaming()
    from streaming.base import MDSWriter

    columns = {"image": "ndarray:int16:64,64,64", "mask": "ndarray:uint8:64,64,64"}
    limit = SHARD_PATCHES * (3 * 64**3 + 4) + 4096
    with MDSWriter(out=str(folder), columns=columns, compression=compression, size_limit=limit) as out:
        for pair in zip(image, mask, strict=True):
            out.write(dict(zip(columns, pair, strict=True)))


def stacked(samples: list[dict[str, np.ndarray]]) -> tuple[Any, ...]:
    """As tensors: a DataLoader hands those over in shared memory, arrays through a pipe."""
    from torch import from_numpy

    return tuple(from_numpy(np.stack([sample[field] for sample in samples])) for field in FIELDS)


def data_loader(data: Any, workers: int, **options: Any) -> Epoch:
    from torch.utils.data import DataLoader

    # No worker is the fastest: a batch from one crosses fresh shared memory, whose pages the kernel has to
    # clear; with 2 of them local folders gave half the patches a second at 2 to 3 times the CPU.
    return DataLoader(data, num_workers=workers, persistent_workers=workers > 0, **options).__iter__


def read_mosaic(options: argparse.Namespace) -> Start:
    import_streaming()
    from streaming.base import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    os.environ["S3_ENDPOINT_URL"] = os.environ.get("AWS_ENDPOINT_URL", "")
    clean_stale_shared_memory()
    place = {"remote": options.source, "local": options.cache or tempfile.mkdtemp()}
    if options.peer == "mosaic" and options.cache is None and not options.source.startswith("s3://"):
        place = {"local": options.source}  # Reads the shards where they are. (It would unpack zstd there.)

    def start() -> Epoch:
        data = StreamingDataset(
            **place,
            batch_size=options.batch,
            shuffle=True,
            # Shuffles each shard, then moves a patch by up to (block - shard) / 2 beyond it. A block smaller
            # than a shard would keep shards apart; the default has to download everything first.
            shuffle_block_size=SHARD_PATCHES + SHUFFLE_PATCHES,
            # The default, 64 patches, begins to fetch a shard too late; more than two ahead gain nothing.
            predownload=2 * SHARD_PATCHES,
        )
        for stream in data.streams:
            # It has fetched the index, and forked workers would share its open connection. Without this some
            # epochs of two workers stood still for 60 s, with it none of 24; why was not proven.
            stream._downloader.clean_up()
        return data_loader(data, options.workers, batch_size=options.batch, collate_fn=stacked)

    return start


def write_webdataset(folder: Path, image: np.ndarray, mask: np.ndarray) -> None:
    from webdataset import TarWriter

    for name, *columns in shards(image, mask):
        with TarWriter(f"{folder}/{name}.tar") as out:
            for row, pair in enumerate(zip(*columns, strict=True)):
                out.write({"__key__": f"{name}-{row:03d}", **dict(zip(FIELDS, pair, strict=True))})


def read_webdataset(options: argparse.Namespace) -> Start:
    import webdataset
    from torch import from_numpy

    urls = shard_urls(options.source, ".tar")
    buffer = SHUFFLE_PATCHES // max(options.workers, 1)

    def opened(url: str, *_: object) -> io.BufferedReader:
        # 830 patches a second; the usual curl in a pipe gave 500 (580 with buffers of 1 MiB), boto3 520.
        return io.BufferedReader(urllib.request.urlopen(url), 1 << 20)

    def tensors(samples: list[dict[str, bytes]]) -> tuple[Any, ...]:
        return tuple(from_numpy(joined((sample[field] for sample in samples), field)) for field in FIELDS)

    def start() -> Epoch:
        webdataset.gopen_schemes.update(http=opened, https=opened)
        data = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(buffer, initial=buffer)
        data = data.batched(options.batch, collation_fn=tensors)
        return data_loader(data, options.workers, batch_size=None)

    return start


def write_tfrecord(folder: Path, image: np.ndarray, mask: np.ndarray) -> None:
    from tensorflow import io as tf_io
    from tensorflow import train

    for name, *columns in shards(image, mask):
        with tf_io.TFRecordWriter(f"{folder}/{name}.tfrecord") as out:
            for pair in zip(*columns, strict=True):
                lists = [train.BytesList(value=[data]) for data in pair]
                features = {f: train.Feature(bytes_list=b) for f, b in zip(FIELDS, lists, strict=True)}
                out.write(train.Example(features=train.Features(feature=features)).SerializeToString())


def read_tfrecord(options: argparse.Namespace) -> Start:
    import tensorflow as tf

    names, auto = shard_urls(options.source, ".tfrecord"), tf.data.AUTOTUNE
    layout = {field: tf.io.FixedLenFeature([], tf.string) for field in FIELDS}

    def decode(serialized: Any) -> tuple[Any, ...]:
        parsed = tf.io.parse_single_example(serialized, layout)
        return tuple(tf.reshape(tf.io.decode_raw(parsed[f], FIELDS[f]), SHAPE_ZYX) for f in FIELDS)

    def start() -> Epoch:
        files = tf.data.Dataset.from_tensor_slices(names).shuffle(len(names))
        data = files.interleave(tf.data.TFRecordDataset, num_parallel_calls=auto, deterministic=False)
        data = data.shuffle(SHUFFLE_PATCHES).map(decode, auto, deterministic=False)
        # A parallel batch() and parsing whole batches were 15 % slower; read buffers of 1 or 8 MiB, fixed
        # cycle lengths and private thread pools gained nothing.
        return data.batch(options.batch).prefetch(auto).as_numpy_iterator

    return start


def write_raydata(folder: Path, image: np.ndarray, mask: np.ndarray) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # Bytes of a fixed size: Parquet has no int16, so that Ray's own tensor columns take 2.7 times the space
    # and were read at a fifth of the speed.
    for name, *columns in shards(image, mask):
        table = pa.table([pa.array(column, pa.binary(len(column[0]))) for column in columns], list(FIELDS))
        parquet.write_table(table, f"{folder}/{name}.parquet", compression="none", use_dictionary=False)


def start_ray() -> Any:
    """Ray Data on 2 cores, whose workers have done their imports, as the other peers have theirs."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    import ray

    # 1 or 2 GiB for the object store were no faster.
    limits: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 512 << 20}
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    ray.init(address="local", _node_ip_address="127.0.0.1", **limits, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Ray 2.60's newer reader waits about 4 s for its list of files in every epoch: 70 patches a second.
    ray.data.DataContext.get_current().use_datasource_v2 = False

    def busy(block: Any) -> Any:
        time.sleep(1)
        return block

    ray.data.range(2, override_num_blocks=2).map_batches(busy).materialize()
    return ray.data


def read_raydata(options: argparse.Namespace) -> Start:
    from pyarrow.fs import S3FileSystem

    ray_data, path, settings = start_ray(), options.source, {"shuffle": "files"}
    # A block a shard: by default each is cut into 16, and copied once more, at half the speed.
    settings["override_num_blocks"] = len(shard_urls(path, ".parquet"))
    if path.startswith("s3://"):
        settings["filesystem"] = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])

    def start() -> Epoch:
        data = ray_data.read_parquet(path.removeprefix("s3://"), **settings)
        batches = {"batch_size": options.batch, "batch_format": "numpy"}

        def epoch() -> Iterator[tuple[Any, Any]]:
            # Decoding here or in the tasks, prefetching 1, 2 or 4 batches: all the same.
            for rows in data.iter_batches(local_shuffle_buffer_size=SHUFFLE_PATCHES, **batches):
                yield joined(rows["image"], "image"), joined(rows["mask"], "mask")

        return epoch

    return start


PEERS: dict[str, tuple[Callable[..., None], Callable[[argparse.Namespace], Start]]] = {
    "mosaic": (write_mosaic, read_mosaic),
    "mosaic-zstd": (partial(write_mosaic, compression="zstd"), read_mosaic),
    "webdataset": (write_webdataset, read_webdataset),
    "tfrecord": (write_tfrecord, read_tfrecord),
    "raydata": (write_raydata, read_raydata),
}


def read(start: Start, patches: int) -> Meter:
    """As many epochs as it takes to have the patches."""
    with Meter() as meter:
        epoch = start()
        while meter.patches < patches:
            for image, mask in epoch():
                meter.batch(image, mask)
                if meter.patches >= patches:
                    break
    return meter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("write", "read"))
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out")
    parser.add_argument("--patches", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="of a DataLoader; others have their own way")
    parser.add_argument("--cache", help="where mosaic keeps shards; default: a folder for this run")
    options = parser.parse_args()
    # Locks, caches and sessions of the peers go here, and with this process.
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="peers-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
    write, reader = PEERS[options.peer]
    if options.verb == "write":
        image, mask = (np.load(f"{options.source}/{field}.npy", mmap_mode="r") for field in FIELDS)
        with folder_for(options.out) as folder:
            write(folder, image, mask)
        return
    with contextlib.redirect_stdout(sys.stderr):
        meter = read(reader(options), options.patches)
    print(json.dumps({"peer": options.peer, **meter.report()}))


if __name__ == "__main__":
    main()
