"""What a training on Kubernetes does when something is taken from it, and what that costs.

    uv run python tests/benchmarks/faults.py [--only NAME ...]

The cluster is the one that KUBECONFIG names, with the image LUNGSEG_TEST_IMAGE, else one started as
`tests/kubernetes/conftest.py` says, whose image must be there; only such a one can lose a node. KubeRay's
operator is sent away too, so the cluster must be nobody else's. One tiny run of two workers on two nodes
trains through all faults, one checkpoint an epoch of 100 steps, a line of log every 10; each fault comes in
the middle of an epoch. Prints a table; what is seen meanwhile goes to standard error.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.watched import STEPS_PER_EPOCH, Watch  # noqa: E402
from helpers.kubernetes import Namespace, tool, wait  # noqa: E402
from helpers.release import PORTS, PREPARE, install, reached, run_job, write_values  # noqa: E402
from helpers.servers import ROOT  # noqa: E402

TOOLS = Path(os.environ.get("LUNGSEG_K8S_TOOLS", ROOT.parent / "shared/k8s"))
IMAGE = os.environ.get("LUNGSEG_TEST_IMAGE", "docker.io/library/lungseg:0.1.0")
AWAY_SECONDS = 60
TRAIN = ["--set=data=scans,run=faults,recipe=jobs/recipes/smoke.yaml", "--set=settings.train.workers=2"]
TRAIN += ["--set=settings.train.epochs=10000"]
TRAIN += [f"--set=settings.train.steps_per_epoch={STEPS_PER_EPOCH}"]
TRAIN += ["--set=settings.train.patience_epochs=10000,settings.train.max_failures=100"]


class Cluster:
    """One release in a namespace of its own, and its training, which `train` starts or starts again."""

    def __init__(self, kubeconfig: str, folder: Path) -> None:
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "KUBECONFIG": kubeconfig}
        tools = tool("helm", folder), tool("kubectl", folder)
        self.namespace = Namespace(f"lungseg-faults-{secrets.token_hex(3)}", environment, *tools)
        self.folder = folder / "release"
        self.folder.mkdir()

    def start(self) -> None:
        ours = self.namespace
        ours.kubectl("create", "namespace", ours.name)
        ours.kubectl("label", "namespace", ours.name, "pod-security.kubernetes.io/enforce=restricted")
        install(ours, write_values(ours, IMAGE, self.folder))
        run_job(ours, "prepare", *PREPARE)
        self.train()
        self.watch = Watch(self.namespace)

    def end(self) -> None:
        self.namespace.kubectl("delete", "namespace", self.namespace.name, "--wait=false")

    def train(self) -> None:
        self.namespace.helm("install", "train", "helm/lungseg-job", *TRAIN)

    def end_job(self) -> None:
        self.namespace.helm("uninstall", "train")
        gone = ["rayjob/train", "--for=delete", "--timeout=150s"]
        self.namespace.kubectl("wait", *gone, seconds=160)

    def delete(self, selector: str) -> None:
        """All pods of the label, without waiting for their end."""
        self.namespace.kubectl("delete", "pod", "-l", selector, "--wait=false")

    def a_worker(self) -> dict[str, str]:
        """Name and node of a worker; its node is not the head's."""
        (head,) = self.namespace.pods("ray.io/node-type=head")
        for pod in self.namespace.pods("ray.io/node-type=worker"):
            if pod["spec"]["nodeName"] != head["spec"]["nodeName"]:
                return {"name": pod["metadata"]["name"], "node": pod["spec"]["nodeName"]}
        raise AssertionError("no worker beside the head")

    def store_is_on(self, node: str) -> bool:
        (pod,) = self.namespace.pods("app.kubernetes.io/name=lungseg-store")
        return bool(pod["spec"]["nodeName"] == node)


Act = Callable[[Cluster], None]


def worker_deleted(cluster: Cluster) -> None:
    cluster.namespace.kubectl("delete", "pod", cluster.a_worker()["name"], "--wait=false")


def head_deleted(cluster: Cluster) -> None:
    cluster.delete("ray.io/node-type=head")


def store_deleted(cluster: Cluster) -> None:
    cluster.delete("app.kubernetes.io/name=lungseg-store")


def operator_away(cluster: Cluster) -> None:
    def scale(count: int) -> None:
        where = ["-n", "kuberay-system", "scale", "deployment/kuberay-operator"]
        cluster.namespace.kubectl(*where, f"--replicas={count}")

    scale(0)
    try:
        time.sleep(AWAY_SECONDS)
    finally:
        scale(1)


def node_drained(cluster: Cluster) -> None:
    node = cluster.a_worker()["node"]
    if cluster.store_is_on(node):
        cluster.watch.seen.note("the store's pod goes too")
    drain = ["drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s"]
    try:
        cluster.namespace.kubectl(*drain, seconds=200)
        cluster.watch.seen.note("node drained")
        time.sleep(AWAY_SECONDS)
    finally:
        cluster.namespace.kubectl("uncordon", node)
    cluster.watch.seen.note("node back")


def node_killed(cluster: Cluster) -> None:
    node = cluster.a_worker()["node"]
    if cluster.store_is_on(node):
        cluster.watch.seen.note("the store's pod goes too")
    _tools("kill", node)
    try:
        time.sleep(AWAY_SECONDS)
    finally:
        _tools("start", node)
    cluster.watch.seen.note("node back")


def job_stopped(cluster: Cluster) -> None:
    """As somebody would by hand."""
    (head,) = cluster.namespace.pods("ray.io/node-type=head")
    stop = ["exec", head["metadata"]["name"], "--", "ray", "job", "stop", cluster.watch.job["jobId"]]
    cluster.namespace.kubectl(*stop, seconds=180)
    wait("the job is stopped", lambda: cluster.watch.job.get("jobStatus") == "STOPPED", 150)
    cluster.end_job()
    cluster.train()


def job_uninstalled(cluster: Cluster) -> None:
    cluster.end_job()
    cluster.train()


def policy_tried(cluster: Cluster) -> None:
    for name, labels in {"a stranger": {}, "a listed peer": {"lungseg-peer": "listed"}}.items():
        found = reached(cluster.namespace, IMAGE, name.replace(" ", "-"), labels)
        cluster.watch.seen.note(
            f"{name} reaches {', '.join(sorted(found)) or 'nothing'} of {', '.join(PORTS)}"
        )


FAULTS: dict[str, tuple[str, Act]] = {
    "policy": ("pods of the same namespace try the ports", policy_tried),
    "operator": (f"the operator away for {AWAY_SECONDS} s", operator_away),
    "worker": ("a worker's pod deleted", worker_deleted),
    "store": ("the bundled store's pod deleted", store_deleted),
    "head": ("the head's pod deleted", head_deleted),
    "drain": (f"a worker's node drained, given back after {AWAY_SECONDS} s", node_drained),
    "node": (f"a worker's node without power for {AWAY_SECONDS} s", node_killed),
    "stop": ("`ray job stop`, then the job installed again", job_stopped),
    "uninstall": ("`helm uninstall` of the job, then installed again", job_uninstalled),
}


def _tools(*words: str) -> str:
    done = subprocess.run([str(TOOLS / "cluster"), *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def a_cluster() -> Iterator[Cluster]:
    kubeconfig = os.environ.get("KUBECONFIG") or _tools("up")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cluster = Cluster(kubeconfig, Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    names, rows = parser.parse_args().only, []
    with a_cluster() as cluster:
        for name in names:
            title, act = FAULTS[name]
            cluster.watch.until_steady()
            print(f"--- {title}", file=sys.stderr, flush=True)
            cluster.watch.begin()
            act(cluster)
            cluster.watch.until_settled()
            rows.append(f"| {title} | {' | '.join(cluster.watch.cells())} |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("| what | Kubernetes and KubeRay | lungseg | next step after, s | steps lost |")
    print("|---|---|---|--:|--:|", *rows, sep="\n")


if __name__ == "__main__":
    main()
