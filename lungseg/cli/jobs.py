"""The verbs that watch jobs: status."""

from __future__ import annotations

from typing import Annotated

import typer

from lungseg.cli.app import app
from lungseg.cli.options import STORE, StoreUri, checked_name


def _checked(name: str | None) -> str | None:
    return name and checked_name(name)


_RUN = typer.Option("--run", callback=_checked, help="Name of a run. Default: all.")


@app.command()
def status(
    store: StoreUri = STORE,
    run: Annotated[str | None, _RUN] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object a run.")] = False,
) -> None:
    """Show how far a run is. From the store alone, also when its cluster has gone."""
    import json
    from dataclasses import asdict

    from lungseg.runs.run import list_runs
    from lungseg.storage import open_store
    from lungseg.submit.status import status_of

    opened = open_store(store)
    opened.check()
    for name in [run] if run else [one.name for one, _ in list_runs(opened)]:
        found = status_of(opened, name)
        print(json.dumps(asdict(found)) if as_json else "\n".join(found.lines()))
