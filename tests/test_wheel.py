"""What is installed holds all that the package reads beside its code."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Pages, their styles, and the viewer with the notices that it must not travel without."""
    tracked = subprocess.run(
        ["git", "ls-files", "lungseg"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    files = set(tracked.stdout.splitlines())
    folder = "lungseg/segment/outputs/viewer"
    assert {f"{folder}/niivue.umd.js", f"{folder}/NOTICES.txt", "lungseg/show/page.css"} <= files

    uv = shutil.which("uv")
    assert uv, "uv builds the wheel"
    command = [uv, "build", "--wheel", "--quiet", "--out-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)

    (built,) = tmp_path.glob("*.whl")
    with ZipFile(built) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("lungseg/")}
        assert held == files
        for name in files:
            assert wheel.read(name) == (ROOT / name).read_bytes(), name
        (licence,) = (name for name in wheel.namelist() if name.endswith("/licenses/LICENSE"))
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
