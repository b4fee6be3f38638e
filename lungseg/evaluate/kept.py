"""What a network says of a held-out scan: asked once, kept in the store, and brought onto the scan's own
grid.

So another threshold or score needs no network. Probabilities are kept as float16, within 0.0003 of what the
network said, and only where anything is probable or lung. Scores are of what is kept, the first time too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from lungseg.config import Recipe, SegmentConfig
from lungseg.dataset.cutting import digest
from lungseg.dataset.stored_scans import StoredScanEntry, geometry_of, pack_row, read_scan, tensor
from lungseg.runs.run import Published
from lungseg.scan.lungs import lung_mask
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry, Volume, bounding_box
from lungseg.segment.nodules import find_nodules
from lungseg.segment.postprocess import components
from lungseg.segment.quantify import labels_on_scan
from lungseg.segment.sliding import predict_volume
from lungseg.segment.windows import Box, Predictor
from lungseg.storage import Store, keys

FORMAT = 2
"""Raised whenever what is kept, or how a scan is asked about, changes."""
ASKED = {"window_zyx", "overlap", "mirror", "lungs_only", "second_looks"}
"""The settings that probabilities depend on."""
Turn = Callable[[Predictor], AbstractContextManager[Predictor]]
"""Waits until a network may be asked about a scan, and gives it as it is to be asked."""


@dataclass(frozen=True)
class Prediction:
    """A part of the grid that the network worked on: `probability` float16 and `lungs` uint8, both [z, y, x]
    on `geometry`. Beyond it nothing is probable and no lung is. `lungs` is None where none were found."""

    geometry: Geometry
    probability: np.ndarray
    lungs: np.ndarray | None

    def box_in(self, working: Geometry) -> Box:
        """Which part of the whole working grid it is."""
        first = np.rint(working.to_index_zyx(self.geometry.origin_lps_mm)).astype(int).tolist()
        shape = self.geometry.shape_zyx
        return tuple(slice(start, start + length) for start, length in zip(first, shape, strict=True))

    def components(self, config: SegmentConfig) -> np.ndarray:
        """int32 [z, y, x] on `geometry`: as `segment` finds them."""
        if not config.min_score:  # in a fifth of the time
            return components(self.float32, config, self.geometry.spacing_mm, self.lungs)
        return find_nodules(self.float32, self.geometry, config, self.lungs)[0]

    def own_labels(self, found: np.ndarray, grid: Geometry, threshold: float) -> tuple[np.ndarray, Box]:
        """The components `found` on the scan's own `grid`, as `segment` brings them there; and their box."""
        labels, boxes = labels_on_scan(found, self.float32, self.geometry, grid, threshold)
        return labels, union(boxes)

    @cached_property
    def float32(self) -> np.ndarray:
        return self.probability.astype(np.float32)

    def lungs_on(self, part: Geometry) -> np.ndarray | None:
        """uint8 [z, y, x] on a small grid."""
        return None if self.lungs is None else resample_onto(self.lungs, self.geometry, part)


def subject(model: Published, split: str) -> str:
    """What is evaluated, as part of a key."""
    return f"{model.checkpoint}-{split}"


def kept_prediction(
    store: Store,
    entry: StoredScanEntry,
    model: Published,
    split: str,
    predict: Predictor,
    turn: Turn = nullcontext,
) -> Prediction:
    """What `predict` says of the scan in its turn, or said before of the same scan by the same settings."""
    prefix = _prefix(entry, model, split)
    for item in store.find(prefix):
        data = store.get(item.key)
        if item.key == _key(prefix, data):  # else it is damaged, and made anew
            return _unpack(data)
    made = predict_scan(read_scan(store, entry).volume, predict, model.recipe, turn)
    keep(store, entry, model, split, made)
    return made


def keep(store: Store, entry: StoredScanEntry, model: Published, split: str, made: Prediction) -> None:
    data = _pack(made)
    store.put(_key(_prefix(entry, model, split), data), data)


def all_kept(store: Store, entries: Sequence[StoredScanEntry], model: Published, split: str) -> bool:
    """Whether no network is needed, by the names of what is there."""
    whole = keys.evaluation(keys.run_root(model.run), subject(model, split))
    there = [item.key for item in store.find(whole)]
    return all(any(key.startswith(_prefix(one, model, split)) for key in there) for one in entries)


def _prefix(entry: StoredScanEntry, model: Published, split: str) -> str:
    settings = model.recipe.segment.model_dump(include=ASKED)
    stem = f"{entry.case_id}-{digest([FORMAT, entry.sha256, settings])}"
    return keys.probabilities(keys.run_root(model.run), subject(model, split), stem)


def predict_scan(working: Volume, predict: Predictor, recipe: Recipe, turn: Turn) -> Prediction:
    """`working` is the scan on the grid of the data set, `recipe.data.spacing_mm`."""
    lungs = lung_mask(working)
    found = lungs if lungs.any() else None
    with turn(predict) as asked:
        probability = predict_volume(asked, working.volume_hu, recipe, lungs=found)
    return _cropped(probability, found, working.geometry)


def _cropped(probability: np.ndarray, lungs: np.ndarray | None, geometry: Geometry) -> Prediction:
    probability = probability.astype(np.float16)
    something = probability > 0
    if lungs is not None:
        something |= lungs > 0
    tight = bounding_box(something) or (slice(0, 1),) * 3
    box = _grown(tight, np.ones(3), probability.shape)  # interpolation reaches as far as the first zero
    return Prediction(geometry.part(box), probability[box], None if lungs is None else lungs[box])


def mean_prediction(predictions: Sequence[Prediction], working: Geometry) -> Prediction:
    """The mean on the whole grid `working`, that of the first, as `segment_by_mean` forms it; the lungs are
    those of the first."""
    first = predictions[0]
    if len(predictions) == 1:
        return first
    probability = np.zeros(working.shape_zyx, np.float32)
    for one in predictions:
        if one.geometry.spacing_mm == working.spacing_mm:
            probability[one.box_in(working)] += one.probability
        else:
            probability += resample_onto(one.probability.astype(np.float32), one.geometry, working)
    probability /= len(predictions)
    lungs = None
    if first.lungs is not None:
        lungs = np.zeros(working.shape_zyx, np.uint8)
        lungs[first.box_in(working)] = first.lungs
    return _cropped(probability, lungs, working)


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around some; () around none."""
    return tuple(
        slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True)
    )


def _grown(box: Box, by_voxels: np.ndarray, shape: tuple[int, ...]) -> Box:
    margins = np.ceil(by_voxels).astype(int).tolist()
    return tuple(
        slice(max(0, side.start - margin), min(side.stop + margin, length))
        for side, margin, length in zip(box, margins, shape, strict=True)
    )


def _key(prefix: str, data: bytes) -> str:
    return f"{prefix}{hashlib.sha256(data).hexdigest()[:16]}.arrow"


def _pack(prediction: Prediction) -> bytes:
    arrays = {"probability": prediction.probability, "lungs": prediction.lungs}
    columns = {name: tensor(array) for name, array in arrays.items() if array is not None}
    return pack_row(columns, {"geometry": asdict(prediction.geometry)})


def _unpack(data: bytes) -> Prediction:
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        row = reader.get_batch(0)
        geometry = geometry_of(json.loads(reader.schema.metadata[b"geometry"]))
    found = {name: row.column(name).to_numpy_ndarray()[0] for name in row.schema.names}
    return Prediction(geometry, found["probability"], found.get("lungs"))
