"""One HTTP endpoint a cluster with the metrics of every run and trial on it.

A worker cannot serve its own: its node, port and life are Ray's to choose, and several trials share a node.
So each process pushes what it counted to one actor, which adds up and serves. Nothing here may hurt
training: pushes leave from a thread of their own, one at a time, and a silent exporter costs a warning.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Metric, start_http_server

from lungseg.config import TelemetryConfig
from lungseg.errors import ConfigError
from lungseg.telemetry import GROUP_METRICS, RESTARTS, log

NAME = NAMESPACE = "lungseg-exporter"
_START_SECONDS, _ANSWER_SECONDS = 30.0, 2.0
_log = log("exporter")


@cache
def _generation(process: int) -> str:
    """Of this process, which may be a fork of another: its counters began at 0 with it."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Source:
    """Whose metrics they are: the labels of its series. `trial` is empty outside a sweep, `rank` for what
    concerns all workers together."""

    run: str
    trial: str = ""
    rank: str = ""


@dataclass
class _Held:
    """The last push of each generation of a source, the newest last."""

    seen: float = 0.0
    pushes: dict[str, list[Metric]] = field(default_factory=dict)

    def totals(self) -> Iterator[tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]]:
        """Each family with its samples: counters and histograms summed over the generations, so that they
        never fall when a worker begins anew; gauges as last pushed."""
        families: dict[str, tuple[Metric, dict[Any, float]]] = {}
        for push in self.pushes.values():
            for family in push:
                _, values = families.setdefault(family.name, (family, {}))
                for sample in family.samples:
                    key = sample.name, tuple(sample.labels.items())
                    before = 0.0 if family.type == "gauge" else values.get(key, 0.0)
                    values[key] = before + sample.value
        yield from families.values()


class Merger:
    """What all sources pushed, as one set of series. Times are seconds of any one clock.

    A source that was silent for `keep_seconds` shows no series; its sums are forgotten only when its whole
    run or trial was silent, so that they survive a long wait for a new node.
    """

    def __init__(self, keep_seconds: float) -> None:
        self._keep_seconds = keep_seconds
        self._held: dict[Source, _Held] = {}

    def push(self, source: Source, generation: str, families: list[Metric], now: float) -> None:
        held = self._held.setdefault(source, _Held())
        held.seen = now
        held.pushes.pop(generation, None)
        held.pushes[generation] = families

    def families(self, now: float) -> list[Metric]:
        fresh = {source for source, held in self._held.items() if now - held.seen <= self._keep_seconds}
        alive = {(source.run, source.trial) for source in fresh}
        self._held = {s: held for s, held in self._held.items() if (s.run, s.trial) in alive}
        merged: dict[str, Metric] = {}
        for source in sorted(fresh, key=lambda s: (s.run, s.trial, s.rank)):
            labels = {"run": source.run, "trial": source.trial, "rank": source.rank}
            for family, values in self._held[source].totals():
                empty = Metric(family.name, family.documentation, family.type)
                whole = merged.setdefault(family.name, empty)
                for (name, own), value in values.items():
                    whole.add_sample(name, {**labels, **dict(own)}, value)
        return list(merged.values())


class Exporter:
    """The actor: takes pushes, and answers scrapes from threads of its own."""

    def __init__(self, config: TelemetryConfig) -> None:
        self._config = config
        self._merger = Merger(config.keep_seconds)
        self._lock = threading.Lock()
        self._server: Any = None

    def push(self, source: Source, generation: str, families: list[Metric]) -> None:
        self.serve()  # after Ray restarted this actor, or when another process has freed the port
        with self._lock:
            self._merger.push(source, generation, families, time.monotonic())

    def collect(self) -> list[Metric]:
        """Called by prometheus_client for each scrape."""
        with self._lock:
            return self._merger.families(time.monotonic())

    def serve(self) -> tuple[str, str]:
        """Listen, if not yet; the address, and what is in the way (empty if nothing)."""
        host, port = self._config.metrics_host, self._config.metrics_port
        assert port is not None
        address, problem = f"{host}:{port}", ""
        if self._server is None:
            registry = CollectorRegistry()
            registry.register(self)
            try:
                self._server, _ = start_http_server(port, host, registry)
            except OSError as error:
                problem = str(error)
        return address, problem


def start_exporter(config: TelemetryConfig) -> Any | None:
    """The exporter of this cluster, which the first run that asks for metrics starts, on the head's node;
    it lives as long as the cluster. None if no metrics are asked for, or it cannot be had; one that a busy
    head has not started yet is returned, since it takes what waits for it once it has."""
    if config.metrics_port is None:
        return None
    import ray

    actor: Any = ray.remote(Exporter)
    try:
        exporter = actor.options(
            name=NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            # An actor that asks for nothing goes anywhere, whatever node it would rather have.
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
        ).remote(config)
        address, problem = ray.get(exporter.serve.remote(), timeout=_START_SECONDS)
    except ray.exceptions.GetTimeoutError:
        _log.warning("training goes on; its metrics are served as soon as their exporter has started")
        return exporter
    except ray.exceptions.RayError as error:
        _log.warning("training goes on without metrics, since their exporter did not start: %s", error)
        return None
    if problem:
        remedy = "set telemetry.metrics_port to a free port, or end what listens there"
        taken = ConfigError("metrics-port-taken", address=address, message=problem, remedy=remedy)
        _log.warning("training goes on, but its metrics are not served: %s", taken)
    else:
        _log.info("metrics: http://%s/metrics", address)
    return exporter


@contextmanager
def pushing(
    exporter: Any | None, source: Source, registry: CollectorRegistry, every_seconds: float
) -> Iterator[Callable[[], None]]:
    """Push a registry from a thread, every few seconds and at the end; yields a function that asks for a
    push now and returns at once.

    While a push has not been answered no other follows, so a slow exporter finds one waiting, not many.
    """
    if exporter is None:
        yield lambda: None
        return
    due, ended = threading.Event(), threading.Event()
    arguments = (exporter, source, registry, every_seconds, due, ended)
    thread = threading.Thread(target=_push_until, args=arguments, name="lungseg-metrics", daemon=True)
    thread.start()
    try:
        yield due.set
    finally:
        ended.set()
        due.set()
        thread.join(2 * _ANSWER_SECONDS)


def _push_until(
    exporter: Any,
    source: Source,
    registry: CollectorRegistry,
    every_seconds: float,
    due: threading.Event,
    ended: threading.Event,
) -> None:
    import ray

    answer, warned, last = None, False, False
    while not last:
        due.wait(every_seconds)
        due.clear()
        last = ended.is_set()
        try:
            if answer is None or ray.wait([answer], timeout=0)[0]:
                answer = _push_now(exporter, source, registry)
            ray.get(answer, timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError as error:
            if not warned:
                _log.warning("metrics are not reaching their exporter; training goes on: %s", error)
            warned = True


def count_restart(exporter: Any | None, source: Source) -> None:
    """Count a restart of all workers, in whatever process sees to it, and push that without waiting."""
    RESTARTS.inc()
    if exporter is not None:
        _push_now(exporter, source, GROUP_METRICS)


def _push_now(exporter: Any, source: Source, registry: CollectorRegistry) -> Any:
    """Hand a registry's samples to Ray, without waiting; the future of the exporter's answer."""
    return exporter.push.remote(source, _generation(os.getpid()), list(_samples(registry.collect())))


def _samples(families: Iterable[Metric]) -> Iterator[Metric]:
    """Without gauges that were never set, and without the clock times that prometheus_client adds."""
    for family in families:
        family.samples = [
            one for one in family.samples if not (one.name.endswith("_created") or math.isnan(one.value))
        ]
        if family.samples:
            yield family
