"""Networks for servers that have no lungseg: ONNX, SavedModel, and what must be known of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lungseg.config import Recipe
from lungseg.errors import ConfigError, DataError
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.ensemble import load_ensemble
from lungseg.storage import Store, keys

ONNX, SAVED_MODEL, FACTS = "model.onnx", "saved_model", "serving.json"
INPUT = "volume_hu"


def require_onnx() -> None:
    """Raises ConfigError("extra-missing") where the converter is not installed."""
    try:
        import tf2onnx  # noqa: F401
    except ImportError as error:
        remedy = "install it: uv sync --extra onnx, or pip install lungseg[onnx]"
        raise ConfigError("extra-missing", extra="onnx", remedy=remedy) from error


def write_serving(store: Store, run: str, out: Path, *, onnx: bool, saved_model: bool) -> list[Path]:
    """Beside what `pull_best` wrote: `out`/model.onnx and saved_model/, as asked, and serving.json.

    They are float32 networks of the published checkpoint's verified weights. Earlier ones are replaced, each
    when its successor is whole. The settings are those of `predict`, `fit-post`'s if it chose any. Raises as
    `load_ensemble`, and DataError("output-unwritable").
    """
    import keras

    from lungseg.runs.export import float32_network

    (published,) = load_ensemble(store, [run]).members
    checkpoints = Checkpoints(store, keys.run_root(run))
    weights = checkpoints.read(published.checkpoint, with_optimizer=False).weights
    network = float32_network(weights, published.recipe.model)
    signature = keras.InputSpec(shape=network.input_shape, dtype="float32", name=INPUT)
    facts = {"run": run, "checkpoint": published.checkpoint, **describe(published.recipe)}
    formats = {ONNX: ("onnx", onnx), SAVED_MODEL: ("tf_saved_model", saved_model)}
    asked = {file: kind for file, (kind, wanted) in formats.items() if wanted}
    try:
        with tempfile.TemporaryDirectory(dir=out) as fresh:
            for file, kind in asked.items():
                network.export(
                    os.path.join(fresh, file), format=kind, verbose=False, input_signature=[signature]
                )
            Path(fresh, FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            for file in (*asked, FACTS):
                if (out / file).is_dir():
                    shutil.rmtree(out / file)
                os.replace(Path(fresh, file), out / file)
    except OSError as error:
        raise DataError("output-unwritable", folder=out, remedy=f"choose another --out ({error})") from error
    return [out / file for file in (*asked, FACTS)]


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a server must do to a scan before and after the network."""
    segment = recipe.segment
    return {
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "axes": ["n", "z", "y", "x", "1"],
            "z_y_x_run_to": ["head", "back", "left"],
            "unit": "HU, not normalised: the network does that itself",
            "hu_window": list(recipe.model.hu_window),
            "spacing_mm_zyx": list(recipe.data.spacing_mm),
            "sides_are_multiples_of": recipe.model.total_stride,
        },
        "output": {"dtype": "float32", "axes": ["n", "z", "y", "x", "1"], "unit": "probability of nodule"},
        "window_zyx": list(segment.window_zyx),
        "overlap": segment.overlap,
        "mirror": segment.mirror,
        "second_looks": segment.second_looks,
        "second_look_zyx": list(recipe.data.patch.shape_zyx),
        "threshold": segment.threshold,
        "min_volume_mm3": segment.min_volume_mm3,
        "lungs_only": segment.lungs_only,
    }
