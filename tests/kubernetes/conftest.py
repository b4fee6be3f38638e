"""A cluster: the one that KUBECONFIG names, with an image that it has (LUNGSEG_TEST_IMAGE), else one that a
folder of tools starts on this machine (LUNGSEG_K8S_TOOLS, else ../shared/k8s), with an image made here.

`uv run pytest -n0 -m kubernetes tests/kubernetes` runs what is here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.kubernetes import Namespace, tool
from helpers.servers import ROOT

TOOLS = Path(os.environ.get("LUNGSEG_K8S_TOOLS", ROOT.parent / "shared/k8s"))
IMAGE = os.environ.get("LUNGSEG_TEST_IMAGE")
STORE_IMAGE = "docker.io/chrislusf/seaweedfs:4.48"
DISK = 22 << 30
"""Bytes of the archive and of what two nodes make of it. Short of them a node takes no pod, and each test
would wait a quarter of an hour before it fails."""
BUILT = "docker.io/library/lungseg:0.1.0"


@pytest.fixture(scope="session")
def kubeconfig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if "kubernetes" not in request.config.getoption("markexpr"):
        pytest.skip("a cluster is asked for by name: -m kubernetes")
    if given := os.environ.get("KUBECONFIG"):
        if IMAGE is None:
            pytest.skip(
                "KUBECONFIG names a cluster: set LUNGSEG_TEST_IMAGE to an image of lungseg that it has"
            )
        yield given
        return
    if not (TOOLS / "cluster").exists():
        pytest.skip(
            f"set KUBECONFIG, or LUNGSEG_K8S_TOOLS to a folder with what starts a cluster: no {TOOLS}"
        )
    running = Path("/var/tmp/lungseg-k8s/up").exists()
    config = _told(TOOLS / "cluster", "up")
    if IMAGE is None:
        free = shutil.disk_usage("/var/tmp").free
        assert free > DISK, (
            f"{free >> 30} GiB are free below /var/tmp, {DISK >> 30} are needed: remove something"
        )
        archive = tmp_path_factory.mktemp("image") / "image.tar"
        _told(TOOLS / "image", "build", ROOT, BUILT, archive)
        _told(TOOLS / "cluster", "load", archive)
        weed = Path(sysconfig.get_path("scripts")) / "weed"
        _told(TOOLS / "image", "wrap", weed, "/usr/bin/weed", STORE_IMAGE, archive)
        _told(TOOLS / "cluster", "load", archive)
        archive.unlink()
    yield config
    if not running:
        _told(TOOLS / "cluster", "down")


def _told(*command: str | Path) -> str:
    """What the command prints; pytest shows what it says of a failure."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, timeout=2300)
    assert done.returncode == 0, command
    return done.stdout.strip()


@pytest.fixture(scope="session")
def image() -> str:
    return IMAGE or BUILT


@pytest.fixture(scope="session")
def make_namespace(
    kubeconfig: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Namespace]]:
    """A namespace of its own at each call, for restricted pods only; all are told to go at the end."""
    home = tmp_path_factory.mktemp("tools")
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": kubeconfig}
    helm, kubectl = tool("helm", home), tool("kubectl", home)
    made: list[Namespace] = []

    def make() -> Namespace:
        namespace = Namespace(f"lungseg-test-{secrets.token_hex(3)}", environment, helm, kubectl)
        made.append(namespace)
        namespace.kubectl("create", "namespace", namespace.name)
        restricted = "pod-security.kubernetes.io/enforce=restricted"
        namespace.kubectl("label", "namespace", namespace.name, restricted)
        return namespace

    yield make
    for namespace in made:
        namespace.kubectl("delete", "namespace", namespace.name, "--wait=false")
