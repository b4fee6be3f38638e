"""Prometheus' side of the metrics: HTTP, and its own parser."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from lungseg.config import TelemetryConfig


@dataclass(frozen=True)
class Endpoint:
    """An exporter's port on 127.0.0.1."""

    port: int

    @property
    def config(self) -> TelemetryConfig:
        return TelemetryConfig(metrics_port=self.port, push_seconds=0.2)

    @property
    def settings(self) -> tuple[str, str]:
        return f"telemetry.metrics_port={self.port}", "telemetry.push_seconds=0.2"

    def scrape(self) -> dict[tuple[str, str, str, str], float]:
        """Values by sample name, run, trial and rank; of a histogram without its buckets."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, *(sample.labels[label] for label in ("run", "trial", "rank"))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels
        }

    def wait(self, fulfilled: Callable[[dict[tuple[str, str, str, str], float]], bool]) -> None:
        """Scrape until what is there fulfils a condition; AssertionError after 30 s."""
        deadline, found = time.monotonic() + 30, {}
        while time.monotonic() < deadline:
            try:
                found = self.scrape()
            except OSError:
                found = {}  # between two lives of the exporter
            if fulfilled(found):
                return
            time.sleep(0.1)
        raise AssertionError(found)
