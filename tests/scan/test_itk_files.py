"""NRRD and MetaImage: what their headers leave out, or say askew, is not guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lungseg.errors import LungsegError
from lungseg.scan.volume import read_geometry, read_image

HU = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
NRRD = {
    "type": "int16",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "4 3 2",
    "space directions": "(0.7,0,0) (0,0.8,0) (0,0,2.5)",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(1,2,3)",
}
UNORIENTED = {"space": None, "space directions": None, "space origin": None, "spacings": "1 1 1"}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "1 2 3",
    "ElementSpacing": "0.7 0.8 2.5",
    "DimSize": "4 3 2",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def written(folder: Path, kind: str, changes: dict[str, str | None]) -> Path:
    """The header with `changes` (None: left out), and the voxels of HU behind it or in a file beside it."""
    path, separator = folder / f"scan.{kind}", ": " if kind == "nrrd" else " = "
    fields = (NRRD if kind == "nrrd" else META) | changes
    if kind != "nrrd":
        fields["ElementDataFile"] = fields.pop("ElementDataFile") if kind == "mha" else "scan.raw"  # the last
    (folder / "scan.raw").write_bytes(HU.tobytes())
    lines = [f"{key}{separator}{value}" for key, value in fields.items() if value is not None]
    head = ["NRRD0004", *lines, "", ""] if kind == "nrrd" else [*lines, ""]
    path.write_bytes("\n".join(head).encode() + (b"" if kind == "mhd" else HU.tobytes()))
    return path


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("nrrd", {}),
        ("nrrd", {"space": "LPS", "space units": '"mm" "mm" "mm"'}),
        (
            "nrrd",
            {
                "space": "RAS",
                "space directions": "(-.7,0,0) (0,-.8,0) (0,0,2.5)",
                "space origin": "(-1,-2,3)",
            },
        ),
        ("mha", {}),
        ("mhd", {}),
        ("mha", {"ElementSpacing": None, "ElementSize": "0.7 0.8 2.5"}),
    ],
)
def test_a_header_that_says_everything_is_read(tmp_path, kind, changes):
    volume = read_image(written(tmp_path, kind, changes))
    assert np.array_equal(volume.volume_hu, HU)
    assert volume.geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    assert volume.geometry.to_lps_mm((1, 2, 3)) == pytest.approx((3.1, 3.6, 5.5))


@pytest.mark.parametrize(
    ("kind", "changes", "code", "named"),
    [
        ("nrrd", {"space directions": "(4,0,0) (0,4,0) (0,1.07,4)"}, "gantry-tilt", "scan.nrrd"),
        ("mha", {"TransformMatrix": "1 0 0 0 1 0 0 0.26 0.97"}, "gantry-tilt", "scan.mha"),
        ("mhd", {"TransformMatrix": "1 0 0 0 1 0 0 0.26 0.97"}, "gantry-tilt", "scan.mhd"),
        ("mha", {"TransformMatrix": "1 0 0 0 1 0 0 0 0"}, "gantry-tilt", "scan.mha"),
        ("nrrd", {"space": "3D-right-handed"}, "orientation-missing", "space"),
        ("nrrd", {"space": "scanner-xyz"}, "orientation-missing", "space"),
        ("nrrd", UNORIENTED, "orientation-missing", "space directions"),
        ("nrrd", {"space directions": "(1,0,0) none (0,0,2)"}, "header-ambiguous", "space directions"),
        ("nrrd", {"space units": '"m" "m" "m"'}, "header-ambiguous", "space units"),
        ("nrrd", {"space directions": "(1,0,0) (0,0,0) (0,0,2)"}, "spacing-implausible", "scan.nrrd"),
        ("nrrd", {"space directions": "(.001,0,0) (0,.001,0) (0,0,.002)"}, "spacing-implausible", "0.001"),
        ("mha", {"ElementSpacing": None}, "spacing-implausible", "ElementSpacing"),
        ("mha", {"ElementSpacing": "0 1 1"}, "spacing-implausible", "scan.mha"),
        ("mha", {"ElementSpacing": "-1 1 1"}, "spacing-implausible", "scan.mha"),
        ("mha", {"ElementSpacing": "0,7 0,8 2,5"}, "spacing-implausible", "scan.mha"),
        ("mhd", {"ElementSpacing": "700 800 2500"}, "spacing-implausible", "2500"),
    ],
)
def test_a_header_that_leaves_its_voxels_in_doubt_is_refused(tmp_path, kind, changes, code, named):
    for read in (read_geometry, read_image):
        with pytest.raises(LungsegError) as caught:
            read(written(tmp_path, kind, changes))
        assert caught.value.code == code
        assert named in str(caught.value)
