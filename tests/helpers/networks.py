"""A run with a published network, without the minutes of training."""

from __future__ import annotations

from collections.abc import Sequence

from lungseg.config import load_recipe
from lungseg.dataset.manifest import Manifest
from lungseg.runs.checkpoint import Checkpoints, arrays
from lungseg.runs.run import open_run
from lungseg.runs.state import TrainState
from lungseg.storage import Store, keys

SMALL = ("model.depth=3", "model.width=4", "segment.window_zyx=[32, 32, 32]")


def publish_untrained(store: Store, name: str, manifest: Manifest, settings: Sequence[str] = SMALL) -> None:
    """The run `name`, whose best network has random weights; its probabilities are about 0.12 everywhere."""
    from lungseg.model.unet import build_unet

    recipe = load_recipe(None, settings)
    run = open_run(store, name, manifest, recipe, "fresh")
    state = TrainState(
        attempt=run.attempt,
        step=3,
        epoch=1,
        manifest_sha256=run.manifest_sha256,
        recipe=run.recipe,
        metrics={"val_dice": 0.5},
    )
    checkpoints = Checkpoints(store, keys.run_root(name))
    checkpoint = checkpoints.commit(state, arrays(build_unet(recipe.model).weights), {})
    checkpoints.publish_best(checkpoint, state, b"not read here")
