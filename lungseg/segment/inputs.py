"""What `predict` takes, and who is who in it: an image file is a scan, and so is each CT series of a folder.

A scan's case id is the keyed hash of its own name: the file's, the folder's, or that of the link it is given
by, as in `lungseg prepare pairs`, with its parents' where several of one call share it. Where a folder holds
several series it is that of the series' UID.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lungseg.errors import DataError, GeometryError, LungsegError
from lungseg.scan.dicom import read_slices
from lungseg.scan.identity import case_id
from lungseg.scan.series import find_series, shown
from lungseg.scan.volume import Volume, read_image, split_name

Refuse = Callable[[str, LungsegError], None]


@dataclass(frozen=True)
class Input:
    """One scan: the image file `path`, or those files of the folder `path` that are the slices of one series.
    `title` names it for its user alone."""

    case_id: str
    title: str
    path: Path
    slices: tuple[Path, ...] = ()

    def read(self) -> Volume:
        """Raises as `read_slices` or `read_image`."""
        return read_slices(self.slices, self.path) if self.slices else read_image(self.path)


def case_name(path: Path) -> str:
    """The input's own name, without an image suffix."""
    return split_name(os.path.basename(os.path.abspath(path)))[0] or "scan"


def case_names(paths: Sequence[Path]) -> list[str]:
    """The name of each input; several of one name take as many of their parents' as tell them apart."""
    parts = [(*Path(os.path.abspath(path)).parent.parts, case_name(path)) for path in paths]
    names = []
    for own in parts:
        alike = [other for other in parts if other is not own]
        depth = 1
        while depth < len(own) and any(own[-depth:] == other[-depth:] for other in alike):
            depth += 1
        names.append("/".join(own[-depth:]))
    return names


def require_inputs(paths: Sequence[Path]) -> None:
    """What can be told before any work is done.

    Raises DataError("input-missing"), and DataError("input-ambiguous") if two would share a folder.
    """
    for path in paths:
        if not path.exists():
            remedy = "give a DICOM folder, a NIfTI, NRRD or MetaImage file"
            raise DataError("input-missing", input=path, remedy=remedy)
    names = case_names(paths)
    twice = [str(path) for path, name in zip(paths, names, strict=True) if names.count(name) > 1]
    if twice:
        remedy = "give each once, rename one, or predict them with different --out"
        raise DataError("input-ambiguous", inputs=",".join(twice), remedy=remedy)


def find_inputs(path: Path, key: bytes, series: str | None = None, name: str = "") -> list[Input]:
    """The scans at `path`: all CT series of a folder, in the order of their first files' names, or only that
    which `series` names by its number in this order, from 1, or by its UID. Voxels are not read. `name`
    stands for the input's own, as of `case_names`.

    Raises DataError("series-none", "series-missing") and as `find_series`.
    """
    name = name or case_name(path)
    if not path.is_dir():
        if series is not None:
            raise DataError("series-missing", input=path, remedy="leave --series out: this is no folder")
        return [Input(case_id(name, key), str(path), path)]
    found = find_series(path)
    if not found:
        raise DataError("series-none", folder=path, remedy="give a folder with CT slices in DICOM format")
    inputs, listing = [], []
    for number, (uid, files) in enumerate(found.items(), 1):
        own, title = name, str(path)
        if len(found) > 1:
            slices = f"{len(files)} slices, first {shown(files[0].relative_to(path))}"
            listing.append(f"{number}: {slices}")
            own, title = uid, f"{path}, series {number} of {len(found)} ({slices})"
        if series in (None, str(number), uid):
            inputs.append(Input(case_id(own, key), title, path, tuple(files)))
    if not inputs:
        remedy = "give --series a number of these or a UID, or leave it out for all"
        message = "; ".join(listing) or "there is one series"
        raise DataError("series-missing", folder=path, message=message, remedy=remedy)
    return inputs


def read_inputs(
    paths: Sequence[Path],
    key: bytes,
    series: str | None,
    accept: Callable[[Input, Volume], None],
    refuse: Refuse,
) -> Iterator[tuple[Input, Volume]]:
    """The scans at all `paths` that can be read and that `accept` raises nothing for, one at a time.

    Any other goes to `refuse` with its title and error, and the next one follows; of a single scan the error
    is raised.
    """
    for path, name in zip(paths, case_names(paths), strict=True):
        try:
            inputs = find_inputs(path, key, series, name)
        except (DataError, GeometryError) as error:
            if len(paths) == 1:
                raise
            refuse(str(path), error)
            continue
        for one in inputs:
            try:
                volume = one.read()
                accept(one, volume)
            except (DataError, GeometryError) as error:
                if len(paths) == len(inputs) == 1:
                    raise
                refuse(one.title, error)
            else:
                yield one, volume
