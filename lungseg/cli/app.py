"""The tree of verbs, which the modules beside this one fill."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Train, evaluate and use 3D lung-nodule segmentation, on a cluster or on this machine.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
prepare_app = typer.Typer(help="Turn scans into training patches in the store.")
app.add_typer(prepare_app, name="prepare")
