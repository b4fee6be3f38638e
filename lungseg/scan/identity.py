"""Case ids that tell nothing of a patient: a keyed hash of the name that a scan has on disk.

File and folder names often hold a patient's name or number, and a plain hash of such a name is found by
trying names. HMAC-SHA256 with a key that stays with its owner gives the same id for the same name and key,
on every machine and at every resume, and no way back without the key. The key is LUNGSEG_CASE_KEY, or else a
random one that is made once in the user's configuration folder, for that user's eyes only. It is never
written to a store: whoever could read both could try names again.

Only ids leave the process that lists the scans; `lungseg ids` shows which scan has which.
"""

from __future__ import annotations

import hmac
import os
import secrets
import unicodedata
from pathlib import Path

import numpy as np

from lungseg.errors import ConfigError
from lungseg.scan.volume import Volume
from lungseg.telemetry import log

VARIABLE = "LUNGSEG_CASE_KEY"
SHORTEST_KEY = 16
ID_BYTES = 8  # two of a million scans share an id with a probability of 3e-8


def case_id(name: str, key: bytes) -> str:
    """16 hex digits; bytes of a file's name that are no UTF-8 count as they are."""
    return hmac.digest(key, os.fsencode(as_read(name)), "sha256")[:ID_BYTES].hex()


def scan_id(volume: Volume, key: bytes) -> str:
    """16 hex digits of the voxels and where they lie: the same for the same scan, whatever it is called."""
    grid = volume.geometry
    place = [*grid.spacing_mm, *grid.origin_lps_mm, *np.ravel(grid.direction_lps)]
    seen = hmac.new(key, repr((grid.shape_zyx, np.round(place, 3).tolist())).encode(), "sha256")
    seen.update(np.ascontiguousarray(volume.volume_hu, "<i2"))
    return seen.hexdigest()[: 2 * ID_BYTES]


def as_read(name: str) -> str:
    """The name as people compare it: macOS writes "ö" as two characters."""
    return unicodedata.normalize("NFC", name)


def case_key() -> bytes:
    """The key of this user. Raises ConfigError: "case-key-short", "case-key-missing", "case-key-unusable"."""
    given = os.environ.get(VARIABLE)
    if given:
        return _checked(os.fsencode(given), f"the environment variable {VARIABLE}")
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        remedy = (
            f"set {VARIABLE} from a Secret: a pod's files are lost with it, and with its key all case ids"
        )
        raise ConfigError("case-key-missing", remedy=remedy)
    path = key_file()
    try:
        return _checked(path.read_bytes().strip() if path.exists() else _make(path), str(path))
    except OSError as error:
        remedy = f"set {VARIABLE} to at least {SHORTEST_KEY} random characters ({error.strerror})"
        raise ConfigError("case-key-unusable", file=path, remedy=remedy) from error


def key_file() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "lungseg" / "case.key"


def _checked(key: bytes, place: str) -> bytes:
    if len(key) < SHORTEST_KEY:
        remedy = f"use at least {SHORTEST_KEY} random characters, e.g. from `openssl rand -hex 32`"
        raise ConfigError("case-key-short", key=place, remedy=remedy)
    return key


def _make(path: Path) -> bytes:
    """A new key; of two processes that make one at once, both use that of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{os.getpid()}-{path.name}")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")
    try:
        os.link(fresh, path)
        log("data").info("case ids are keyed by %s, made now: keep it, or they change", path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_bytes().strip()
