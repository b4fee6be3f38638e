"""YAML 1.2: what looks like a number is the number that it looks like, and words are words."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config.yaml12 import read_yaml

# YAML has no pairs of surrogates, by which JSON writes what lies above.
TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]))
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
KEYS = TEXT.filter(lambda key: len(json.dumps(key)) < 1024)  # YAML reads no longer one
TREES = st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=5)


@settings(deadline=None, max_examples=50)
@given(TREES)
def test_json_means_what_it_means_in_json(tree: object) -> None:
    assert read_yaml(json.dumps(tree)) == tree


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 3), st.sampled_from(["", "+", "-"]))
def test_leading_zeros_change_no_number(number: int, zeros: int, sign: str) -> None:
    assert read_yaml(f"{sign}{'0' * zeros}{number}") == (-number if sign == "-" else number)


@pytest.mark.parametrize(
    "word", ["yes", "no", "on", "off", "y", "1:30", "2026-01-01", "1_000", "0b11", "=", "1.2.3", "1e"]
)
def test_what_only_yaml_1_1_takes_for_more_is_text(word: str) -> None:
    assert read_yaml(word) == word


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("0o17", 15),
        ("0xFF", 255),
        ("-.INF", -math.inf),
        ("~", None),
        ("", None),
    ],
)
def test_numbers_and_nothing_are_read_as_the_core_schema_says(text: str, value: object) -> None:
    assert read_yaml(text) == value


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="the key epochs is there twice"):
        read_yaml("epochs: 3\nworkers: 1\nepochs: 4")


def test_parts_may_be_shared() -> None:
    tree = read_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}\nagain: *b")
    assert tree == {"base": {"x": 1}, "more": {"x": 1, "y": 2}, "again": {"x": 1}}
