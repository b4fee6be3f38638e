"""The stream over a bad network and a server that dies: the right bytes or a clear error, never a hang."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from helpers.faults import Fault, FaultProxy, fault_proxy
from helpers.servers import BUCKET, S3Server, s3_client

from lungseg.config import StreamConfig
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.shards import Patch, write_shard
from lungseg.errors import DataError, LungsegError, StorageError
from lungseg.storage import Patience, Read, S3Store, Store, open_store
from lungseg.storage.keys import data_manifest
from lungseg.stream.order import training_batches
from lungseg.stream.patch_stream import PatchStream
from lungseg.telemetry import CHECKSUM_FAILURES

pytestmark = pytest.mark.timeout(60)

SHAPE = (16, 16, 16)
RECORD_BATCHES = 12  # of two patches, in two shards
ROWS = [2] * RECORD_BATCHES
# Hedging has its own tests; here it would hide how a fault is healed.
CONFIG = StreamConfig(threads=3, retry_seconds=20, read_seconds=0.5, hedge_factor=0)
SHORT = Patience(seconds=20, first_wait_seconds=0.01, longest_wait_seconds=0.1, read_seconds=0.5)
TRANSIENT: list[Fault] = ["500", "503", "slow-down", "reset", "reset-in-body", "truncate"]
TRANSIENT += ["slow-first-byte", "stall"]

Arrays = tuple[np.ndarray, np.ndarray]


def voxels(number: int) -> Arrays:
    rng = np.random.default_rng(number)
    return rng.integers(-1000, 400, SHAPE, np.int16), rng.integers(0, 2, SHAPE, np.uint8)


def filled(store: Store) -> Manifest:
    patches = (Patch(*voxels(n), "c", "", "lung", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) for n in range(sum(ROWS)))
    shards = tuple(
        write_shard(
            store,
            f"data/d/shards/train-{number:05d}.arrow",
            [list(islice(patches, 2)) for _ in range(RECORD_BATCHES // 2)],
            SHAPE,
            "raw",
        )
        for number in range(2)
    )
    return Manifest("d", "", {}, SHAPE, {"train": shards}, {}, {}, {}, ())


def taken(stream: PatchStream, steps: int | None = None) -> list[Arrays]:
    return [(batch.image_hu, batch.mask) for batch in islice(stream, steps)]


def assert_same(batches: list[Arrays], patches: list[list[int]]) -> None:
    """The batches hold exactly the patches of these numbers."""
    assert len(batches) == len(patches)
    for (image, mask), numbers in zip(batches, patches, strict=True):
        np.testing.assert_array_equal(image, [voxels(n)[0] for n in numbers])
        np.testing.assert_array_equal(mask, [voxels(n)[1] for n in numbers])


def training_patches(steps: int, **share: int) -> list[list[int]]:
    plan = islice(training_batches(ROWS, **share), steps)
    return [[2 * s.record_batch + row for s in batch for row in range(s.start, s.stop)] for batch in plan]


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lungseg-stream")]


@dataclass
class Setting:
    manifest: Manifest
    store: S3Store
    proxy: FaultProxy

    def epoch(self) -> list[Arrays]:
        with PatchStream(
            self.store, self.manifest, "train", CONFIG, global_batch=4, training=False
        ) as stream:
            return taken(stream)


@pytest.fixture
def bad_network(s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """A data set that was written over a good network, and a store that reads it through the proxy."""
    manifest = filled(open_store(s3_uri))
    with fault_proxy(s3_server.endpoint, late_seconds=1.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        prefix = s3_uri.removeprefix(f"s3://{BUCKET}/")
        yield Setting(manifest, S3Store(BUCKET, prefix), proxy)


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_passes_costs_one_more_read_and_changes_no_byte(
    bad_network: Setting, fault: Fault
) -> None:
    bad_network.proxy.script["GET"].extend([None, fault, None, fault, fault])
    assert_same(bad_network.epoch(), [list(range(n, n + 4)) for n in range(0, 24, 4)])
    assert [seen.fault for seen in bad_network.proxy.seen].count(fault) == 3
    assert len(bad_network.proxy.seen) == RECORD_BATCHES + 3
    assert len({(seen.path, seen.range) for seen in bad_network.proxy.seen}) == RECORD_BATCHES


def test_a_flipped_bit_is_fetched_again_on_a_new_connection_and_counted(bad_network: Setting) -> None:
    before = CHECKSUM_FAILURES._value.get()
    bad_network.proxy.script["GET"].extend([None, None, None, None, "flip"])
    assert_same(bad_network.epoch(), [list(range(n, n + 4)) for n in range(0, 24, 4)])
    assert CHECKSUM_FAILURES._value.get() == before + 1
    seen = bad_network.proxy.seen
    assert len(seen) == RECORD_BATCHES + 1
    again = [s for s in seen if (s.path, s.range) == (seen[4].path, seen[4].range)]
    assert [s.fault for s in again] == ["flip", None]
    assert again[1].connection not in {s.connection for s in seen[:5]}


@pytest.mark.slow
def test_a_storm_of_all_faults_leaves_the_order_as_it_is_at_every_rank(bad_network: Setting) -> None:
    storm: list[Fault | None] = [*TRANSIENT, "flip", None, None] * 2
    random.Random(1).shuffle(storm)
    for rank in range(2):
        bad_network.proxy.script["GET"].extend(storm)
        share = {"global_batch": 4, "rank": rank, "world_size": 2, "seed": 3}
        with PatchStream(bad_network.store, bad_network.manifest, "train", CONFIG, **share) as stream:
            batches = taken(stream, 13)  # more than two epochs
        assert_same(batches, training_patches(13, **share))
    assert not bad_network.proxy.script["GET"]


@pytest.mark.alone
@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "slow-first-byte", "stall", "flip"])
def test_a_fault_that_stays_ends_in_an_error_that_names_object_and_offset(
    bad_network: Setting, fault: Fault
) -> None:
    second = bad_network.manifest.shards["train"][0].batches[1]
    bad_network.proxy.script["GET"].append(None)
    bad_network.proxy.always["GET"] = fault
    one_thread = CONFIG.model_copy(update={"threads": 1, "retry_seconds": 1.0})
    began = time.monotonic()
    kind: type[LungsegError] = DataError if fault == "flip" else StorageError
    with (
        PatchStream(bad_network.store, bad_network.manifest, "train", one_thread, global_batch=4,
                    training=False) as stream,
        pytest.raises(kind) as caught,
    ):  # fmt: skip
        taken(stream)
    assert time.monotonic() - began < 5
    assert caught.value.code == ("shard-corrupt" if fault == "flip" else "store-unreachable")
    key = bad_network.manifest.shards["train"][0].key
    assert (caught.value.where["shard" if fault == "flip" else "key"], caught.value.where["offset"]) == (
        key,
        second.offset,
    )
    # Reads behind it in line are not begun, or the error would come after a second round of patience.
    assert len({(seen.path, seen.range) for seen in bad_network.proxy.seen}) == 2
    assert not our_threads()


READER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test run in the background has not
from lungseg.config import StreamConfig
from lungseg.dataset.manifest import load_manifest
from lungseg.stream.patch_stream import PatchStream
from lungseg.storage import open_store
store, config = open_store(sys.argv[1]), StreamConfig(threads=3, cache_dir=sys.argv[2])
with PatchStream(store, load_manifest(store, "d"), "train", config, global_batch=4) as stream:
    for batch in stream:
        print(batch.step, flush=True)
"""


@pytest.mark.alone
@pytest.mark.parametrize("fault", ["stall", "slow-first-byte", "503"])
def test_ctrl_c_ends_a_process_at_once_whatever_its_reads_wait_for(
    bad_network: Setting, tmp_path: Path, fault: Fault
) -> None:
    bad_network.store.put(data_manifest("d"), bad_network.manifest.to_bytes())
    bad_network.proxy.late_seconds = 60
    bad_network.proxy.script["GET"].extend([None] * 5)  # the manifest (twice) and three record batches
    bad_network.proxy.always["GET"] = fault
    command = [sys.executable, "-c", READER, bad_network.store.uri, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - began < 10
        assert process.returncode == -signal.SIGINT  # what Python makes of a KeyboardInterrupt
        assert errors.strip().endswith("KeyboardInterrupt")
    finally:
        process.kill()
    assert not list(tmp_path.rglob(".writing-*"))


def test_a_refusal_is_not_asked_again(bad_network: Setting) -> None:
    bad_network.proxy.always["GET"] = "403"
    with pytest.raises(StorageError, match="store-refused"):
        bad_network.store.get("data/d/shards/train-00000.arrow", 8, 8)
    bad_network.proxy.always.clear()
    with pytest.raises(StorageError, match="object-missing"):
        bad_network.store.get("data/d/no-such")
    assert len(bad_network.proxy.seen) == 2


@pytest.mark.parametrize("fault", ["reset-in-body", "truncate", "stall"])
def test_a_whole_object_is_read_again_on_a_new_connection(bad_network: Setting, fault: Fault) -> None:
    bad_network.proxy.script["GET"].extend([None, fault])
    shard = bad_network.manifest.shards["train"][1]
    for _ in range(2):
        out = bytearray(shard.bytes)
        bad_network.store.get_into(shard.key, 0, memoryview(out), Read(SHORT))
        assert hashlib.sha256(out).hexdigest() == shard.sha256
    good, failed, again = (seen.connection for seen in bad_network.proxy.seen)
    assert good == failed != again  # pooled as long as it works


def test_a_read_that_was_reset_takes_no_connection_that_was_open_then(bad_network: Setting) -> None:
    """They may lead to the same dead end; here one comes free while the read waits for its next try."""
    patience = replace(SHORT, first_wait_seconds=1.0, longest_wait_seconds=1.0)
    store = bad_network.store
    seen, shard = bad_network.proxy.seen, bad_network.manifest.shards["train"][0]
    outs = [bytearray(shard.bytes) for _ in range(2)]
    bad_network.proxy.late_seconds = 0.3
    bad_network.proxy.script["GET"].extend(["slow-first-byte", "reset-in-body"])
    with ThreadPoolExecutor(1) as other:
        slow = other.submit(store.get_into, shard.key, 0, memoryview(outs[0]), Read(patience))
        while not seen:
            time.sleep(0.01)
        store.get_into(shard.key, 0, memoryview(outs[1]), Read(patience))
        slow.result()
    assert outs[0] == outs[1]
    assert hashlib.sha256(outs[0]).hexdigest() == shard.sha256
    assert [one.fault for one in seen] == ["slow-first-byte", "reset-in-body", None]
    assert seen[2].connection not in {seen[0].connection, seen[1].connection}


@pytest.mark.slow
@pytest.mark.timeout(150)  # 15 s without a server, and up to half a minute until it has elected a leader
def test_a_server_killed_in_mid_epoch_and_started_again_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    back = threading.Timer(15, server.start)
    try:
        s3_client().create_bucket(Bucket=BUCKET)
        store = open_store(f"s3://{BUCKET}/x")  # as a user has it, with the default patience
        manifest = filled(store)
        # Two threads read at most eight batches ahead, of 36 that follow.
        with PatchStream(store, manifest, "train", StreamConfig(threads=2), global_batch=4) as stream:
            batches = taken(stream, 4)
            server.stop()
            back.start()
            killed = time.monotonic()
            batches += taken(stream, 36)
            assert time.monotonic() - killed > 15
        assert_same(batches, training_patches(40, seed=0, global_batch=4))
    finally:
        back.cancel()
        if back.ident:
            back.join()
        server.stop()
