"""What processes push is served as one set of series, and nothing of it can hurt who pushes."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from typing import Any

import pytest
from helpers.scraping import Endpoint
from helpers.servers import ROOT, free_ports
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric

from lungseg.config import TelemetryConfig
from lungseg.exporter import Exporter, Merger, Source, pushing, start_exporter
from lungseg.telemetry import GROUP_METRICS, WORKER_METRICS


def counted(value: float, gauge: float | None = None) -> list[Metric]:
    registry = CollectorRegistry()
    Counter("c", "", registry=registry).inc(value)
    if gauge is not None:
        Gauge("g", "", registry=registry).set(gauge)
    return list(registry.collect())


def values(merger: Merger, now: float = 0.0) -> dict[tuple[str, str, str, str], float]:
    return {
        (s.name, s.labels["run"], s.labels["trial"], s.labels["rank"]): s.value
        for family in merger.families(now)
        for s in family.samples
        if not s.name.endswith("_created")
    }


@given(
    st.lists(
        st.tuples(st.sampled_from("01"), st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=30
    )
)
def test_a_counter_is_the_sum_over_a_ranks_lives_and_never_falls(pushes: list[tuple[str, str, int]]) -> None:
    """Also where a worker that was thought dead pushes between two pushes of its successor."""
    merger, lives, before = Merger(10), dict[tuple[str, str], int](), dict[str, float]()
    for rank, life, more in pushes:
        lives[rank, life] = lives.get((rank, life), 0) + more
        merger.push(Source("r", "t", rank), life, counted(lives[rank, life]), 0.0)
        found = values(merger)
        for one in {rank for rank, _ in lives}:
            total = found["c_total", "r", "t", one]
            assert total == sum(value for (owner, _), value in lives.items() if owner == one)
            assert total >= before.get(one, 0)
            before[one] = total


def test_a_gauge_is_what_the_last_push_said_and_survives_one_that_does_not_know() -> None:
    merger = Merger(10)
    for life, gauge in (("a", 0.25), ("b", 0.5), ("a", 0.125), ("c", None)):
        merger.push(Source("r"), life, counted(1, gauge), 0.0)
    assert values(merger)["g", "r", "", ""] == 0.125


def test_a_silent_source_vanishes_but_its_sums_last_as_long_as_its_run() -> None:
    merger, one, group = Merger(10), Source("r", "", "0"), Source("r")
    merger.push(one, "a", counted(3), 0)
    merger.push(Source("other"), "x", counted(1), 0)
    merger.push(group, "d", counted(0), 9)
    assert {key[1:] for key in values(merger, 10)} == {("r", "", "0"), ("r", "", ""), ("other", "", "")}
    assert {key[1:] for key in values(merger, 15)} == {("r", "", "")}
    merger.push(one, "b", counted(1), 18)
    assert values(merger, 18)["c_total", "r", "", "0"] == 4
    assert values(merger, 29) == {}
    merger.push(one, "c", counted(1), 30)
    assert values(merger, 30)["c_total", "r", "", "0"] == 1


@pytest.fixture(scope="module")
def worker(ray_cluster: Any, endpoint: Endpoint) -> Any:
    """Starts a rank in a process of its own, as Ray Train does."""
    exporter = start_exporter(endpoint.config)

    class Worker:  # in a function, so that Ray takes it along: its processes do not know this module
        def __init__(self, source: Source) -> None:
            from lungseg import exporter as room
            from lungseg import telemetry

            self._open = room.pushing(exporter, source, telemetry.WORKER_METRICS, 0.2)
            self._open.__enter__()

        def step(self, count: int, val_dice: float) -> int:
            from lungseg import telemetry

            for _ in range(count):
                telemetry.count_step(0.5, 0.25, 2)
            telemetry.VAL_DICE.set(val_dice)
            return os.getpid()

    return ray_cluster.remote(Worker).options(num_cpus=0).remote


def exporter_pid() -> int:
    import psutil  # Ray's own copy

    children = psutil.Process().children(recursive=True)
    (found,) = (one.pid for one in children if one.cmdline()[:1] == ["ray::Exporter"])
    return found


def test_two_trials_and_two_ranks_share_a_port_and_a_killed_one_counts_on(
    ray_cluster: Any, endpoint: Endpoint, worker: Any
) -> None:
    sources = [Source("sweep", trial, rank) for trial in ("a", "b") for rank in ("0", "1")]
    workers = [worker(source) for source in sources]
    pids = ray_cluster.get([w.step.remote(n + 1, n / 4) for n, w in enumerate(workers)])

    def steps(found: dict[Any, float], trial: str, rank: str) -> float | None:
        return found.get(("lungseg_step_seconds_count", "sweep", trial, rank))

    endpoint.wait(lambda found: [steps(found, s.trial, s.rank) for s in sources] == [1, 2, 3, 4])
    found = endpoint.scrape()
    assert found["lungseg_patches_total", "sweep", "b", "1"] == 8
    assert found["lungseg_step_seconds_sum", "sweep", "b", "0"] == 1.5
    assert found["lungseg_data_wait_seconds_total", "sweep", "b", "0"] == 0.75
    assert found["lungseg_val_dice", "sweep", "a", "1"] == 0.25
    assert found["lungseg_stream_bytes_total", "sweep", "a", "0"] == 0
    assert ("lungseg_train_loss", "sweep", "a", "0") not in found, "a gauge that nobody has set"

    os.kill(pids[3], signal.SIGKILL)
    again = worker(sources[3])
    endpoint.wait(lambda found: steps(found, "b", "1") == 4)
    ray_cluster.get(again.step.remote(5, 0.5))
    endpoint.wait(lambda found: steps(found, "b", "1") == 9)
    assert endpoint.scrape()["lungseg_val_dice", "sweep", "b", "1"] == 0.5


@pytest.mark.alone
def test_a_killed_exporter_costs_who_pushes_nothing_and_serves_again(
    ray_cluster: Any, endpoint: Endpoint, worker: Any
) -> None:
    pusher = worker(Source("survivor", "", "0"))
    ray_cluster.get(pusher.step.remote(1, 0.1))
    endpoint.wait(lambda found: found.get(("lungseg_val_dice", "survivor", "", "0")) == 0.1)
    os.kill(exporter_pid(), signal.SIGKILL)
    began = time.monotonic()
    ray_cluster.get(pusher.step.remote(1, 0.2), timeout=30)
    assert time.monotonic() - began < 3
    endpoint.wait(lambda found: found.get(("lungseg_val_dice", "survivor", "", "0")) == 0.2)
    assert endpoint.scrape()["lungseg_step_seconds_count", "survivor", "", "0"] == 2


@pytest.mark.alone
def test_leaving_waits_only_moments_for_an_exporter_that_is_gone_or_hangs(ray_cluster: Any) -> None:
    class Hanging:
        def push(self, *_: Any) -> None:
            time.sleep(3600)

    hanging, gone = (ray_cluster.remote(Hanging).options(num_cpus=0).remote() for _ in range(2))
    ray_cluster.kill(gone)
    for exporter in (hanging, gone):
        began = time.monotonic()
        with pushing(exporter, Source("r"), GROUP_METRICS, 0.05) as push:
            for _ in range(1000):
                push()
            assert time.monotonic() - began < 5
        assert time.monotonic() - began < 15
    ray_cluster.kill(hanging)


def test_a_taken_port_is_told_with_its_remedy_and_is_served_once_free() -> None:
    (port,) = free_ports(1)
    exporter = Exporter(TelemetryConfig(metrics_port=port))
    with socket.create_server(("127.0.0.1", port)):
        assert exporter.serve() == (f"127.0.0.1:{port}", "[Errno 98] Address already in use")
    exporter.push(Source("r", "", "0"), "a", counted(3))
    assert Endpoint(port).scrape()["c_total", "r", "", "0"] == 3


def test_metrics_are_served_by_an_exporter_that_starts_late(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungseg.exporter._START_SECONDS", 0)
    exporter = start_exporter(endpoint.config)
    with pushing(exporter, Source("late"), GROUP_METRICS, 0.2):
        endpoint.wait(lambda found: ("lungseg_restarts_total", "late", "", "") in found)


def test_without_a_port_there_is_no_exporter_and_pushing_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNGSEG_METRICS_PORT", raising=False)
    assert start_exporter(TelemetryConfig()) is None
    with pushing(None, Source("r"), WORKER_METRICS, 1) as push:
        push()


def test_the_runbook_lists_every_metric_with_its_type_labels_and_meaning() -> None:
    listed = set()
    for line in (ROOT / "deploy" / "README.md").read_text(encoding="utf-8").splitlines():
        if row := re.fullmatch(r"\| `(lungseg_\w+)` \| (\w+) \| (.+) \| (.+) \|", line):
            listed.add(row.groups())
    known = set()
    for registry, labels in ((WORKER_METRICS, "run, trial, rank"), (GROUP_METRICS, "run, trial")):
        for family in registry.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            known.add((name, family.type, labels, family.documentation))
    assert listed == known
