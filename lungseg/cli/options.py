"""Flags that several verbs share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lungseg.errors import ConfigError

if TYPE_CHECKING:
    from lungseg.config import Recipe


def checked_name(text: str) -> str:
    """A name is one part of a key in the store, and so of a path: no slash, no dot in front."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise ConfigError("name-invalid", name=repr(text), remedy="use letters, digits, '.', '_' and '-'")
    return text


def checked_if_given(text: str | None) -> str | None:
    return text and checked_name(text)


def checked_names(texts: list[str]) -> list[str]:
    return [checked_name(text) for text in texts]


def model_names(texts: list[str]) -> list[str]:
    return [model_name(text) for text in texts]


def model_name(text: str) -> str:
    """Of a run, or of an ensemble."""
    return "+".join(checked_names(sorted(text.split("+"))))


def checked_store(uri: str | None) -> str | None:
    """An empty one, as an unset variable of a shell leaves it, is neither the default nor this folder."""
    if uri == "":
        raise ConfigError("store-uri", store=repr(uri), remedy="name a folder or s3://bucket/prefix")
    return uri


def folder(path: str | Path) -> Path:
    """An empty one, as an unset variable of a shell leaves it, is not this folder."""
    if not str(path):
        raise ConfigError("folder-empty", folder=repr(path), remedy="name a folder; this one is .")
    return Path(path)


_STORE = typer.Option(
    "--store", envvar="LUNGSEG_STORE", callback=checked_store, help="A folder or s3://bucket/prefix."
)
StoreUri = Annotated[str, _STORE]
OptionalStoreUri = Annotated[str | None, _STORE]
DataName = Annotated[str, typer.Option("--data", callback=checked_name, help="Name of the data set.")]
RunName = Annotated[str, typer.Option("--run", callback=checked_name, help="Name of the run.")]
_RUNS = typer.Option(
    "--run",
    callback=lambda texts: checked_names(texts or []),
    help="Name of the run; several are one model, their mean.",
)
RunNames = Annotated[list[str] | None, _RUNS]
ModelName = Annotated[str, typer.Option("--run", callback=model_name, help="Name of the run, or A+B.")]
RunsFile = Annotated[Path | None, typer.Option("--runs", help="Text file that names runs, one a line.")]
NoPost = Annotated[bool, typer.Option("--no-post", help="Use no settings that fit-post recorded.")]
Out = Annotated[Path, typer.Option("--out", parser=folder, metavar="FOLDER", help="For the results.")]
SERIES_HELP = "One CT series of a folder: its number, as `ids` shows them, or its UID. Default: all."
Series = Annotated[str | None, typer.Option("--series", help=SERIES_HELP)]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML file of settings.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="One setting: section.field=value.")]
_ADDRESS = typer.Option(
    "--address", envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="The cluster's dashboard."
)
Address = Annotated[str | None, _ADDRESS]
STORE = "./lungseg-store"
_STORED = typer.Option("--submitted", hidden=True, metavar="KEY", help="The recipe that `submit` has stored.")
Submitted = Annotated[str | None, _STORED]


def read_recipe(
    file: Path | None, overrides: list[str] | None, store: str = STORE, submitted: str | None = None
) -> Recipe:
    """`submitted` is the key of the store under which `lungseg submit` has put the recipe, if it has."""
    from lungseg.config import load_recipe
    from lungseg.config.stored import stored_recipe
    from lungseg.storage import open_store
    from lungseg.telemetry import log

    if submitted:
        return stored_recipe(open_store(store).get_json(submitted))
    recipe = load_recipe(file, overrides or [])
    log("settings").debug("all but defaults: %s", recipe.model_dump(mode="json", exclude_defaults=True))
    return recipe


def read_runs(names: list[str], file: Path | None) -> list[str]:
    """The names given, and those in the file. Raises ConfigError("runs-file", "runs-needed")."""
    found = [*names, *checked_names(read_lines(file, "runs-file", "the name of a run") if file else [])]
    if not found:
        raise ConfigError("runs-needed", remedy="name one with --run, or several in the file of --runs")
    return found


def read_lines(file: Path, code: str, each: str) -> list[str]:
    """A text file's lines, but blank ones; `each` says what is in one. Raises ConfigError of that code."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        remedy = f"give a text file with {each} in each line ({error})"
        raise ConfigError(code, file=file, remedy=remedy) from error
    return [line.strip() for line in lines if line.strip()]


def read_space(file: Path | None) -> list[str]:
    """A file of `tune.space` as the override that it stands for. Raises ConfigError("space-file")."""
    from yaml import YAMLError

    from lungseg.config.yaml12 import read_yaml

    if file is None:
        return []
    try:
        return [f"tune.space={json.dumps(read_yaml(file.read_text(encoding='utf-8')))}"]
    except (OSError, ValueError, YAMLError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            "space-file", file=file, message=detail, remedy="give a readable YAML file"
        ) from error
