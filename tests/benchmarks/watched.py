"""What a training on Kubernetes does, seen from outside about once a second: its pods, RayJob and log."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from helpers.kubernetes import FINAL, Namespace, wait

STEPS_PER_EPOCH = 100
SETTLED_SECONDS = 30
_STEP = re.compile(r"epoch (\d+), step (\d+)/")
_START = re.compile(r"from epoch \d+, step (\d+)")
_TOLD = {
    re.compile(r"asked to leave: (committed step \d+)"): r"\1",
    re.compile(r"worker \d+ failed: ([\w-]+)"): r"a worker failed (\1)",
    re.compile(r"(waiting for (?:\d+ workers?|the store|Ray))"): r"\1",
    re.compile(r"(stopping): "): r"\1",
    re.compile(r"^lungseg: (?:unexpected )?(\w[\w-]*)"): r"last line: \1",
    _START: r"went on from step \1",
}


@dataclass
class Seen:
    """What happened since a fault: each thing with the seconds at which it did."""

    began: float = field(default_factory=time.monotonic)
    cluster: dict[str, list[float]] = field(default_factory=dict)
    lungseg: dict[str, list[float]] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Of Kubernetes, KubeRay, or whoever acts on them."""
        self._add(self.cluster, text)

    def tell(self, text: str) -> None:
        """Of lungseg; a repetition is left out."""
        if text not in self.lungseg:
            self._add(self.lungseg, text)

    def _add(self, told: dict[str, list[float]], text: str) -> None:
        told.setdefault(text, []).append(time.monotonic() - self.began)
        print(f"    {text} ({told[text][-1]:.0f} s)", file=sys.stderr, flush=True)

    def cells(self) -> list[str]:
        def cell(told: dict[str, list[float]]) -> str:
            each = [f"{text} ({', '.join(f'{at:.0f}' for at in times)} s)" for text, times in told.items()]
            return "; ".join(each) or "nothing"

        return [cell(self.cluster), cell(self.lungseg)]


class Watch:
    """Looks from a thread of its own at the RayJob `train` of a namespace. Steps are counted over all epochs;
    every step and start of the workers stands with the time at which its line was first seen."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace, self.seen = namespace, Seen()
        self.steps: list[tuple[float, int]] = []
        self.starts: list[tuple[float, int]] = []
        self.job: dict[str, Any] = {}
        self._pods: dict[str, bool] = {}
        self._log, self._read = ("", ""), 0
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def begin(self) -> None:
        """A fault comes now."""
        self.seen = Seen()

    def until_steady(self) -> None:
        """Until the middle of an epoch, the second at least since the last start, with all pods there."""

        def steady() -> bool:
            since = self._since_start()
            middle = bool(since) and 1 / 3 < since[-1] % STEPS_PER_EPOCH / STEPS_PER_EPOCH < 2 / 3
            return middle and since[-1] - since[0] >= STEPS_PER_EPOCH and self._complete()

        wait("it trains steadily", steady, 600)

    def until_settled(self) -> None:
        """Until it has trained for a while, with all pods there."""
        began = time.monotonic()

        def settled() -> bool:
            times = [at for at, _ in self.steps if at > self._last_start()]
            now = time.monotonic()
            long = now - max(began, *times[:1], self._last_start()) > SETTLED_SECONDS
            return bool(times) and now - times[-1] < 10 and long and self._complete()

        wait("it trains on", settled, 600)

    def cells(self) -> list[str]:
        """Of a row: what Kubernetes and lungseg did, seconds until the next step, and the steps lost.

        Where the workers were not started again, the seconds are the longest between two lines of steps.
        """
        seen = self.seen
        starts = [one for one in self.starts if one[0] > seen.began]
        if starts:
            after = next(at for at, _ in self.steps if at > starts[-1][0]) - seen.began
        else:
            times = [at for at, _ in self.steps if at > seen.began - SETTLED_SECONDS]
            after = max(later - earlier for earlier, later in itertools.pairwise(times))
        lost, before = 0, [one for one in self.starts if one[0] <= seen.began][-1][0]
        for at, step in starts:
            done = [number for when, number in self.steps if before < when < at]
            lost, before = lost + max(0, max(done, default=step) - step), at
        return [*seen.cells(), f"{after:.0f}", str(lost)]

    def _last_start(self) -> float:
        return self.starts[-1][0] if self.starts else 0.0

    def _since_start(self) -> list[int]:
        return [number for at, number in self.steps if at > self._last_start()]

    def _complete(self) -> bool:
        return len(self._pods) == 4 and all(self._pods.values())

    def _watch(self) -> None:
        while True:
            try:
                self._look()
            except (AssertionError, subprocess.TimeoutExpired) as error:  # what is watched may be away
                print(f"    - {str(error).splitlines()[-1][:120]}", file=sys.stderr)
            time.sleep(0.5)

    def _look(self) -> None:
        items = self._namespace.get("pods,rayjobs")["items"]
        pods = {one["metadata"]["uid"]: one for one in items if _role(one)}
        for uid, pod in pods.items():
            ready, was = _ready(pod), self._pods.get(uid)
            if ready and not was and self.steps:
                self.seen.note(f"{_role(pod)} {'ready again' if was is False else 'replaced'}")
            if ready or was is not None:
                self._pods[uid] = ready
        self._pods = {uid: ready for uid, ready in self._pods.items() if uid in pods}
        jobs = [one for one in items if one["kind"] == "RayJob" and one["metadata"]["name"] == "train"]
        status = jobs[0].get("status", {}) if jobs else {}
        if status.get("jobStatus") in FINAL and status.get("jobStatus") != self.job.get("jobStatus"):
            self.seen.note(f"RayJob {status['jobStatus']}")
        self.job = status
        heads = [pod for pod in pods.values() if _role(pod) == "head" and _ready(pod)]
        if heads and status.get("jobId"):
            self._read_log(heads[0]["metadata"], status["jobId"])

    def _read_log(self, head: dict[str, Any], job: str) -> None:
        if self._log != (head["uid"], job):
            if self.steps:
                self.seen.note("job submitted again")
            self._log, self._read = (head["uid"], job), 0
        file = f"/tmp/ray/session_latest/logs/job-driver-{job}.log"
        show = f"tail -c +{self._read + 1} {file} 2>/dev/null || true"
        text = self._namespace.kubectl("exec", head["name"], "--", "sh", "-c", show, seconds=20)
        text = text[: text.rfind("\n") + 1]
        self._read += len(text.encode())
        for line in text.splitlines():
            self._heed(line, time.monotonic())

    def _heed(self, line: str, now: float) -> None:
        if found := _STEP.search(line):
            self.steps.append((now, (int(found[1]) - 1) * STEPS_PER_EPOCH + int(found[2])))
        if found := _START.search(line):
            self.starts.append((now, int(found[1])))
        for pattern, text in _TOLD.items():
            if found := pattern.search(line):
                self.seen.tell(found.expand(text))


def _role(item: dict[str, Any]) -> str:
    labels = item["metadata"].get("labels", {})
    store = "store" if labels.get("app.kubernetes.io/name") == "lungseg-store" else ""
    return str(labels.get("ray.io/node-type", store)) if item["kind"] == "Pod" else ""


def _ready(pod: dict[str, Any]) -> bool:
    """A pod that is told to go counts no more."""
    conditions = pod["status"].get("conditions", [])
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]
