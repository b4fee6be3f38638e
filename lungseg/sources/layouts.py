"""The ways in which folders of images and masks are laid out, read as one: name -> image, name -> mask.

- ours: `images/NAME.EXT` and `masks/NAME.EXT`;
- Medical Segmentation Decathlon: `dataset.json`, `imagesTr/NAME.nii.gz`, `labelsTr/NAME.nii.gz`;
- nnU-Net raw: `dataset.json`, `imagesTr/NAME_0000.EXT` (a channel each), `labelsTr/NAME.EXT`.

`dataset.json` names the labels, as {"1": "nodule"} (MSD) or as {"nodule": 1} (nnU-Net); nnU-Net's "ignore" is
neither target nor background. Headers and voxels are not read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lungseg.errors import DataError
from lungseg.scan.identity import as_read
from lungseg.scan.volume import SUFFIXES, split_name

FOLDERS = (("images", "masks"), ("imagesTr", "labelsTr"))
CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Layout:
    """Images and masks by case name, the same names in both; `labels` is name -> value without the
    background, empty where no dataset.json says; `left_out` is what lies beside them and is no image."""

    images: dict[str, Path]
    masks: dict[str, Path]
    labels: dict[str, int] = field(default_factory=dict)
    left_out: tuple[Path, ...] = ()


def is_layout(folder: Path) -> bool:
    return any(all((folder / name).is_dir() for name in names) for names in FOLDERS)


def read_layout(folder: Path) -> Layout:
    """The pairs of a folder in any of the layouts.

    Raises DataError: "folder-missing", "pairs-none", "pair-unmatched", "pair-ambiguous",
    "dataset-invalid", "dataset-incomplete", "file-ending", "image-multichannel".
    """
    table = folder / "dataset.json"
    described = _described(table) if table.exists() else {}
    names = FOLDERS[(folder / "imagesTr").is_dir()]
    (images, others), (masks, others_too) = (_by_stem(folder / name) for name in names)
    left_out = tuple(path.relative_to(folder) for path in [*others, *others_too])
    images = _without_channel(images, masks)
    if not images and not masks:
        remedy = f"put {', '.join(SUFFIXES)} files in {names[0]}/ and {names[1]}/"
        raise DataError("pairs-none", folder=folder, remedy=remedy)
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        file = (images | masks)[alone[0]].relative_to(folder)
        message = f"{len(alone)} of {len(images | masks)} names have no partner"
        raise DataError("pair-unmatched", message=message, file=file, remedy="name image and mask alike")
    promised = described.get("numTraining", len(images))
    if promised != len(images):
        remedy = "copy the missing files, or correct numTraining"
        raise DataError("dataset-incomplete", file=table, promised=promised, here=len(images), remedy=remedy)
    return Layout(images, masks, _labels(described.get("labels", {}), table), left_out)


def _described(table: Path) -> dict[str, Any]:
    """dataset.json, if we can read what it describes."""
    try:
        tree = json.loads(table.read_text(encoding="utf-8-sig"))
        channels = tree.get("channel_names") or tree.get("modality") or {}
        ending = tree.get("file_ending", SUFFIXES[0])
        count = len(channels)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _invalid(table) from error
    if count > 1:
        shown = ", ".join(map(str, channels.values() if isinstance(channels, Mapping) else channels))
        raise _multichannel(table, shown)
    if str(ending).lower() not in SUFFIXES:
        remedy = f"convert the files to one of {', '.join(SUFFIXES)}"
        raise DataError("file-ending", file=table, file_ending=ending, remedy=remedy)
    assert isinstance(tree, dict)  # it has .get
    return tree


def _labels(described: Any, table: Path) -> dict[str, int]:
    """Name -> value, whichever way round they are written; values by name for regions are refused."""
    try:
        by_value = all(str(key).isdigit() for key in described)
        pairs = {str(v): int(k) for k, v in described.items()} if by_value else dict(described)
        return {name: int(value) for name, value in pairs.items() if int(value)}
    except (AttributeError, TypeError, ValueError) as error:
        raise _invalid(table) from error


def _invalid(table: Path) -> DataError:
    remedy = 'write {"labels": {"background": 0, "nodule": 1}, "file_ending": ".nii.gz"}, one value a label'
    return DataError("dataset-invalid", file=table, remedy=remedy)


def _multichannel(file: Path, channels: str) -> DataError:
    remedy = "give CT alone: one channel an image"
    return DataError("image-multichannel", file=file, channels=channels, remedy=remedy)


def _without_channel(images: dict[str, Path], masks: dict[str, Path]) -> dict[str, Path]:
    """nnU-Net's NAME_0000 as NAME, where a mask is called so."""
    named = {}
    for stem, path in images.items():
        match = CHANNEL.fullmatch(stem)
        if stem in masks or not match or match["case"] not in masks:
            named[stem] = path
        elif int(match["channel"]):
            raise _multichannel(path, match["channel"])
        elif match["case"] in images:
            raise _ambiguous(path, images[match["case"]])
        else:
            named[match["case"]] = path
    return named


def _by_stem(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The images of a folder by name, and what else is in it, hidden files apart."""
    if not folder.is_dir():
        remedy = "give a folder with images/ and masks/ in it, or imagesTr/ and labelsTr/"
        raise DataError("folder-missing", folder=folder, remedy=remedy)
    files: dict[str, Path] = {}
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        name, suffix = split_name(as_read(path.name))
        if name.startswith("."):
            continue
        if not suffix or path.is_dir():
            others.append(path)
        elif name in files:
            raise _ambiguous(path, files[name])
        else:
            files[name] = path
    headers = [path for path in files.values() if path.suffix.lower() == ".mhd"]
    voxels = {f"{path.stem}{suffix}" for path in headers for suffix in (".raw", ".zraw")}
    return files, [path for path in others if path.name not in voxels]


def _ambiguous(file: Path, other: Path) -> DataError:
    return DataError("pair-ambiguous", file=file, other=other.name, remedy="keep one file a case")
