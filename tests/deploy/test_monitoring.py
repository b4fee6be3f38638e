"""What Prometheus and Grafana are given: metrics that exist, rules that fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lungseg.telemetry import GROUP_METRICS, WORKER_METRICS

EVERYTHING = ["--values", "tests/deploy/everything.yaml"]
RAYS_OWN = {"ray_placement_groups"}

Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents(render: Callable[..., list[Document]]) -> dict[str, Document]:
    found = {
        document["metadata"]["name"] + document["kind"]: document
        for document in render("lungseg", *EVERYTHING)
    }
    return {
        kind: found[name]
        for kind, name in {
            "monitor": "lungsegPodMonitor",
            "rules": "lungsegPrometheusRule",
            "dashboard": "lungseg-dashboardConfigMap",
        }.items()
    }


def exported() -> set[str]:
    """Names of the samples that lungseg serves."""
    families = [*WORKER_METRICS.collect(), *GROUP_METRICS.collect()]
    return {sample.name for family in families for sample in family.samples}


def queries(documents: dict[str, Document]) -> list[str]:
    """Of all panels of the dashboard."""
    panels = json.loads(documents["dashboard"]["data"]["lungseg.json"])["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def named(promql: str) -> set[str]:
    return set(re.findall(r"\b(?:lungseg|ray)_[a-z_]+\b", promql)) - {"ray_io_cluster"}


def test_both_endpoints_are_scraped_under_the_label_that_rays_dashboards_ask_for(
    documents: dict[str, Document],
) -> None:
    endpoints = documents["monitor"]["spec"]["podMetricsEndpoints"]
    assert [one["port"] for one in endpoints] == ["metrics", "training"]
    assert {one["relabelings"][0]["targetLabel"] for one in endpoints} == {"ray_io_cluster"}


def test_every_panel_shows_metrics_that_exist(documents: dict[str, Document]) -> None:
    config = documents["dashboard"]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(config["data"]["lungseg.json"])
    assert set.union(*map(named, queries(documents))) <= exported()
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"]) >= 10


def test_every_alert_asks_for_metrics_that_exist_and_says_which_run(documents: dict[str, Document]) -> None:
    (group,) = documents["rules"]["spec"]["groups"]
    for rule in group["rules"]:
        assert named(rule["expr"]) <= exported() | RAYS_OWN
        assert "{{ $labels." in rule["annotations"]["summary"]


def test_alerts_fire_when_they_should_and_not_before(documents: dict[str, Document], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH: it is in Debian's package prometheus")
    cases = yaml.safe_load(Path(__file__).with_name("alerts_test.yaml").read_text())
    recorded = {"name": "panels", "rules": [{"record": "panel", "expr": one} for one in queries(documents)]}
    rules = {"groups": [*documents["rules"]["spec"]["groups"], recorded]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], **cases}))
    done = subprocess.run(
        [promtool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = {case["alertname"] for test in cases["tests"] for case in test["alert_rule_test"]}
    assert asked == {rule["alert"] for rule in documents["rules"]["spec"]["groups"][0]["rules"]}
