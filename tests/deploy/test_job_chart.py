"""What helm/lungseg-job renders is a RayJob that KubeRay takes, and its entry point says what was asked."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lungseg.config import load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
JOBS = {
    "prepare": ["--set=job=prepare,data=lidc,source.kind=pairs,settings.data.pairs.label=2"],
    "train": ["--set=job=train,data=lidc,run=first,activeDeadlineSeconds=2000000"],
    "tune": ["--set=job=tune,data=lidc,run=sweep,trials=7,recipe=jobs/recipes/small.yaml"],
    "fit-post": ["--set=job=fit-post,run=first,settings.segment.mirror=false"],
    "evaluate": [
        "--set=job=evaluate,run=first,store=s3://bucket,out=/tmp/report,entrypointCpus=2,settings.segment.overlap=0",
    ],
}


RenderOne = Callable[..., dict[str, Any]]
Validate = Callable[[dict[str, Any]], None]


def entrypoint(job: dict[str, Any]) -> list[str]:
    return shlex.split(job["spec"]["entrypoint"])


@pytest.mark.parametrize("job", JOBS)
def test_every_job_passes_lint_and_kuberays_schema(
    job: str, helm: Callable[..., Any], render_one: RenderOne, validate: Validate
) -> None:
    linted = helm("lint", "--strict", "helm/lungseg-job", *JOBS[job])
    assert linted.returncode == 0, linted.stdout + linted.stderr
    validate(render_one("RayJob", "lungseg-job", *JOBS[job]))


@pytest.mark.parametrize("job", JOBS)
def test_an_entry_point_names_a_script_that_exists(job: str, render_one: RenderOne) -> None:
    python, script, *_ = entrypoint(render_one("RayJob", "lungseg-job", *JOBS[job]))
    assert (python, script) == ("python", f"jobs/{job}.py")
    assert (ROOT / script).is_file()


def test_arguments_follow_the_jobs_contract(render_one: RenderOne) -> None:
    lines = {
        job: " ".join(entrypoint(render_one("RayJob", "lungseg-job", *flags))) for job, flags in JOBS.items()
    }
    assert lines == {
        "prepare": "python jobs/prepare.py pairs /inputs --data lidc --set data.pairs.label=2",
        "train": "python jobs/train.py --data lidc --run first --resume",
        "tune": "python jobs/tune.py --data lidc --run sweep --trials 7 --recipe jobs/recipes/small.yaml"
        " --resume",
        "fit-post": "python jobs/fit-post.py --run first --set segment.mirror=false",
        "evaluate": "python jobs/evaluate.py --store s3://bucket --run first --split test --out /tmp/report"
        " --set segment.overlap=0",
    }


def test_settings_reach_the_recipe_unchanged(render_one: RenderOne, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "train": {"epochs": 1000000, "max_minutes": 0.5, "workers": 2, "precision": "mixed_bfloat16"},
        "optimizer": {"learning_rate": 0.00001},
        "tune": {"sampler": "random", "space": {"model.width": {"choice": [8, 12]}}},
        "augment": {"flips": False},
    }
    values = tmp_path / "job.yaml"
    values.write_text(yaml.safe_dump({"data": "lidc", "run": "first", "settings": settings}))
    words = entrypoint(render_one("RayJob", "lungseg-job", "--values", values, "--set=resume=false"))
    assert words[:6] == ["python", "jobs/train.py", "--data", "lidc", "--run", "first"]
    assert words[6::2] == ["--set"] * 8
    assert load_recipe(None, words[7::2]) == parse_recipe(settings)


def test_the_shell_that_runs_an_entry_point_expands_nothing(render_one: RenderOne, tmp_path: Path) -> None:
    hostile = ["it's", "$HOME", "`id`", "a b", "; exit 1", 'say "x"', "", "ä\\n"]
    values = tmp_path / "job.yaml"
    values.write_text(yaml.safe_dump({"data": "lidc", "run": "first", "args": hostile}))
    line = render_one("RayJob", "lungseg-job", "--values", values)["spec"]["entrypoint"]
    script = line.replace("python", "printf '%s\\n'", 1)
    printed = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[-len(hostile) - 1 : -1] == hostile


def test_a_job_on_a_shared_cluster_neither_retries_nor_deletes(render_one: RenderOne) -> None:
    spec = render_one("RayJob", "lungseg-job", *JOBS["train"])["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": "lungseg"}
    assert spec["activeDeadlineSeconds"] == 2000000
    assert not {"backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(spec)
