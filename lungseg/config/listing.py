"""The tree of settings as people and editors read it: a row for each, or a JSON Schema of all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lungseg.config.recipe import Recipe, unknown_field


@dataclass(frozen=True)
class Setting:
    """One setting, as `--set name=default` would take it; `values` says which are allowed."""

    name: str
    default: str
    values: str
    meaning: str


@dataclass(frozen=True)
class Section:
    name: str
    meaning: str
    settings: tuple[Setting, ...]


def sections(name: str = "") -> list[Section]:
    """The section of that name with those inside it, the section of that one setting, or all of them.

    Raises ConfigError("field-unknown").
    """
    found = [
        Section(section.name, section.meaning, chosen)
        for section in _sections(Recipe(), "", recipe_schema()["$defs"])
        if (
            chosen := tuple(one for one in section.settings if f"{one.name}.".startswith(name and f"{name}."))
        )
    ]
    if not found:
        raise unknown_field(name)
    return found


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, by which an editor completes and checks it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _sections(tree: BaseModel, prefix: str, schemas: dict[str, Any]) -> list[Section]:
    """Depth first: a section stands before those inside it."""
    kind = type(tree)
    rows, inside = [], []
    for name in kind.model_fields:
        value = getattr(tree, name)
        if isinstance(value, BaseModel):
            inside += _sections(value, f"{prefix}{name}.", schemas)
        else:
            schema = schemas[kind.__name__]["properties"][name]
            shown = tree.model_dump(mode="json").get(name)  # without what is kept out of files
            default = shown if isinstance(shown, str) else json.dumps(shown)
            rows.append(Setting(prefix + name, default, _values(schema), schema["description"]))
    own = Section(prefix.rstrip("."), " ".join((kind.__doc__ or "").split()), tuple(rows))
    return [own, *inside]


def _values(schema: dict[str, Any]) -> str:
    """The values that a JSON Schema allows, in a few words."""
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} of: {_values(schema['prefixItems'][0])}"
    if "items" in schema:
        return f"list of: {_values(schema['items'])}"
    words = {"boolean": "true | false", "string": schema.get("format", "text")}
    return words.get(schema["type"], schema["type"]) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" {schema['minimum']} to {schema['maximum']}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return ",".join(f" {sign} {schema[key]}" for key, sign in signs.items() if key in schema)
