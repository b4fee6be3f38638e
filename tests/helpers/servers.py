"""Servers that tests start, and where things are."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
BUCKET = "lungseg-test"


@dataclass
class S3Server:
    """SeaweedFS on 127.0.0.1; `start` and `stop` (SIGKILL) may be repeated on the same folder."""

    folder: Path
    access_key: str = field(default_factory=lambda: secrets.token_hex(8))
    secret_key: str = field(default_factory=lambda: secrets.token_hex(16))
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        names = ("master.port", "volume.port", "filer.port", "s3.port")
        grpc = tuple(f"{name}.grpc" for name in names)  # by default port + 10000, which may not exist
        self.ports = dict(zip([*names, *grpc], free_ports(8), strict=True))
        self.endpoint = f"http://127.0.0.1:{self.ports['s3.port']}"
        credentials = {"accessKey": self.access_key, "secretKey": self.secret_key}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "test", "credentials": [credentials], "actions": actions}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        flags = [
            "-s3",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-volume.max=0",
            "-master.volumeSizeLimitMB=64",
        ]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={self.folder / 's3.json'}"]
        flags += [f"-dir={self.folder}", *(f"-{name}={port}" for name, port in self.ports.items())]
        weed = Path(sysconfig.get_path("scripts")) / "weed"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([weed, "server", *flags], stdout=log, stderr=log, cwd=self.folder)
        for _ in range(300):
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(self.endpoint + "/healthz", timeout=1)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait(timeout=20)
            self.process = None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all held at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def s3_client() -> Any:
    """Plain boto3, as a user without lungseg would have it."""
    import boto3
    from botocore.config import Config

    config = Config(
        request_checksum_calculation="when_required", response_checksum_validation="when_required"
    )
    # A session of its own: the default one keeps the credentials that it was first made with.
    return boto3.session.Session().client("s3", config=config)
