"""The image and the laptop stack, as far as they can be judged without a container engine."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout


def test_the_build_context_holds_all_that_the_dockerfile_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_runs_as_any_user_but_root_and_finds_the_jobs_below_its_working_folder() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    final = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert "USER 1000:0" in final
    assert any("chmod -R g=u /home/lungseg /app" in line for line in final)
    assert any("HOME=/home/lungseg" in line for line in final)
    assert "WORKDIR /app" in final
    assert "COPY jobs ./jobs" in final


def test_the_labels_of_the_image_say_what_pyproject_says() -> None:
    labels = dict(
        re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', (ROOT / "Dockerfile").read_text())
    )
    names = {"title": "name", "version": "version", "licenses": "license", "description": "description"}
    assert labels == {label: PROJECT[field] for label, field in names.items()}


def test_the_base_can_be_given_by_digest_and_no_registry_serves_the_syntax() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert not any(line.startswith("# syntax=") for line in lines)
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert set(bases) == {"${PYTHON_IMAGE}"}


@pytest.mark.parametrize("extra", ["", "gpu"])
def test_the_lock_pins_by_hash_without_addresses_what_pyproject_asks_for(extra: str) -> None:
    text = (ROOT / "deploy" / f"requirements{extra and '-'}{extra}.lock").read_text()
    assert "uv export" in text.splitlines()[1]
    assert "://" not in text
    assert not re.search(r"^--", text, re.MULTILINE), "an option, such as an index"
    entries = re.findall(
        r"^([a-z0-9-]+)==([^ ;]+).*((?:\n    --hash=sha256:[0-9a-f]{64}.*)*)", text, re.MULTILINE
    )
    assert [name for name, _, hashes in entries if not hashes] == []
    pinned = {canonicalize_name(name): version for name, version, _ in entries}
    asked = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else ())]
    for requirement in map(Requirement, asked):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (
            f"{requirement} is {version} in the lock: run .ci/lock"
        )


def test_the_laptop_stack_listens_on_this_machine_only_and_holds_no_secret() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)
    environment = services["head"]["environment"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        assert environment[name] is None, "not handed on from the shell"


def test_the_laptop_stack_and_the_chart_start_the_same_store() -> None:
    stack = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]["store"]
    chart = (ROOT / "helm/lungseg/templates/objectstore.yaml").read_text()
    values = yaml.safe_load((ROOT / "helm/lungseg/values.yaml").read_text())
    assert stack["image"] == values["objectStore"]["bundled"]["image"]
    for argument in stack["command"]:
        assert f"- {argument}\n" in chart


def test_the_image_has_the_ray_that_the_chart_announces() -> None:
    ray = yaml.safe_load((ROOT / "helm/lungseg/values.yaml").read_text())["rayVersion"]
    assert f"ray[default,train,tune]=={ray.rpartition('.')[0]}.*" in (ROOT / "pyproject.toml").read_text()
