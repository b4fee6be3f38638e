"""Starting a run through Ray Train: one worker a node, restarted as a group when one dies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from lungseg.cluster import connect
from lungseg.config import Recipe
from lungseg.data.shards import Manifest, load_manifest
from lungseg.errors import ConfigError, LungsegError
from lungseg.storage import Store
from lungseg.train.checkpoint import Checkpoints
from lungseg.train.run import Mode, open_run, run_root


def train(store: Store, data: str, run: str, recipe: Recipe, mode: Mode = "fresh") -> dict[str, Any]:
    """Train to the end and return the best pointer of the run (see Checkpoints.best).

    Raises DataError("data-missing"), RunError("run-exists", "run-differs"), ConfigError("too-few-cpus"),
    and what a worker raised after `train.max_failures` restarts.
    """
    manifest = load_manifest(store, data)
    opened = open_run(store, run, manifest, recipe, mode)
    fit(store, run_root(run), opened.attempt, manifest, recipe)
    best = Checkpoints(store, run_root(run)).best()
    assert best is not None  # every epoch that ends commits one
    return best


def fit(
    store: Store,
    root: str,
    attempt: str,
    manifest: Manifest,
    recipe: Recipe,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run the workers below the prefix `root` of the store; also the body of every tuning trial."""
    ray = connect()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    cpus = cpus_per_worker(recipe, ray.nodes())
    resources: dict[str, float] = {"CPU": cpus}
    if recipe.train.gpus_per_worker:
        resources["GPU"] = recipe.train.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="lungseg-ray-", ignore_cleanup_errors=True) as scratch:
        trainer = TensorflowTrainer(
            _worker,
            train_loop_config={
                "job": (store, root, attempt, manifest, recipe.model_dump(mode="json")),
                "threads": cpus,
            },
            scaling_config=ScalingConfig(
                num_workers=recipe.train.workers,
                use_gpu=bool(recipe.train.gpus_per_worker),
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            # Ray's own snapshots are not used: what a run resumes from is our newest valid checkpoint.
            run_config=RunConfig(
                name="train",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=recipe.train.max_failures),
                callbacks=list(callbacks),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            ours = LungsegError.find_in(error)
            if ours:
                raise ours from error
            raise


def cpus_per_worker(recipe: Recipe, nodes: Sequence[dict[str, Any]]) -> int:
    """Cores of the smallest node that takes workers, shared by the workers that must share it.

    Raises ConfigError("too-few-cpus") rather than let Ray wait for ever for cores that no node has.
    """
    cores = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    cores = [count for count in cores if count] or [0]
    per_node = -(-recipe.train.workers // len(cores))
    available = min(cores) // per_node
    wanted = recipe.train.cpus_per_worker or available
    if wanted < 1 or (wanted > available and wanted * recipe.train.workers > sum(cores)):
        raise ConfigError(
            "too-few-cpus",
            workers=recipe.train.workers,
            cpus_per_worker=recipe.train.cpus_per_worker or 1,
            cluster_cpus=sum(cores),
            remedy="lower train.workers or train.cpus_per_worker, or add nodes",
        )
    return wanted


def _worker(config: dict[str, Any]) -> None:
    """The body of a Ray Train worker. TensorFlow is first imported here, in its own process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    from lungseg.config import parse_recipe
    from lungseg.train.loop import Job, Session, run_worker

    context = ray.train.get_context()
    store, root, attempt, manifest, recipe = config["job"]
    session = Session(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        threads=config["threads"],
        share=broadcast_from_rank_zero,
        report=ray.train.report,
    )
    run_worker(Job(store, root, attempt, manifest, parse_recipe(recipe)), session)
