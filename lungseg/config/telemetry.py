"""Settings of metrics."""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field

from lungseg.config.fields import Frozen, Positive


def _cluster_default(name: str, otherwise: str | None = None) -> Any:
    return lambda: os.environ.get(f"LUNGSEG_{name}", otherwise)


class TelemetryConfig(Frozen):
    """Metrics for Prometheus. Who scrapes them is a matter of the cluster, whose charts set two defaults."""

    metrics_port: int | None = Field(
        default_factory=_cluster_default("METRICS_PORT"), ge=1, le=65535, description="default: no metrics"
    )
    metrics_host: str = Field(
        default_factory=_cluster_default("METRICS_HOST", "127.0.0.1"), description="address to listen on"
    )
    push_seconds: Positive = Field(5.0, description="between two reports of a worker to the endpoint")
    keep_seconds: Positive = Field(300.0, description="series vanish when nothing was reported for so long")
