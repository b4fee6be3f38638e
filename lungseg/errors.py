"""Every failure a user can cause or cure: a stable code, the object it concerns, and the remedy.

The command line prints an error as one line and exits with 2. Scripts match on `code`, never on the
wording, so a code is never renamed.
"""

from __future__ import annotations

from typing import Any, Self


class LungsegError(Exception):
    """Base of all our errors: `code` is stable, `where` names the object, `remedy` says what to do."""

    def __init__(self, code: str, *, remedy: str, message: str = "", **where: Any) -> None:
        self.code = code
        self.message = message
        self.remedy = remedy
        self.where = where
        super().__init__(code)

    def __str__(self) -> str:
        named = ", ".join(f"{key}={value}" for key, value in self.where.items())
        head = self.code + (f": {self.message}" if self.message else "")
        return f"{head}{f' ({named})' if named else ''}. Remedy: {self.remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray sends errors between processes by pickle; keyword-only arguments need help there.
        return _rebuild, (type(self), self.code, self.remedy, self.message, self.where)

    @classmethod
    def find_in(cls, error: BaseException | None) -> Self | None:
        """The error of this class among `error`, its causes and what Ray wrapped around it."""
        seen: set[int] = set()
        todo = [error]
        while todo:
            one = todo.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, cls) and not isinstance(getattr(one, "cause", None), cls):
                return one  # and not Ray's hybrid of its own error and ours
            workers = getattr(one, "worker_failures", None) or {}
            wrapped = [getattr(one, name, None) for name in ("cause", "controller_failure")]
            todo += [one.__cause__, *wrapped, *workers.values()]
        return None


def _rebuild(
    kind: type[LungsegError], code: str, remedy: str, message: str, where: dict[str, Any]
) -> LungsegError:
    return kind(code, remedy=remedy, message=message, **where)


class ConfigError(LungsegError):
    """A recipe, flag or environment variable is wrong."""


class DataError(LungsegError):
    """A scan, mask, shard or manifest is missing, broken or contradicts itself."""


class GeometryError(LungsegError):
    """Two grids that must agree do not, or a series has no consistent geometry."""


class StorageError(LungsegError):
    """The store cannot be reached, or refuses."""


class RunError(LungsegError):
    """A training run is missing, exists already, or cannot go on."""
