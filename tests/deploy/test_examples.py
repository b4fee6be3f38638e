"""What each file of values makes, in a few lines: a change of a chart that touches an example shows here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.kuberay import pod_templates

ALWAYS = [
    "NetworkPolicy/lungseg",
    "PodDisruptionBudget/lungseg-head",
    "RayCluster/lungseg",
    "ServiceAccount/lungseg",
]
BUNDLED = [f"{kind}/lungseg-store" for kind in ("NetworkPolicy", "Secret", "Service", "StatefulSet")]
MONITORED = ["ConfigMap/lungseg-dashboard", "PodMonitor/lungseg", "PrometheusRule/lungseg"]
HEAD = {"cpu": 2, "memory": "8Gi"}
EXAMPLES: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
    "cpu": (ALWAYS + BUNDLED, [{"cpu": 1, "memory": "2Gi"}, HEAD, {"cpu": 4, "memory": "12Gi"}]),
    "gpu": (
        [*ALWAYS, *MONITORED, "Secret/lungseg-case-key"],
        [
            {"cpu": 4, "memory": "16Gi"},
            {"cpu": 32, "memory": "192Gi", "nvidia.com/gpu": 4, "ephemeral-storage": "220Gi"},
        ],
    ),
    "minio": (ALWAYS, [HEAD, {"cpu": 4, "memory": "16Gi"}]),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_makes_these_objects_and_pods(
    example: str, render: Callable[..., list[dict[str, Any]]]
) -> None:
    documents = render(
        "lungseg", "--values", str(Path(__file__).parents[2] / f"deploy/values-{example}.yaml")
    )
    objects, asked = EXAMPLES[example]
    assert sorted(f"{one['kind']}/{one['metadata']['name']}" for one in documents) == sorted(objects)
    assert [one["spec"]["containers"][0]["resources"]["limits"] for one in pod_templates(documents)] == asked
