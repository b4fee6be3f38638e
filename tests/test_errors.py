"""Errors as users and scripts see them."""

from __future__ import annotations

import pickle

import pytest

from lungseg.errors import ConfigError, DataError, LungsegError, RunError, StorageError


def test_an_error_says_code_message_object_and_remedy_in_one_line() -> None:
    error = DataError(
        "shard-corrupt", message="crc32c differs", shard="a.arrow", offset=8, remedy="fetch again"
    )
    expected = "shard-corrupt: crc32c differs (shard=a.arrow, offset=8). Remedy: fetch again"
    assert str(error) == expected


def test_message_and_object_may_be_absent() -> None:
    assert str(ConfigError("flags-contradict", remedy="give one")) == "flags-contradict. Remedy: give one"


def test_an_error_survives_the_way_between_processes() -> None:
    error = StorageError("object-truncated", message="3 of 4 bytes", key="k", remedy="write it again")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is StorageError
    assert (copy.code, copy.where, str(copy)) == (error.code, {"key": "k"}, str(error))


class RayError(Exception):
    """What Ray wraps around a worker's error: `cause`, or the failures of several workers."""

    def __init__(self, **parts: object) -> None:
        Exception.__init__(self, "pages of traceback")
        vars(self).update(parts)


class HybridError(RayError, DataError):
    """Ray's error that is also of the cause's class, so that `except DataError` catches it."""


INNER = DataError("data-missing", remedy="prepare it")


@pytest.mark.parametrize(
    "outer",
    [
        INNER,
        RayError(cause=INNER),
        RayError(worker_failures={1: RayError(cause=INNER)}),
        RayError(controller_failure=INNER),
        HybridError(cause=INNER),
    ],
)
def test_our_error_is_found_in_what_ray_wrapped_around_it(outer: BaseException) -> None:
    assert LungsegError.find_in(outer) is INNER


def test_our_error_is_found_among_the_causes() -> None:
    outer = ValueError("shown instead")
    outer.__cause__ = OSError("between")
    outer.__cause__.__cause__ = INNER
    assert LungsegError.find_in(outer) is INNER


def test_nothing_is_found_where_none_of_ours_is_even_in_a_ring_of_causes() -> None:
    first, second = ValueError(), OSError()
    first.__cause__, second.__cause__ = second, first
    assert LungsegError.find_in(first) is None
    assert LungsegError.find_in(None) is None


def test_only_errors_of_the_class_that_is_asked_for_are_found() -> None:
    assert RunError.find_in(RayError(cause=INNER)) is None
    assert DataError.find_in(RayError(cause=INNER)) is INNER


def test_a_mistake_made_while_an_error_of_ours_is_handled_is_not_taken_for_it() -> None:
    bug = TypeError("in the handler")
    bug.__context__ = INNER
    assert LungsegError.find_in(bug) is None
