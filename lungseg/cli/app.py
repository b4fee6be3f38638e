"""The tree of verbs, which the modules beside this one fill, and what holds for all of them."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lungseg import __version__

VERBS = (
    "demo",
    "phantom",
    "prepare",
    "train",
    "tune",
    "fit-post",
    "evaluate",
    "compare",
    "predict",
    "follow",
    "submit",
    "status",
    "logs",
    "wait",
    "stop",
    "runs",
    "pull",
    "ids",
    "settings",
    "doctor",
)


class _Chain(TyperGroup):
    """Lists its verbs in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=VERBS.index)


app = typer.Typer(
    cls=_Chain,
    help="Train, evaluate and use 3D lung-nodule segmentation, on a cluster or on this machine.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
prepare_app = typer.Typer(help="Turn scans into training patches in the store.")
app.add_typer(prepare_app, name="prepare")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lungseg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Log more: the settings, notices of TensorFlow and Ray.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print results and warnings only, no progress.")
    ] = False,
) -> None:
    # By the environment, since workers inherit it.
    if verbose or quiet:
        os.environ["LUNGSEG_LOG_LEVEL"] = "WARNING" if quiet else "DEBUG"
