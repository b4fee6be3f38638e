"""The charts' README.md say what values.yaml says, and values.yaml names all that the schema allows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHARTS = ["lungseg", "lungseg-job"]
ELSEWHERE = {"global", "minReplicas", "maxReplicas"}  # helm's own; told at replicas


def leaves(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        if name in ELSEWHERE:
            continue
        items = field.get("items", {}) if field.get("type") == "array" else {}
        if "properties" in items and name != "extraEnv":
            yield from leaves(items, f"{prefix}{name}[].")
        elif field.get("additionalProperties") is False:
            yield from leaves(field, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_they_are_what_the_command_writes() -> None:
    done = subprocess.run(
        [sys.executable, ".ci/values", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("chart", CHARTS)
def test_they_name_every_value_that_the_schema_takes(chart: str) -> None:
    schema = json.loads((ROOT / "helm" / chart / "values.schema.json").read_text())
    named = set(re.findall(r"^\| `([^`]+)`", (ROOT / "helm" / chart / "README.md").read_text(), re.MULTILINE))
    assert set(leaves(schema)) - named == set()
