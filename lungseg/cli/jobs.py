"""The verbs for jobs on a cluster: submit, status, logs, wait, stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lungseg.cli.app import app
from lungseg.cli.ends import INTERRUPTED, end
from lungseg.cli.options import (
    STORE,
    Address,
    ModelName,
    StoreUri,
    checked_if_given,
    read_recipe,
    read_runs,
    read_space,
)
from lungseg.errors import ConfigError, RunError

if TYPE_CHECKING:
    from lungseg.submit.jobs import Cluster

_OF_RUNS = ("train", "tune")
_OF_RECIPES = ("--recipe", "--set", "--space")
_VERBS = ("train", "tune", "fit-post", "evaluate", "prepare")
_VERB = "What to run: train, tune, fit-post, evaluate, prepare lidc or prepare pairs."
Verb = Annotated[str, typer.Option("--verb", help=f"One of {', '.join(_VERBS)}.")]


_RUN = typer.Option("--run", callback=checked_if_given, help="Name of a run. Default: all.")


@app.command()
def status(
    store: StoreUri = STORE,
    run: Annotated[str | None, _RUN] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object a run.")] = False,
) -> None:
    """Show how far a run is. From the store, also when its cluster has gone; with --address as Ray has it."""
    import json
    from dataclasses import asdict

    from lungseg.runs.run import list_runs
    from lungseg.storage import open_store
    from lungseg.submit.jobs import Cluster
    from lungseg.submit.status import status_of

    opened, jobs = open_store(store), {}
    opened.check()
    if address:
        try:
            cluster = Cluster(address)
            jobs = {job.name: job for job in cluster.jobs() if job.verb in _OF_RUNS}
        except ConfigError as error:
            print(f"lungseg: from the store alone: {error}", file=sys.stderr)
    for name in [run] if run else list(dict.fromkeys([*(one.name for one, _ in list_runs(opened)), *jobs])):
        job = jobs.get(name)
        found = status_of(opened, name, job, cluster.waits(job) if job else None)
        print(json.dumps(asdict(found)) if as_json else "\n".join(found.lines()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(metavar="VERB ...", help=_VERB)],
    address: Address = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave it to itself at once.")] = False,
) -> None:
    """Run a verb as a job on a cluster, with the verb's own flags. Shows its log, and ends as it does.

    The recipe goes along by the store, so a file of this machine will do.
    """
    from lungseg.runs.ensemble import ensemble_name
    from lungseg.submit.jobs import Cluster

    words, given = _parsed(context, verb)
    store, name = given["store"], given.get("run") or given["data"]
    if "runs" in given:
        words, runs = _with_runs(words, given)
        name = ensemble_name(runs)
    cluster = Cluster(address)
    there = cluster.find(verb, name)
    started = None
    if there is None or there.over:
        if "recipe" in given:
            words = _with_stored_recipe(words, given, verb, name)
        if "--store" not in " ".join(words):  # the job's default may be another
            words = [*words, "--store", store]
        started = cluster.submit(verb, name, words)
    said = f"{started} is submitted to" if started else f"{verb} of {name} runs already on"
    print(f"{said} {cluster.address}", flush=True)
    if not no_wait:
        sys.exit(_wait(cluster, store, verb, name, show=True))
    of_verb = "" if verb == "train" else f" --verb {verb}"
    print(f"see: lungseg status|logs|wait|stop --store {store} --run {name}{of_verb}")


def _parsed(context: typer.Context, verb: str) -> tuple[list[str], dict[str, Any]]:
    """The words that follow `submit`, and what the verb makes of its flags. Raises what the verb raises for
    wrong ones, ConfigError("verb-unknown")."""
    words, parent = [verb, *context.args], context.parent
    if verb not in _VERBS or parent is None:
        raise ConfigError("verb-unknown", verb=verb, remedy=f"submit one of {', '.join(_VERBS)}")
    command: Any = parent.command
    rest = list(words)
    while isinstance(command, TyperGroup):
        name = rest.pop(0) if rest else ""
        if command.get_command(parent, name) is None:
            raise ConfigError("verb-unknown", verb=" ".join(words), remedy="prepare lidc, or prepare pairs")
        command = command.get_command(parent, name)
    return words, command.make_context(" ".join(words[: len(words) - len(rest)]), rest, parent=parent).params


def _with_runs(words: list[str], given: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The words with a flag for each run that a file of this machine names; and all runs."""
    runs = read_runs(given["runs"], given["runs_file"])
    in_file = runs[len(given["runs"]) :]
    return [*_without(words, ["--runs"]), *(f"--run={run}" for run in in_file)], runs


def _with_stored_recipe(words: list[str], given: dict[str, Any], verb: str, name: str) -> list[str]:
    """Put the recipe into the store, under a key of its own since somebody else may submit the same run now;
    the words say so in place of its file and settings."""
    import hashlib

    from lungseg.config.stored import store_recipe
    from lungseg.storage import keys, open_store, to_json

    overrides = [*read_space(given.get("space")), *(given["overrides"] or [])]
    recipe = read_recipe(given["recipe"], overrides)
    root = keys.data_root(name) if verb == "prepare" else keys.run_root(name)
    text = to_json(store_recipe(recipe))
    key = keys.submitted(root, hashlib.sha256(text).hexdigest()[:8])
    open_store(given["store"]).put(key, text)
    return [*_without(words, _OF_RECIPES), "--submitted", key]


def _without(words: list[str], flags: Sequence[str]) -> list[str]:
    """All but these flags and their values."""
    kept, dropped = [], False
    for word in words:
        flag = word.partition("=")[0] in flags
        if not flag and not dropped:
            kept.append(word)
        dropped = word in flags  # and so is the value that follows
    return kept


def _wait(cluster: Cluster, store: str, verb: str, name: str, show: bool) -> int:
    from lungseg.storage import open_store
    from lungseg.submit import jobs
    from lungseg.submit.status import outcome

    def print_on(text: str) -> None:
        print(text, end="", flush=True)

    def in_store() -> int | None:
        return outcome(open_store(store), name) if verb in _OF_RUNS else None

    try:
        return jobs.wait(cluster, verb, name, in_store, print_on if show else None)
    except KeyboardInterrupt:
        end(f"{verb} of {name} goes on without this command: lungseg logs, wait or stop", INTERRUPTED)


@app.command()
def wait(run: ModelName, verb: Verb = "train", store: StoreUri = STORE, address: Address = None) -> None:
    """Wait for a job, and end as it does. Its code is 0, 2, 3 or 1, or 130 where it was stopped.

    Of `prepare`, --run is the data set's name.
    """
    from lungseg.submit.jobs import Cluster

    sys.exit(_wait(Cluster(address), store, verb, run, show=False))


@app.command()
def stop(run: ModelName, verb: Verb = "train", store: StoreUri = STORE, address: Address = None) -> None:
    """Stop a job, wait until it has committed the step it is at, and show what is committed."""
    from lungseg.storage import open_store
    from lungseg.submit.jobs import Cluster
    from lungseg.submit.status import check_committed, status_of

    cluster = Cluster(address)
    job = cluster.find(verb, run)
    if job is None or job.over:
        became = f"has ended: {job.state}" if job else "is not known there"
        message, remedy = f"{verb} of {run} {became}", "see `lungseg status`; of another verb, give --verb"
        raise RunError("nothing-to-stop", message=message, address=cluster.address, remedy=remedy)
    opened = open_store(store)
    if verb in _OF_RUNS:
        before = status_of(opened, run, job)
    cluster.stop(job)
    print(f"{job.id} is asked to stop", flush=True)
    _wait(cluster, store, verb, run, show=False)
    job = cluster.find(verb, run)
    if verb not in _OF_RUNS:
        return print(f"{verb} of {run} has ended: the same command goes on from what is committed")
    after = status_of(opened, run, job)
    print("\n".join(after.lines()))
    check_committed(before, after)


@app.command()
def logs(
    run: ModelName,
    verb: Verb = "train",
    store: StoreUri = STORE,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job ends, then end as it does.")
    ] = False,
) -> None:
    """Show a job's log. Where its cluster has gone, what the workers left in the store."""
    from lungseg.storage import open_store
    from lungseg.submit.jobs import Cluster
    from lungseg.submit.status import stored_log

    try:
        cluster = Cluster(address)
        job = cluster.find(verb, run)
    except ConfigError:
        if follow:
            raise
        job = None
    if job and follow:
        sys.exit(_wait(cluster, store, verb, run, show=True))
    print(cluster.logs(job) if job else stored_log(open_store(store), run), end="")
