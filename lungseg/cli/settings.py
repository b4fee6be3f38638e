"""The verb that lists every setting."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lungseg.cli.app import app
from lungseg.errors import ConfigError
from lungseg.show import table

if TYPE_CHECKING:
    from lungseg.config.listing import Section

_HEADER = ("setting", "default", "values", "meaning")


def _names(incomplete: str) -> list[str]:
    from lungseg.config import field_names

    return [name for name in field_names() if name.startswith(incomplete)]


@app.command()
def settings(
    section: Annotated[
        str,
        typer.Argument(
            metavar="[SECTION]", help="As data, data.patch or train.epochs.", autocompletion=_names
        ),
    ] = "",
    schema: Annotated[
        bool, typer.Option("--schema", help="Print JSON Schema of recipes, for editors.")
    ] = False,
) -> None:
    """List all settings with their bounds. Each goes into a recipe, or behind --set."""
    from lungseg.config.listing import recipe_schema, sections

    if schema and section:
        raise ConfigError(
            "flags-contradict", remedy="--schema is of the whole recipe: give no section with it"
        )
    if schema:
        print(json.dumps(recipe_schema(), indent=2))
    elif sys.stdout.isatty():
        _print_wrapped(sections(section))
    else:
        for one in sections(section):
            rows = [(s.name, s.default, s.values, s.meaning) for s in one.settings]
            print(f"{one.name}: {one.meaning}\n{table(_HEADER, rows)}\n")


def _print_wrapped(found: list[Section]) -> None:
    """As wide as the terminal, with long meanings over several lines."""
    from rich.console import Console
    from rich.table import Table

    for one in found:
        shown = Table(*_HEADER, title=f"{one.name}: {one.meaning}", title_justify="left", box=None)
        for s in one.settings:
            shown.add_row(s.name, s.default, s.values, s.meaning)
        Console(markup=False, highlight=False).print(shown, "")
