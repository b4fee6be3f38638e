"""What workers get of nodes: cores that they share, GPUs that there are, or an error at once."""

from __future__ import annotations

import pytest

from lungseg.config import load_recipe
from lungseg.errors import ConfigError
from lungseg.train.resources import planned_nodes, trial_resources, worker_resources, workers_there


@pytest.mark.parametrize(
    ("cores", "workers", "asked", "given"),
    [
        ([8], 1, None, 8),
        ([8], 2, None, 4),
        ([8], 3, None, 2),
        ([4, 8], 2, None, 4),  # one a node, alike on both
        ([4, 8], 3, None, 4),
        ([4, 32, 32], 2, None, 32),  # the smallest takes none, so it bounds nobody's cores
        ([0, 4, 4], 2, None, 4),  # a head node that takes no work
        ([8], 2, 1, 1),
        ([4, 8], 1, 8, 8),  # more than the smallest node has, but the larger one has them
        ([2], 3, None, None),
        ([2], 2, 2, None),
        ([4, 4], 1, 8, None),  # no node has them
        ([4, 4, 4], 2, 6, None),
        ([], 1, None, None),
    ],
)
def test_workers_share_the_cores_of_their_nodes(
    cores: list[int], workers: int, asked: int | None, given: int | None
) -> None:
    settings = [f"train.workers={workers}", f"train.global_batch={workers}"]
    recipe = load_recipe(None, settings + ([f"train.cpus_per_worker={asked}"] if asked else []))
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)} if count else {}} for count in cores]
    nodes.append({"Alive": False, "Resources": {"CPU": 1.0}})
    if given is None:
        with pytest.raises(ConfigError, match="too-few-cpus"):
            worker_resources(recipe.train, nodes)
    else:
        assert worker_resources(recipe.train, nodes) == {"CPU": given}


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "given"),
    [
        ([(8, 4)], 1, 4, 8),
        ([(8, 4)], 2, 2, 4),
        ([(4, 0), (16, 2)], 1, 2, 16),  # a head without GPUs takes no worker, and bounds nobody's cores
        ([(4, 0), (16, 2), (8, 2)], 2, 2, 8),
        ([(16, 2)], 2, 1, 8),
        ([(16, 0)], 1, 1, "gpus-missing"),
        ([(16, 2), (16, 2)], 1, 4, "gpus-missing"),  # a worker is on one node
        ([(16, 3)], 2, 2, "gpus-missing"),
        ([(0, 4)], 1, 4, "too-few-cpus"),
        ([], 1, 1, "gpus-missing"),
    ],
)
def test_gpus_that_no_node_has_are_refused_and_cores_are_those_beside_them(
    nodes: list[tuple[int, int]], workers: int, gpus: int, given: int | str
) -> None:
    settings = ["train.global_batch=4", f"train.workers={workers}", f"train.gpus_per_worker={gpus}"]
    config = load_recipe(None, settings).train
    listed = [{"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)}} for c, g in nodes]
    if isinstance(given, str):
        with pytest.raises(ConfigError, match=given):
            worker_resources(config, listed)
    else:
        assert worker_resources(config, listed) == {"CPU": given, "GPU": gpus}


@pytest.mark.parametrize(
    ("nodes", "settings", "trials", "given", "at_once"),
    [
        ([(32, 4), (32, 4)], ["train.gpus_per_worker=1"], None, 8, 8),
        ([(2, 0), (32, 4), (32, 4)], ["train.gpus_per_worker=1"], None, 8, 8),  # with the head
        ([(32, 4), (32, 4)], ["train.gpus_per_worker=3"], None, 32, 2),  # a worker is on one node
        ([(32, 4), (32, 4)], ["train.gpus_per_worker=4", "train.workers=2"], None, 32, 1),
        ([(32, 4), (32, 4)], ["train.gpus_per_worker=1", "train.cpus_per_worker=16"], None, 16, 4),
        ([(32, 4)], ["train.gpus_per_worker=1"], 2, 16, 2),
        ([(8, 0), (8, 0)], [], None, 8, 2),
        ([(8, 0), (8, 0)], [], 4, 4, 4),
        ([(2, 0)], [], 4, 1, 4),  # more than there is room for: the others wait
    ],
)
def test_trials_share_the_nodes_gpus_and_the_cores_beside_them(
    nodes: list[tuple[int, int]], settings: list[str], trials: int | None, given: int, at_once: int
) -> None:
    config = load_recipe(None, ["train.global_batch=24", *settings]).train
    listed = [{"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)}} for c, g in nodes]
    each, count = trial_resources(config, listed, trials)
    assert (each["CPU"], count) == (given, at_once)


@pytest.mark.parametrize(
    ("settings", "cores", "there"),
    [
        ([], [], 0),  # right after the head has come back
        ([], [0], 0),
        ([], [0, 4], 1),  # and not two of two cores each on the one node that is up
        ([], [0, 4, 4], 2),
        (["train.cpus_per_worker=2"], [0, 4], 1),
        (["train.cpus_per_worker=2"], [0, 4, 4], 2),
        (["train.workers=4"], [4], 2),
        (["train.workers=4"], [4, 4], 4),
    ],
)
def test_workers_are_there_once_the_nodes_are_that_the_cluster_will_have(
    settings: list[str], cores: list[int], there: int
) -> None:
    planned = planned_nodes('[{"nodes": 2, "CPU": "3500m", "GPU": 0}]')  # which Ray counts as 4 cores
    config = load_recipe(None, ["train.workers=2", "train.global_batch=4", *settings]).train
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cores]
    assert workers_there(config, nodes, planned) == there


def test_where_nobody_says_what_is_planned_workers_share_what_is_there() -> None:
    config = load_recipe(None, ["train.workers=2", "train.global_batch=2"]).train
    assert planned_nodes(None) == []
    assert workers_there(config, [{"Alive": True, "Resources": {"CPU": 4.0}}], []) == 2
