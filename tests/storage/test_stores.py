"""One behaviour of a store, whether it is a folder or a real S3 server."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.faults import fault_proxy
from helpers.servers import S3Server

from lungseg.errors import ConfigError, StorageError
from lungseg.storage import Patience, Store, folder, open_store


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path if request.param == "folder" else request.getfixturevalue("s3_uri"))


def test_ranged_get_gives_exactly_the_bytes_asked_for(store: Store) -> None:
    store.put("a/b", bytes(range(100)))
    assert store.get("a/b", 10, 5) == bytes(range(10, 15))
    assert store.get("a/b", 95) == bytes(range(95, 100))
    assert store.get("a/b", 3, 0) == b""
    assert store.size("a/b") == 100


def test_a_range_beyond_the_end_is_an_error_and_not_fewer_bytes(store: Store) -> None:
    store.put("short", b"1234")
    with pytest.raises(StorageError, match="object-truncated") as caught:
        store.get("short", 2, 10)
    assert caught.value.where["offset"] == 2


def test_of_many_writers_exactly_one_puts_if_absent(store: Store) -> None:
    won: list[int] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        if store.put_if_absent("claim", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("claim") == str(won[0]).encode()


def test_writing_listing_and_deleting_side_by_side_never_trips_over_an_empty_folder(store: Store) -> None:
    def work(number: int) -> None:
        for turn in range(40):
            key = f"deep/er/{turn % 2}/{number}"
            store.put(key, b"1")
            assert store.exists(key)
            list(store.find("deep/"))
            store.delete([key])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(store.find("")) == []


def test_a_full_disk_is_told_as_what_it_is_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written goes to the device that is always full."""
    fill = folder._fill
    monkeypatch.setattr(folder, "_fill", lambda _, data: fill(Path("/dev/full"), data))
    store = open_store(tmp_path / "store")
    for write in (lambda: store.put("key", b"1"), lambda: store.put_if_absent("key", b"1")):
        with pytest.raises(StorageError, match="store-full") as caught:
            write()
        assert "free space" in caught.value.remedy
    assert list(store.find()) == []


@pytest.mark.parametrize("writer", ["us", "another with other bytes", "another with our bytes"])
def test_whose_object_it_is_after_a_lost_answer_is_told_by_its_bytes(
    s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """The last case is no mistake that can be avoided, and why a claim holds something random."""
    if writer != "us":
        open_store(s3_uri).put("claim", b"ours" if "our" in writer else b"theirs")
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.script["PUT"].append("lose-answer")
        store = open_store(s3_uri)
        assert store.put_if_absent("claim", b"ours") == (writer != "another with other bytes")
        assert [seen.fault for seen in proxy.seen if seen.method == "PUT"] == ["lose-answer", None]
        # Without a lost answer there is no doubt, whatever the bytes.
        assert not store.put_if_absent("claim", b"ours")


@pytest.mark.slow
def test_writes_outlive_a_server_that_is_away_and_a_claim_stays_ours(
    s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """25 s of refusals are more than botocore's own six attempts outlast."""
    (tmp_path / "file").write_bytes(b"of a file")
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3_uri)
        store.put("old", b"")
        for method in ("PUT", "HEAD", "DELETE"):
            proxy.always[method] = "503"
        proxy.script["PUT"].append("lose-answer")  # the first PUT is the claim's, and arrives
        timer = threading.Timer(25, proxy.always.clear)
        timer.start()
        claimed: list[bool] = []
        threads = [threading.Thread(target=lambda: claimed.append(store.put_if_absent("claim", b"ours")))]
        threads[0].start()
        while not proxy.seen or proxy.seen[-1].fault != "503":
            time.sleep(0.05)
        threads += [
            threading.Thread(target=store.put, args=("bytes", b"some")),
            threading.Thread(target=store.put, args=("file", tmp_path / "file")),
            threading.Thread(target=store.delete, args=(["old"],)),
            threading.Thread(target=store.size, args=("bytes",)),
        ]
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        assert claimed == [True]
        assert [item.key for item in store.find()] == ["bytes", "claim", "file"]
        assert store.get("file") == b"of a file"


def test_waiting_for_a_server_fills_the_seconds_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lungseg.storage.base.time", SimpleNamespace(monotonic=lambda: now))
    for _ in range(200):
        waits = []
        for wait in Patience().waits():
            now += wait
            waits.append(wait)
        assert sum(waits) == pytest.approx(120)  # so a server may be away for longer than it takes to restart
        assert max(waits) <= 5
        assert waits[0] <= 0.2
        assert len(waits) < 100
    assert len(list(Patience(attempts=3).waits())) == 2
    assert list(Patience(seconds=0).waits()) == []


def test_find_and_folders_see_keys_as_the_layout_has_them(store: Store) -> None:
    for key in ("runs/b/run.json", "runs/a/run.json", "runs/a/x/1", "runsheet"):
        store.put(key, b"x")
    assert [item.key for item in store.find("runs/")] == ["runs/a/run.json", "runs/a/x/1", "runs/b/run.json"]
    assert store.folders("runs/") == ["a", "b"]
    assert store.folders("nothing/") == []


def test_delete_takes_what_is_there_and_forgives_what_is_not(store: Store) -> None:
    store.put("x/y", b"1")
    store.delete(["x/y", "x/z"])
    assert not store.exists("x/y")
    assert list(store.find()) == []


def test_a_missing_object_is_named(store: Store) -> None:
    with pytest.raises(StorageError, match="object-missing") as caught:
        store.get("no/such")
    assert caught.value.where["key"] == "no/such"


def test_a_file_is_put_as_its_bytes(store: Store, tmp_path: Path) -> None:
    file = tmp_path.parent / f"{tmp_path.name}-file"
    file.write_bytes(b"abc" * 1000)
    store.put("file", file)
    assert store.get("file") == b"abc" * 1000


def test_json_with_nan_is_refused_and_broken_json_named(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.put_json("bad", {"x": float("nan")})
    store.put("broken", b"{")
    with pytest.raises(StorageError, match="object-corrupt"):
        store.get_json("broken")


def test_a_pickled_store_works_and_carries_no_credentials(s3_uri: str, s3_server: object) -> None:
    store = open_store(s3_uri)
    store.put("k", b"v")
    data = pickle.dumps(store)
    for secret in (s3_server.access_key, s3_server.secret_key):  # type: ignore[attr-defined]
        assert secret.encode() not in data
    assert pickle.loads(data).get("k") == b"v"


def test_a_folder_shows_no_half_written_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.put("k", b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="store-full"):
        store.put("k", b"new")
    assert store.get("k") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


@pytest.mark.parametrize("key", ["/etc/passwd", "a/../../b"])
def test_a_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(StorageError, match="store-refused"):
        open_store(tmp_path).put(key, b"")


@pytest.mark.parametrize("uri", ["s3://", "gs://bucket/x", "http://somewhere"])
def test_a_store_is_a_folder_or_s3(uri: str) -> None:
    with pytest.raises(ConfigError, match="store-uri"):
        open_store(uri)


def test_wrong_credentials_and_missing_buckets_say_so(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="store-missing: no such bucket"):
        open_store("s3://no-such-bucket/x").check()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="store-refused") as caught:
        open_store(s3_uri).get("k")
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.remedy


def test_a_server_that_is_not_there_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(StorageError, match="store-unreachable"):
        open_store("s3://bucket/x").check()
